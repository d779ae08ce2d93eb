"""Fixtures that several files share: a digits VAE and latents, made once, untrained for the fast tests."""

from pathlib import Path

import pytest
import torch

from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.digits import Digits
from iwin_dit.data.latents import LatentDataset, write_latents
from iwin_dit.data.prepare import prepare_latents
from tests.tools import tiny_vae


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """A folder with `vae` (random weights, stride 4) and `latents` of the digits."""
    folder = tmp_path_factory.mktemp("digits")
    vae = tiny_vae(
        block_out_channels=(8,) * 3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0)
    vae.save_pretrained(folder / "vae")
    write_latents(
        Digits(), LatentCodec(vae), folder / "latents", vae_id=str(folder / "vae"), holdout=300, seed=0, batch_size=256
    )
    return folder


@pytest.fixture(scope="session")
def digits_data(digits_folder) -> tuple[LatentCodec, LatentDataset, LatentDataset]:
    """Codec, training and held-out latents, opened as training opens them."""
    return prepare_latents(
        "digits",
        str(digits_folder / "vae"),
        str(digits_folder / "latents"),
        resolution=32,
        holdout=300,
        seed=0,
        batch_size=256,
        max_broken=0,
        model_sizes={"latent_channels": 4, "sample_size": (8, 8), "num_classes": 10},
        device=torch.device("cpu"),
    )
