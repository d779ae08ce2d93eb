"""Training objectives: pure functions of data and of random numbers that the caller draws."""

from .ddpm import DDPM
from .flow_matching import FlowMatching
from .objective import Denoiser, Objective

__all__ = ["DDPM", "Denoiser", "FlowMatching", "Objective"]
