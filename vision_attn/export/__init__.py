from vision_attn.export.artefact import export_run, find_token_layout, save_model

__all__ = ["export_run", "find_token_layout", "save_model"]
