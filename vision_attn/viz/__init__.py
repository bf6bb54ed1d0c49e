from vision_attn.viz.files import save_png
from vision_attn.viz.overlay import DrawnMap, draw_map, outline, overlay
from vision_attn.viz.scale import Scale, find_scale

__all__ = ["DrawnMap", "Scale", "draw_map", "find_scale", "outline", "overlay", "save_png"]
