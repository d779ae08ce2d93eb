"""The same modules eager and compiled, checked against each other and measured; knows nothing of what they compute."""

import argparse
import contextlib
import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.measure import Step, peak_memory, time_interleaved
from benchmarks.options import DTYPES, MODES
from benchmarks.sides import (
    TOLERANCE,
    ModuleT,
    check_agreement,
    forward_backward,
    largest_error,
    require_agreement,
)
from iwin_dit.models.compilation import compile_options
from iwin_dit.nn import IwinDiTBlock


def build_modes(
    modules: Mapping[str, nn.Module], modes: Sequence[str], dtype: torch.dtype
) -> dict[tuple[str, str], nn.Module]:
    """Cast modules, and compile a copy of each where that is asked for.

    Args:
        modules: By name; they are cast in place.
        modes: Keys of `MODES`.
        dtype: Of weights.

    Returns:
        Modules by (mode, name): the module itself where it is eager.
    """
    built: dict[tuple[str, str], nn.Module] = {}
    for mode in modes:
        for name, module in modules.items():
            module.to(dtype)
            built[mode, name] = module if mode == "eager" else compiled(module, mode)
    return built


def options_of(mode: str, device: torch.device) -> dict[str, Any]:
    """The compiler's options in a mode that is compiled, a key of `MODES`."""
    return compile_options(device) | (MODES[mode] or {})


def compiled(module: ModuleT, mode: str) -> ModuleT:
    """Compile a copy of a module: its Iwin blocks, as `train.compile` does, or, where it has none, all of it."""
    copied = copy.deepcopy(module)
    blocks = [part for part in copied.modules() if isinstance(part, IwinDiTBlock)]
    targets: Sequence[nn.Module] = blocks or [copied]
    for part in targets:
        part.compile(fullgraph=True, dynamic=False, options=options_of(mode, next(part.parameters()).device))
    return copied


def as_many_variants_as(built: Mapping[tuple[str, str], nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Let the compiler build a variant of a forward pass for every module; its `recompile_limit` is per class."""
    return torch._dynamo.config.patch(recompile_limit=max(torch._dynamo.config.recompile_limit, len(built)))


def check_modes(
    eager: Mapping[str, nn.Module], built: Mapping[tuple[str, str], nn.Module], inputs: Sequence[torch.Tensor]
) -> None:
    """Compare compiled and eager modules, forward and backward, with the eager ones in float32.

    Args:
        eager: Modules by name.
        built: By `build_modes` from them.
        inputs: Of `forward_backward`.

    Raises:
        RuntimeError: If a compiled module is off by more than `TOLERANCE` and more than twice what the eager one is.
    """
    in_float32 = [x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    for (mode, name), module in built.items():
        if mode != "eager":
            exact = forward_backward(copy.deepcopy(eager[name]).float(), in_float32)
            ours, theirs = (largest_error(forward_backward(m, inputs), exact) for m in (module, eager[name]))
            require_agreement(f"'{name}' {mode} and eager", ours, max(TOLERANCE, 2 * theirs))


class Sides(NamedTuple):
    """What is known of competing modules: by name, and by (mode, name).

    `errors`, those of `check_agreement`; `seconds`, of forward and backward, one per round; `memory`, peak bytes.
    """

    errors: dict[str, float]
    seconds: dict[tuple[str, str], list[float]]
    memory: dict[tuple[str, str], int]


def measure_sides(
    sides: Mapping[str, nn.Module],
    one: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    arguments: argparse.Namespace,
) -> Sides:
    """Check modules against their twins and compiled against eager ones, then time and weigh all of them in turn.

    Args:
        sides: Modules by name, float32, on the device; they are cast.
        one: Inputs of one sample, float32, for the check.
        inputs: Of a batch, in the dtype of `arguments`.
        arguments: As prepared by a suite: `device`, `dtype`, `modes`, `repeats`.

    Returns:
        What was found.

    Raises:
        RuntimeError: If modules that should agree do not.
    """
    device = torch.device(arguments.device)
    errors = check_agreement(sides, one)
    modules = build_modes(sides, arguments.modes, DTYPES[arguments.dtype])
    steps: dict[tuple[str, str], Step] = {
        key: functools.partial(forward_backward, module, inputs) for key, module in modules.items()
    }
    with as_many_variants_as(modules):
        check_modes(sides, modules, inputs)
        return Sides(errors, time_interleaved(steps, device, arguments.repeats), peak_memory(steps, device))
