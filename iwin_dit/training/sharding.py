"""Tensors that may be sharded over the processes (FSDP2's DTensors): to whole ones on the CPU and back.

What is not sharded takes the same way. Must not know what the tensors are for.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor, sharing its memory; the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU; all processes must call it, for sharded ones are gathered, one at a time.

    Args:
        tensors: Whole or sharded tensors by name, the same names in the same order on all processes.

    Returns:
        Whole, contiguous copies by name, on rank 0; nothing on the others.
    """
    keep = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return whole


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Map a safetensors file into memory.

    Args:
        path: The file.

    Returns:
        Tensors by name.

    Raises:
        ValueError: If it is anything else; nothing in it is ever run.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, and nothing else is read: {error}") from error


@torch.no_grad()
def scatter(tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], source: Path) -> None:
    """Copy whole tensors, one at a time, into targets of which each process holds all or its shards: undo `gather`.

    Args:
        tensors: Whole tensors by name, on the CPU of every process.
        targets: Written to in place.
        source: Where the tensors are from, for the error.

    Raises:
        ValueError: If names, shapes or dtypes are not exactly those of the targets; all differences are listed.
    """
    have = {name: f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}
    want = {name: f"{name} {tuple(target.shape)} {target.dtype}" for name, target in targets.items()}
    problems = [f"missing: {want[name]}" for name in want.keys() - have.keys()]
    problems += [f"unexpected: {have[name]}" for name in have.keys() - want.keys()]
    problems += [f"expected {want[n]}, got {have[n]}" for n in want.keys() & have.keys() if want[n] != have[n]]
    if problems:
        raise ValueError(f"{source} does not fit this run:\n  " + "\n  ".join(sorted(problems)))
    for name, target in targets.items():
        tensor = tensors[name]
        if isinstance(target, DTensor):  # src_data_rank=None: no communication, every process has the whole
            tensor = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
        local(target).copy_(local(tensor))
