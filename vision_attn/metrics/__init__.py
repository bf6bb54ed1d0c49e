from vision_attn.metrics.localization import mass_in_mask

__all__ = ["mass_in_mask"]
