"""What a configuration costs, found by running it on the meta device: parameters, FLOPs, tokens, memory."""

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..models.compilation import compile_options
from ..models.transformer import IwinDiTCore
from .config import Config
from .runtime import MALLOC_SWITCHES, keeps_freed_memory

STATE_BYTES = 20  # per parameter in float32: weight 4, gradient 4, Adam moments 8, average 4


def describe(config: Config, samples_per_pass: int) -> str:
    """Describe the model of a configuration and what a training step needs.

    Args:
        config: The training configuration.
        samples_per_pass: Samples in one forward pass of one process.

    Returns:
        Lines for people.
    """
    with torch.device("meta"):
        model = config.build_model()
        size = (model.config.in_channels, *model.latent_size)
        inputs = (torch.zeros(1, *size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = sum(p.numel() for p in model.parameters())
    flops, activations = _measure(model, lambda: model(*inputs, return_dict=False)[0])
    gib, sample = 1024**3, config.sample_word
    return "\n".join(
        [
            f"model        {type(model).__name__}, {parameters / 1e6:.2f}M parameters",
            f"tokens       {math.prod(model.base_grid)} per {sample}, grid {model.base_grid}",
            *(f"exchange     {exchange}" for exchange in model.global_exchange()),
            f"arithmetic   {flops / 2e9:.3f} GMACs per {sample}, forward ('Gflops' in DiT's tables)",
            *(f"speed        {line}" for line in _speed(config)),
            f"memory       {parameters * STATE_BYTES / gib:.2f} GiB for weights, gradients, Adam and average",
            f"             {activations * samples_per_pass / gib:.2f} GiB for the activations of {samples_per_pass} "
            f"{sample}s per pass, in float32; about half in bf16",
        ]
    )


def _speed(config: Config) -> list[str]:
    """What makes a step faster and changes numbers by rounding at most, and what switches it; a line each."""
    given = config.train.compile_options
    on_cpu = compile_options(torch.device("cpu")) | given
    compiled = f"blocks compiled (options on a CPU: {on_cpu}; on a GPU: {given})"
    asked = f"on a CPU, glibc is asked to keep freed memory (off: {' or '.join(MALLOC_SWITCHES)})"
    return [
        compiled if config.train.compile else "blocks not compiled (train.compile)",
        asked if keeps_freed_memory() else "freed memory is left to the C library",
    ]


def _measure(model: IwinDiTCore, forward: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Return FLOPs of a forward pass and bytes it keeps for the backward pass, weights not counted."""
    weights = {id(p) for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        """Note the storage that a tensor kept for the backward pass lies in, once, and keep the tensor as it is."""
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return counter.get_total_flops(), sum(t.numel() * t.element_size() for t in kept.values())
