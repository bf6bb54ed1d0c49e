from vision_attn.look.asking import describe_methods, find_class
from vision_attn.look.folder import Looked, explain_photos
from vision_attn.look.maps import Look, look
from vision_attn.look.predicting import Predicted, predict_photos

__all__ = ["Look", "Looked", "Predicted", "describe_methods", "explain_photos", "find_class", "look", "predict_photos"]
