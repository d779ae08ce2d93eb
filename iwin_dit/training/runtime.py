"""What the launcher and the machine decide: processes, precision, accumulation, threads."""

import os

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration, get_int_from_env

from .config import Config


def resolve_with_launcher(value: str | int, variable: str, name: str, default: str | int) -> str | int:
    """Settle a setting that both the configuration and `accelerate launch` can make.

    Args:
        value: From the configuration; "auto" leaves it to the launcher.
        variable: Environment variable in which the launcher passes its own.
        name: Of the setting, for the error.
        default: What the launcher passes when the user said nothing; never a disagreement.

    Returns:
        The value to use.

    Raises:
        ValueError: If both say something, and not the same.
    """
    launched = type(default)(os.environ.get(variable, default))
    if value == "auto":
        return launched
    if launched not in (default, value):
        raise ValueError(f"{name} is {value!r} in the configuration but {launched!r} in accelerate launch: drop one")
    return value


def make_accelerator(config: Config) -> Accelerator:
    """Build the Accelerator and put every CPU core to work.

    Args:
        config: The training configuration.

    Returns:
        The Accelerator.

    Raises:
        ValueError: If configuration and launcher disagree, or the launcher shards the model.
        ImportError: If the tracker is not installed.
    """
    tracker = config.log.tracker
    if tracker != "none" and tracker not in {available.value for available in get_available_trackers()}:
        raise ImportError(f'log.tracker is {tracker!r}, which is not installed: pip install "iwin-dit[{tracker}]"')
    precision = resolve_with_launcher(
        config.train.mixed_precision, "ACCELERATE_MIXED_PRECISION", "train.mixed_precision", "no"
    )
    accumulation = resolve_with_launcher(
        config.train.gradient_accumulation_steps,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "train.gradient_accumulation_steps",
        1,
    )
    accelerator = Accelerator(
        mixed_precision=str(precision),
        gradient_accumulation_steps=int(accumulation),
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=config.run, logging_dir=config.run),
    )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in supported:
        raise ValueError(
            f"expected one of the distributed types {[kind.value for kind in supported]}, got "
            f"{accelerator.distributed_type.value}, which is not supported yet: choose another in accelerate config"
        )
    if accelerator.device.type == "cpu":
        use_all_cores()
    return accelerator


def use_all_cores() -> None:
    """Share the CPU cores among the processes of this machine.

    `accelerate launch` gives a CPU process one thread (OMP_NUM_THREADS=1) unless told otherwise, which halves the
    speed on two cores; any other number in that variable is somebody's choice and is kept.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # The cores this process may run on, where the system can tell (macOS and Windows cannot).
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_processes = get_int_from_env(["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"], 1)
        torch.set_num_threads(max(1, cores // local_processes))


def micro_batch_size(batch_size: int, num_processes: int, accumulation: int) -> int:
    """Split the global batch.

    Args:
        batch_size: Samples per optimizer step.
        num_processes: Processes in the run.
        accumulation: Micro-batches per step.

    Returns:
        Samples per process and micro-batch.

    Raises:
        ValueError: If the batch does not split evenly.
    """
    parts = num_processes * accumulation
    if batch_size % parts:
        below = batch_size - batch_size % parts
        fits = [str(size) for size in (below, below + parts) if size]
        raise ValueError(
            f"train.batch_size is the global batch and must be a multiple of {num_processes} processes * "
            f"{accumulation} accumulation steps = {parts}, got {batch_size}; nearest: {' or '.join(fits)}"
        )
    return batch_size // parts
