"""diffusers pipelines."""

from .image import IwinDiTPipeline
from .loading import identify, load_pipeline
from .video import IwinDiTVideoPipeline, IwinDiTVideoPipelineOutput

__all__ = ["IwinDiTPipeline", "IwinDiTVideoPipeline", "IwinDiTVideoPipelineOutput", "identify", "load_pipeline"]
