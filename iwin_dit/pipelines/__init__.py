"""diffusers pipelines."""

from .image import IwinDiTPipeline
from .loading import identify, load_pipeline

__all__ = ["IwinDiTPipeline", "identify", "load_pipeline"]
