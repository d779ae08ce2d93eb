"""Time and memory of competing steps, taken in one process so that they compare; knows nothing of what the steps do."""

import argparse
import itertools
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from iwin_dit.metrics.result import environment

Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
WARM_UP = 2  # rounds; the first compiles where that is asked for


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Exit with a message where --device names a device that is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here, leave it out to measure on the CPU")


def time_interleaved(steps: Mapping[Name, Step], device: torch.device, repeats: int) -> dict[Name, list[float]]:
    """Time every step once per round, so that a machine that slows down slows all of them.

    Every round has an order of its own (`orders`).

    Args:
        steps: What to time, by name.
        device: Where the steps run; it is waited for before and after each.
        repeats: Rounds, after a warm-up that is not counted.

    Returns:
        Seconds per step, one number per round, in the order of the rounds.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    for order in itertools.islice(orders(steps), WARM_UP + repeats):
        for name in order:
            _wait(device)
            start = time.perf_counter()
            steps[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def orders(steps: Iterable[Name]) -> Iterator[list[Name]]:
    """Draw an order for every round, from a fixed seed: a step finds caches and heap as the one before it left them."""
    names, generator = list(steps), random.Random(0)
    while True:
        yield generator.sample(names, k=len(names))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, median, high


def ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of first / second, round by round, so that what slows a whole round cancels."""
    return quartiles([a / b for a, b in zip(first, second, strict=True)])


def peak_memory(steps: Mapping[Name, Step], device: torch.device) -> dict[Name, int]:
    """Measure how far each step raises the memory held in tensors above what was held when it began.

    On CUDA this is torch's own peak counter. On a CPU it is the running sum of every allocation and release that
    torch's CPU allocator reports to its profiler, those inside operators included; memory that a math library takes
    past that allocator is not seen. (The resident set of the process would not do: its peak never falls.)

    Args:
        steps: What to measure, by name, each run once.
        device: Where the steps run.

    Returns:
        Bytes per step.
    """
    if device.type == "cuda":
        return {name: _cuda_peak(step, device) for name, step in steps.items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, step in steps.items():
            with record_function(f"peak memory of {name}"):
                step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events.sort(key=lambda event: event.get("ts", 0))
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"}
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    peaks = {}
    for name in steps:
        start, end = spans[f"peak memory of {name}"]
        peaks[name] = _highest(size for ts, size in changes if start <= ts <= end)
    return peaks


# What an operator or kernel of a training step is for, by what its name holds; the first that fits. A fused kernel is
# named after all that is in it, attention's and convolution's kernels on a GPU after the matrix products inside too.
KINDS = {
    "fused elementwise": ("cpp_fused", "triton_", "CompiledFxGraph"),
    "attention": ("attention", "flash", "fmha"),
    "convolution": ("convolution", "conv2d", "conv3d", "conv_depthwise", "implicit_gemm", "fprop", "dgrad", "wgrad"),
    "matrix products": (
        *("onednn_mm", "linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm"),
        *("gemm", "gemv", "nvjet", "cutlass", "splitK"),
    ),
    "optimizer, clipping, average": ("adam", "_foreach", "lerp", "multi_tensor_apply"),
    "copies": ("copy", "aten::cat", "CatArray", "contiguous", "clone", "Memcpy"),
}
OTHER = "elementwise and the rest"
PROFILES = 5  # rounds


def kind_of(name: str) -> str:
    """What an operator or kernel is for: one of `KINDS`, or `OTHER`."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def by_operator(steps: Mapping[Name, Step], device: torch.device) -> dict[Name, dict[str, float]]:
    """Profile steps in turn, a few rounds, and add up their operators' own time by kind.

    Args:
        steps: What to profile, by name; they should have run before.
        device: Where they run; on a GPU, the time is that of kernels, and operators, which carry the time of theirs
            once more, are left out.

    Returns:
        By step, milliseconds by kind, those of `KINDS` and `OTHER`, of the round in which the step took the median.
    """
    rounds = [
        {name: _profiled(steps[name], device) for name in order} for order in itertools.islice(orders(steps), PROFILES)
    ]
    return {
        name: sorted((spent[name] for spent in rounds), key=lambda spent: sum(spent.values()))[PROFILES // 2]
        for name in steps
    }


def _profiled(step: Step, device: torch.device) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        step()
        _wait(device)
    spent = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in profiler.key_averages():
        if not on_gpu:
            spent[kind_of(event.key)] += event.self_cpu_time_total / 1e3
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spent[kind_of(event.key)] += event.self_device_time_total / 1e3
    return spent


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe what a measurement depends on: device, threads, load of the machine before it, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # not on Windows
        **environment(),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cuda_peak(step: Step, device: torch.device) -> int:
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _highest(changes: Iterable[int]) -> int:
    return max(itertools.accumulate(changes), default=0)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()
