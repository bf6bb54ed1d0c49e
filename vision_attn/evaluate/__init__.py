from vision_attn.evaluate.attention_health import AttentionHealth, attention_health
from vision_attn.evaluate.photos import Evaluated, evaluate_explanations, evaluate_photos
from vision_attn.evaluate.protocol import METRICS, Protocol
from vision_attn.evaluate.summary import Cell, Evaluation

__all__ = [
    "METRICS",
    "AttentionHealth",
    "Cell",
    "Evaluated",
    "Evaluation",
    "Protocol",
    "attention_health",
    "evaluate_explanations",
    "evaluate_photos",
]
