"""Processes, precision and the global batch: what the launcher says, what the configuration says, what must agree."""

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.utils.data import DataLoader, Dataset

from iwin_dit.nn import blocks
from iwin_dit.training.config import parse_config
from iwin_dit.training.runtime import (
    M_MMAP_THRESHOLD,
    MALLOC_SWITCHES,
    MALLOC_TUNABLES,
    check_launch,
    keeps_freed_memory,
    make_accelerator,
    resolve_with_launcher,
    split_batch,
)
from iwin_dit.training.stop import StopRequest, ignore_stop_signals

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")
ACCELERATE = ROOT / "configs" / "accelerate"


@pytest.mark.parametrize(
    ("batch", "processes", "accumulation", "limit", "expected"),
    [
        (256, 4, 2, None, (32, 2)),
        (256, 4, None, None, (64, 1)),
        (256, 4, None, 64, (64, 1)),
        (256, 4, None, 63, (32, 2)),
        (256, 1, None, 100, (64, 4)),
        (96, 1, None, 40, (32, 3)),
        (7, 1, None, 6, (1, 7)),
        (256, 4, 4, 32, (16, 4)),
    ],
)
def test_split_of_the_global_batch(batch, processes, accumulation, limit, expected):
    assert split_batch(batch, processes, accumulation, limit) == expected


@pytest.mark.parametrize(
    ("batch", "processes", "accumulation", "limit", "message"),
    [
        (256, 3, 2, None, r"multiple of 3 processes \* 2 accumulation steps = 6, got 256; nearest: 252 or 258"),
        (256, 3, None, None, "multiple of 3 processes = 3, got 256; nearest: 255 or 258"),
        (4, 8, None, None, "multiple of 8 processes = 8, got 4; nearest: 8"),
        (256, 4, 2, 16, "micro-batches of 32, but train.micro_batch_size allows 16; .* fits: auto, 4, 8, 16, 32"),
    ],
)
def test_a_batch_that_does_not_split(batch, processes, accumulation, limit, message):
    with pytest.raises(ValueError, match=message):
        split_batch(batch, processes, accumulation, limit)


@pytest.mark.parametrize(
    ("value", "launched", "expected"),
    [
        ("auto", None, "no"),
        ("auto", "bf16", "bf16"),
        ("bf16", None, "bf16"),
        ("bf16", "no", "bf16"),
        ("bf16", "bf16", "bf16"),
    ],
)
def test_configuration_and_launcher(value, launched, expected, monkeypatch):
    monkeypatch.delenv("SETTING", raising=False)
    if launched is not None:
        monkeypatch.setenv("SETTING", launched)
    assert resolve_with_launcher(value, "SETTING", "setting", "no") == expected


