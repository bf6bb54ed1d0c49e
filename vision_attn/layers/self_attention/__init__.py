from vision_attn.layers.self_attention.axes import Axial, CrissCross
from vision_attn.layers.self_attention.context import GC, XCA, DoubleAttention, Efficient, External
from vision_attn.layers.self_attention.dense import BoT, DANet, NonLocal
from vision_attn.layers.self_attention.windows import Halo, Window

__all__ = [
    "GC",
    "XCA",
    "Axial",
    "BoT",
    "CrissCross",
    "DANet",
    "DoubleAttention",
    "Efficient",
    "External",
    "Halo",
    "NonLocal",
    "Window",
]
