"""Diffusion transformers with interleaved-window attention, for diffusers.

Importing this package registers its classes with diffusers, so that `DiffusionPipeline.from_pretrained` and
`AutoModel.from_pretrained` find them, in local folders and on the Hub. It must be imported before either is called:
diffusers looks a library up among the modules already imported. Data, training and metrics load only when asked for.
"""

import sys

import diffusers

from .models import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel, preset
from .models.inflate import inflate
from .nn import IwinAttention
from .pipelines import IwinDiTPipeline, IwinDiTVideoPipeline

__version__ = "0.1.0"
__all__ = [
    "IwinAttention",
    "IwinDiTPipeline",
    "IwinDiTTransformer2DModel",
    "IwinDiTTransformer3DModel",
    "IwinDiTVideoPipeline",
    "inflate",
    "preset",
]


def _register_with_diffusers() -> None:
    """Make diffusers resolve our names; it has no plug-in entry point.

    `__module__` becomes the package, so that a saved model_index.json names "iwin_dit" and survives moved files. A
    class of the same name in a future diffusers is left alone.
    """
    if not hasattr(diffusers.pipelines, __name__):
        setattr(diffusers.pipelines, __name__, sys.modules[__name__])
    for cls in (IwinDiTTransformer2DModel, IwinDiTTransformer3DModel, IwinDiTPipeline, IwinDiTVideoPipeline):
        cls.__module__ = __name__
        if not hasattr(diffusers, cls.__name__):
            setattr(diffusers, cls.__name__, cls)


_register_with_diffusers()
