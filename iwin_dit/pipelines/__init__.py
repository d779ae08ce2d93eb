"""diffusers pipelines."""

from .image import IwinDiTPipeline
from .loading import load_pipeline

__all__ = ["IwinDiTPipeline", "load_pipeline"]
