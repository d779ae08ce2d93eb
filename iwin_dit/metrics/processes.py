"""What the processes of a run tell one another: sums of tensors, small Python values, a status.

Plain torch.distributed: without a process group this process is rank 0 of 1 and nothing is sent. Every function but
`rank` and `world_size` is a collective. Must not know what is summed, nor how the processes were started.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK = 1 << 22  # elements sent at a time where a tensor goes through another device: 32 MB of float64


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _in_group() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place.

    A tensor on a device that the process group cannot send from goes block by block through one that it can: under
    NCCL, a CPU tensor through the GPU.

    Args:
        tensor: Contiguous, of the same shape and dtype on every process.

    Returns:
        The same tensor, with the sum.
    """
    if world_size() == 1:
        return tensor
    device = _group_device(tensor.device)
    if device.type == tensor.device.type:
        dist.all_reduce(tensor)
        return tensor
    for block in tensor.view(-1).split(_BLOCK):
        sent = block.to(device)
        dist.all_reduce(sent)
        block.copy_(sent)
    return tensor


def from_main(value: Any) -> Any:
    """Give every process the main process's value.

    Args:
        value: A small Python value; that of rank 0 counts.

    Returns:
        Rank 0's value.
    """
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Give every process the values of all.

    Args:
        value: A small Python value.

    Returns:
        The values, by rank.
    """
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def agree(status: int) -> int:
    """Give every process the largest status.

    Args:
        status: A small number.

    Returns:
        The largest of all processes' statuses.
    """
    if world_size() == 1:
        return status
    largest = torch.tensor(status, dtype=torch.int64, device=_group_device(torch.device("cpu")))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _group_device(wanted: torch.device) -> torch.device:
    """The wanted device where the process group can send from it; the accelerator of this process where it cannot."""
    backends = dist.get_backend_config()  # such as "cpu:gloo,cuda:nccl"
    if wanted.type in {pair.split(":")[0] for pair in backends.split(",")}:
        return wanted
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise ValueError(f"expected a process group for {wanted.type} tensors, got {backends}: initialise gloo")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
