"""Attention on sequences of tokens (B, N, C): what a Vision Transformer's layer, or its pooling, can be.

Those in `TOKEN_LAYERS` mix tokens, (B, N, C) -> (B, N, C), and are called alike, so that an encoder can take any of
them by name; each says what it costs in tokens. Two more pool: `ClassAttention` and `MapPooling`.
"""

from vision_attn.layers.tokens.attention import Attention, RelativeBias
from vision_attn.layers.tokens.base import TOKEN_LAYERS, create_token_layer, list_token_layers
from vision_attn.layers.tokens.linear import CrossCovarianceAttention, LinearAttention
from vision_attn.layers.tokens.pooling import ClassAttention, MapPooling
from vision_attn.layers.tokens.reduced import AgentAttention, LatentAttention, SpatialReductionAttention
from vision_attn.layers.tokens.windows import WindowAttention

__all__ = [
    "TOKEN_LAYERS",
    "AgentAttention",
    "Attention",
    "ClassAttention",
    "CrossCovarianceAttention",
    "LatentAttention",
    "LinearAttention",
    "MapPooling",
    "RelativeBias",
    "SpatialReductionAttention",
    "WindowAttention",
    "create_token_layer",
    "list_token_layers",
]
