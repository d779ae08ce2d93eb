"""What the launcher and the machine decide: processes, precision, accumulation, threads."""

import ctypes
import os
import platform
import shlex
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, get_int_from_env

from .config import Config

FSDP2 = "FSDP2 shards model and optimizer (accelerate launch --config_file configs/accelerate/fsdp2.yaml)"
# glibc's own, in the environment; what they say is somebody's choice. GLIBC_TUNABLES has the same under other names.
MALLOC_SWITCHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
MALLOC_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# What the launcher passes in the environment and this trainer cannot do exactly, and what to use instead.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed keeps optimizer state that no checkpoint of ours can hold: {FSDP2}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM needs models written for it: {FSDP2}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"tensor and context parallelism are not supported: {FSDP2}",
}


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
    """Build the Accelerator, whose accumulation makes up the global batch, and put every CPU core to work.

    Args:
        config: The training configuration.

    Returns:
        The Accelerator.

    Raises:
        ValueError: If configuration and launcher disagree, the launcher asks for something else than DDP or FSDP2, its
            processes did not join, or the global batch does not split.
        ImportError: If the tracker is not installed.
    """
    train, tracker = config.train, config.log.tracker
    if tracker != "none" and tracker not in {available.value for available in get_available_trackers()}:
        raise ImportError(f'log.tracker is {tracker!r}, which is not installed: pip install "iwin-dit[{tracker}]"')
    refuse_unsupported()
    precision = resolve_with_launcher(
        train.mixed_precision, "ACCELERATE_MIXED_PRECISION", "train.mixed_precision", "no"
    )
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed precision must be no, bf16 or fp16, got {precision!r} from accelerate launch")
    accelerator = Accelerator(
        mixed_precision=str(precision),
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=config.run, logging_dir=config.run),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=train.timeout))],
    )
    check_launch(accelerator)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("float16 needs a GPU (on a CPU, Accelerate would train in float32): use bf16 or no")
    accumulation = resolve_with_launcher(
        train.gradient_accumulation_steps,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "train.gradient_accumulation_steps",
        default=1,
    )
    given = None if train.gradient_accumulation_steps == "auto" and accumulation == 1 else int(accumulation)
    _, accelerator.gradient_accumulation_steps = split_batch(
        train.batch_size, accelerator.num_processes, given, train.micro_batch_size
    )
    if accelerator.device.type == "cpu":
        use_all_cores()
        keep_freed_memory()
    return accelerator


def refuse_unsupported() -> None:
    """Check what the launcher asks for before Accelerate acts on it.

    Raises:
        ValueError: If it is something that would not train, or not resume exactly.
    """
    for variable, reason in REFUSED.items():
        if _is_set(variable):
            raise ValueError(reason)
    if _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(f"FSDP must be version 2 (fsdp_version: 2), got version 1: {FSDP2}")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError("compile with --train.compile true, which compiles the repeated block, not --dynamo_backend")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "on")


def check_launch(accelerator: Accelerator) -> None:
    """Check that all processes of the launch joined, as DDP or FSDP2.

    Accelerate starts a lone process, or several that each take themselves for the only one, without a word.

    Args:
        accelerator: Of this process.

    Raises:
        ValueError: If they did not; with the command that works.
    """
    if _is_set("ACCELERATE_USE_FSDP") and accelerator.device.type == "cpu":
        raise ValueError("FSDP needs GPUs (on a CPU, Accelerate would run DDP instead): launch without it")
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    if accelerator.distributed_type not in supported:
        raise ValueError(
            f"expected one of the distributed types {[kind.value for kind in supported]}, got "
            f"{accelerator.distributed_type.value}, which is not supported: choose another in accelerate config"
        )
    # accelerate's simple launcher starts one process, and sets a port if it was asked for more
    lone = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ
    world = get_int_from_env(["WORLD_SIZE"], 1)
    if accelerator.num_processes > 1 or (world == 1 and not lone):
        return
    asked = str(world) if world > 1 else "N"
    script = shlex.join(["--", *sys.argv])  # without --, torchrun takes our --run for its --run-path
    launch = f"torchrun --nproc_per_node {asked} {script}"
    if accelerator.device.type == "cpu":
        launch = f"ACCELERATE_USE_CPU=true {launch}"
    raise ValueError(
        f"this launch asks for {asked if world > 1 else 'several'} processes, but each works alone: use\n  {launch}\n"
        "or, if you want one process, --num_processes 1, with MASTER_PORT and WORLD_SIZE unset"
    )


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


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` asks for it: with glibc, where neither threshold is set from outside."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")  # name=value:name=value
    chosen = any(name in os.environ for name in MALLOC_SWITCHES) or any(name in tunables for name in MALLOC_TUNABLES)
    return platform.libc_ver()[0] == "glibc" and not chosen


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next step instead of giving it back to the system.

    Activations are freed in every backward pass, and large ones are mapped anew in every step, with a page fault per 4
    KiB (docs/performance.md). A choice made in the environment, by `MALLOC_SWITCHES` or `MALLOC_TUNABLES`, is kept.
    """
    if keeps_freed_memory():
        mallopt = ctypes.CDLL(None).mallopt
        # Smaller pieces come from the heap, where they can be kept; 32 MiB is the most that an older glibc takes.
        _ = mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # so much may lie there unused


def split_batch(
    batch_size: int, num_processes: int, accumulation: int | None, micro_batch_size: int | None
) -> tuple[int, int]:
    """Split the global batch over processes and micro-batches.

    Args:
        batch_size: Samples per optimizer step.
        num_processes: Processes in the run.
        accumulation: Micro-batches per step; None takes the fewest that fit.
        micro_batch_size: Most samples per process and micro-batch; None sets no limit.

    Returns:
        Samples per process and micro-batch, and micro-batches per step.

    Raises:
        ValueError: If the batch does not split evenly, or its parts are too large; with what would work.
    """
    parts = num_processes * (accumulation or 1)
    if batch_size % parts:
        below = batch_size - batch_size % parts
        fits = [str(size) for size in (below, below + parts) if size]
        accumulated = f" * {accumulation} accumulation steps" if accumulation else ""
        raise ValueError(
            f"train.batch_size is the global batch and must be a multiple of {num_processes} processes{accumulated} = "
            f"{parts}, got {batch_size}; nearest: {' or '.join(fits)}"
        )
    share, limit = batch_size // num_processes, micro_batch_size or batch_size
    fitting = [steps for steps in range(1, share + 1) if share % steps == 0 and share // steps <= limit]
    if accumulation is None:
        return share // fitting[0], fitting[0]
    if accumulation not in fitting:
        raise ValueError(
            f"train.gradient_accumulation_steps is {accumulation}, which makes micro-batches of "
            f"{share // accumulation}, but train.micro_batch_size allows {limit}; accumulation that fits: "
            f"auto, {', '.join(map(str, fitting[:4]))}"
        )
    return share // accumulation, accumulation
