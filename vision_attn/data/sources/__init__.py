from vision_attn.data.sources.base import SOURCES, SPLITS, ImageSet, ImageSource
from vision_attn.data.sources.folder import FileImages
from vision_attn.data.sources.opening import open_source
from vision_attn.data.sources.splitting import split_stratified

__all__ = ["SOURCES", "SPLITS", "FileImages", "ImageSet", "ImageSource", "open_source", "split_stratified"]
