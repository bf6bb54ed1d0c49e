from vision_attn.attribution.base import METHODS, Explanation, explain
from vision_attn.attribution.controls import center, edges, random
from vision_attn.attribution.raw import raw
from vision_attn.attribution.rollout import rollout
from vision_attn.attribution.tokens import find_layout

__all__ = ["METHODS", "Explanation", "center", "edges", "explain", "find_layout", "random", "raw", "rollout"]
