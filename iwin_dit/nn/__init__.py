"""Layers on channels-last token grids of rank 1 to 3. The dimension letters are in windows.py."""

from .attention import IwinAttention
from .blocks import FinalLayer, IwinDiTBlock
from .conv import DepthwiseConv
from .embeddings import TimestepEmbedding, drop_labels, patchify, sincos_positions, unpatchify

__all__ = [
    "DepthwiseConv",
    "FinalLayer",
    "IwinAttention",
    "IwinDiTBlock",
    "TimestepEmbedding",
    "drop_labels",
    "patchify",
    "sincos_positions",
    "unpatchify",
]
