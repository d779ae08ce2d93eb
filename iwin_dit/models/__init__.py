"""diffusers models."""

from .presets import PRESETS, preset
from .transformer import IwinDiTTransformer2DModel

__all__ = ["PRESETS", "IwinDiTTransformer2DModel", "preset"]
