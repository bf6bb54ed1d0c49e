from vision_attn.attribution.base import METHODS, Explanation, explain
from vision_attn.attribution.controls import center, edges, random
from vision_attn.attribution.external import integrated_gradients, occlusion
from vision_attn.attribution.gates import gates
from vision_attn.attribution.gradient import generic, grad_cam, grad_rollout, legrad
from vision_attn.attribution.raw import raw
from vision_attn.attribution.rollout import rollout
from vision_attn.attribution.tokens import find_layout

__all__ = [
    "METHODS",
    "Explanation",
    "center",
    "edges",
    "explain",
    "find_layout",
    "gates",
    "generic",
    "grad_cam",
    "grad_rollout",
    "integrated_gradients",
    "legrad",
    "occlusion",
    "random",
    "raw",
    "rollout",
]