def test_configuration_and_launcher_disagree(monkeypatch):
    monkeypatch.setenv("SETTING", "4")
    with pytest.raises(ValueError, match="setting is 2 in the configuration but 4 in accelerate launch"):
        resolve_with_launcher(2, "SETTING", "setting", 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed .*: FSDP2 shards"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM .*: FSDP2 shards"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor and context parallelism .*: FSDP2 shards"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP must be version 2 \(fsdp_version: 2\), got version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}, "FSDP needs GPUs"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "compile with --train.compile true"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "must be no, bf16 or fp16, got 'fp8' from accelerate launch"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"}, "float16 needs a GPU"),
        # torchrun without ACCELERATE_USE_CPU, and `accelerate launch --cpu --num_processes 2`
        ({"WORLD_SIZE": "2", "RANK": "1"}, r"asks for 2 processes.* use\n  .*torchrun --nproc_per_node 2 -- .*\nor"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"},
            r"several processes.* use\n  ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -- .*\nor, .*processes 1,",
        ),
    ],
)
def test_launches_that_are_refused(variables, message, monkeypatch, fresh_accelerate):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        make_accelerator(parse_config(["--config", DIGITS]))


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """No accelerator yet in this process, and none after; its environment without a launcher's variables."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))]:
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_other_devices_are_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.XLA, device=torch.device("meta"))
    with pytest.raises(ValueError, match=r"one of the distributed types \['NO', .*, got XLA"):
        check_launch(accelerator)


def test_accumulation_makes_up_the_global_batch(fresh_accelerate):
    accelerator = make_accelerator(parse_config(["--config", DIGITS, "--train.micro_batch_size", "40"]))
    assert accelerator.gradient_accumulation_steps == 4
    accelerator.gradient_accumulation_steps = 1


def test_accumulation_by_the_launcher(fresh_accelerate, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert make_accelerator(parse_config(["--config", DIGITS])).gradient_accumulation_steps == 2


# --- configs/accelerate


def launched(name: str, *arguments: str) -> tuple[SimpleNamespace, dict[str, str]]:
    """What `accelerate launch` makes of a file: its arguments and the environment of the processes."""
    load_config_from_file(str(ACCELERATE / name))  # refuses unknown keys
    command = ["--config_file", str(ACCELERATE / name), *arguments, "train_dit.py"]
    # no address is bound: a rank above 0 does not look whether the port is free
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    parsed.machine_rank = max(1, int(parsed.machine_rank or 0))
    return parsed, prepare_multi_gpu_env(parsed)


def test_every_accelerate_file_is_tested():
    names = {path.name for path in ACCELERATE.iterdir()}
    assert names == {"fsdp2.yaml", "fsdp2_multi_node.yaml", "multi_node.yaml"}


@pytest.mark.parametrize(("name", "processes"), [("fsdp2.yaml", 8), ("fsdp2_multi_node.yaml", 16)])
def test_fsdp2_files(name, processes, monkeypatch):
    arguments, environment = launched(name)
    assert (arguments.use_fsdp, arguments.num_processes, arguments.mixed_precision) == (True, processes, "bf16")
    assert arguments.nproc_per_node == "8"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap == [blocks.IwinDiTBlock.__name__]


@pytest.mark.parametrize("name", ["multi_node.yaml", "fsdp2_multi_node.yaml"])
def test_multi_node_files(name):
    arguments, environment = launched(name, "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert (arguments.multi_gpu, arguments.use_fsdp) == (name == "multi_node.yaml", name != "multi_node.yaml")
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert (arguments.node_rank, arguments.rdzv_backend, arguments.rdzv_endpoint) == (1, "static", "10.0.0.1:29500")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


# --- stopping


def test_a_signal_is_noted_and_its_second_delivery_is_the_same_request(caplog):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert (stop.requested, stop.signal, stop.exit_code) == (False, None, 0)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.requested, stop.signal, stop.exit_code) == (True, signal.SIGINT, 130)
        assert stop.requested
    assert caplog.messages == ["SIGINT: stopping at the end of this step; another signal exits at once"]
    assert signal.getsignal(signal.SIGINT) is before


def test_time_limit():
    assert not StopRequest(max_time=1000.0).requested
    over = StopRequest(max_time=1e-9)
    assert (over.requested, over.exit_code) == (True, 143)


class Numbers(Dataset[int]):
    """Something to load."""

    def __getitem__(self, index: int) -> int:
        return index


def test_workers_end_with_the_stop_request_when_an_error_keeps_their_loader():
    """They ignore SIGTERM, which is all that multiprocessing sends them before it waits for them at exit."""
    with pytest.raises(ValueError, match="mine") as error, StopRequest():
        options = {"batch_size": None, "sampler": range(100), "num_workers": 1}
        loader = iter(DataLoader(Numbers(), **options, worker_init_fn=ignore_stop_signals))
        assert next(loader) == 0
        [worker] = multiprocessing.active_children()
        worker.terminate()
        assert [next(loader) for _ in range(20)] == list(range(1, 21))
        raise ValueError("mine")
    assert error.traceback
    assert not worker.is_alive()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_unless_its_switches_say_otherwise(monkeypatch):
    for name in (*MALLOC_SWITCHES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert keeps_freed_memory()
    for name in MALLOC_SWITCHES:
        monkeypatch.setenv(name, "131072")
        assert not keeps_freed_memory()
        monkeypatch.delenv(name)
    for name in MALLOC_TUNABLES:
        monkeypatch.setenv("GLIBC_TUNABLES", f"glibc.malloc.check=0:{name}=131072")
        assert not keeps_freed_memory()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert keeps_freed_memory()


# Fails where this glibc takes no such threshold, and keep_freed_memory settles for one below the tensors of FETCH.
TAKES_A_GIB = f"import ctypes, sys; sys.exit(not ctypes.CDLL(None).mallopt({M_MMAP_THRESHOLD}, 2**30))"
FETCH = """
import resource, torch
from iwin_dit.training.runtime import keep_freed_memory
keep_freed_memory()
for _ in range(6):  # until what else is allocated has its place: an aligned tensor needs a larger hole than itself
    torch.empty(2**24).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_kept_memory_is_not_fetched_from_the_system_again(kept):
    """Page faults of the seventh use of 64 MiB, 16,384 small pages, in a process of its own."""
    switches = (*MALLOC_SWITCHES, "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    environment |= {} if kept else {"MALLOC_MMAP_THRESHOLD_": "131072"}
    if subprocess.run([sys.executable, "-c", TAKES_A_GIB], check=False, env=environment).returncode != 0:
        pytest.skip("this glibc maps tensors of 64 MiB whatever it is told")
    command = [sys.executable, "-W", "ignore", "-c", FETCH]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (int(done.stdout) < 16) == kept  # a system with huge pages takes 32
