from vision_attn.cli.main import main

__all__ = ["main"]
