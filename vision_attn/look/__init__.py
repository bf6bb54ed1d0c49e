from vision_attn.look.asking import describe_methods, find_class
from vision_attn.look.folder import Looked, explain_photos
from vision_attn.look.maps import Look, look

__all__ = ["Look", "Looked", "describe_methods", "explain_photos", "find_class", "look"]
