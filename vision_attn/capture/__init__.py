from vision_attn.capture.compiled import uncompiled
from vision_attn.capture.recorder import AttentionCapture
from vision_attn.capture.records import AttentionInputs, AttentionRecord

__all__ = ["AttentionCapture", "AttentionInputs", "AttentionRecord", "uncompiled"]
