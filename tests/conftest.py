"""Fixtures that several files share: a digits VAE and latents, made once, untrained for the fast tests."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo import config as dynamo

from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.latents import LatentDataset, LatentStore
from iwin_dit.training.config import parse_config
from iwin_dit.training.data import open_codec, open_extraction
from tests.tools import tiny_vae

DIGITS = Path(__file__).parents[1] / "configs" / "digits.yaml"


def pytest_configure() -> None:
    """Give each of several workers a core of its own, for all that it starts: teams of OpenMP threads that share cores
    wait for each other, and what rounds otherwise on more threads rounds alike.

    And keep `keep_freed_memory` out of this process, since tests of memory ask for what is resident: by a choice of its
    switches, both at what glibc itself comes to, or processes that are started here would be slow.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**26))
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def state_of_the_process() -> Iterator[None]:
    """Put back what is set for good: levels of loggers, torch's threads, and its limit of compiled variants."""
    loggers = [logging.getLogger(name) for name in (None, "iwin_dit")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    limit = dynamo.recompile_limit
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)
    dynamo.recompile_limit = limit


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """A folder with `vae` (random weights, stride 4) and `latents` of the digits, as configs/digits.yaml wants them."""
    folder = tmp_path_factory.mktemp("digits")
    vae = tiny_vae(
        block_out_channels=(8,) * 3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0)
    vae.save_pretrained(folder / "vae")
    arguments = ["--config", str(DIGITS), "--data.vae", str(folder / "vae"), "--data.latents", str(folder / "latents")]
    config = parse_config([*arguments, "--data.encode_batch_size", "256"])
    open_extraction(config, config.build_model(), open_codec(config.data, torch.device("cpu"))).run()
    return folder


@pytest.fixture(scope="session")
def digits_data(digits_folder) -> tuple[LatentCodec, LatentDataset, LatentDataset]:
    """Codec, training and held-out latents, opened as training opens them."""
    data = parse_config(["--config", str(DIGITS), "--data.vae", str(digits_folder / "vae")]).data
    train, held_out = LatentStore(digits_folder / "latents").split(data.holdout, data.split_seed)
    return open_codec(data, torch.device("cpu")), train, held_out
