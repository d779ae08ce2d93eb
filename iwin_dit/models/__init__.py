"""diffusers models."""

from .presets import PRESETS, preset
from .transformer import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel

__all__ = ["PRESETS", "IwinDiTTransformer2DModel", "IwinDiTTransformer3DModel", "preset"]
