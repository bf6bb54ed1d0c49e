from vision_attn.export.artefact import export_run, find_token_layout, save_model
from vision_attn.export.card import write_card
from vision_attn.export.graph import ExportedGraph, export_graph, graph_path
from vision_attn.export.hub import Pushed, push_to_hub

__all__ = [
    "ExportedGraph",
    "Pushed",
    "export_graph",
    "export_run",
    "find_token_layout",
    "graph_path",
    "push_to_hub",
    "save_model",
    "write_card",
]
