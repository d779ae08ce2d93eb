"""Opening a VAE, whatever its files hold, the digits' VAE, and the codec and latents that training is given."""

import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoModel
from safetensors.torch import load_file, save_file

from iwin_dit.data import prepare
from iwin_dit.data.manifest import Manifest
from iwin_dit.data.prepare import make_digits_vae, open_vae
from iwin_dit.training.config import Config, parse_config
from iwin_dit.training.data import open_data
from tests.conftest import DIGITS
from tests.tools import tiny_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIGITS_SPLIT = ("digits", 300, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", WEIGHTS])
def test_a_pickle_is_not_read(name: str, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=r"\.bin is a pickle.* convert it: python -c|safetensors is damaged"):
        open_vae(str(folder))
    torch.save({"weights": Payload(marker)}, folder / name)
    with pytest.raises(ValueError, match=r"is a pickle|is damaged"):
        open_vae(str(folder))
    assert not marker.exists()


def test_an_honest_pickle_can_be_converted(folder: Path) -> None:
    """By the command in the message."""
    expected = open_vae(str(folder)).state_dict()
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="is a pickle") as error:
        open_vae(str(folder))
    exec(str(error.value).split('"')[1])
    assert all(torch.equal(value, expected[name]) for name, value in open_vae(str(folder)).state_dict().items())


def test_damaged_weights_are_called_damaged(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is damaged \(.* bytes\): get it again"):
        open_vae(str(folder))
    path.unlink()
    with pytest.raises(ValueError, match=r"expected a VAE folder, got .*vae': .* no file named"):
        open_vae(str(folder))


def test_weights_of_another_vae_are_refused(folder: Path) -> None:
    """Where diffusers warns at most, and leaves random weights in their place."""
    good = load_file(folder / WEIGHTS)
    key = "encoder.conv_in.weight"
    missing = {name: tensor for name, tensor in good.items() if name != key}
    for tensors, message in (
        (missing, rf"not those of AutoencoderKL: missing_keys: \['{key}'\]"),
        ({**good, "x": torch.zeros(1)}, r"unexpected_keys: \['x'\]"),
        ({**good, key: torch.zeros(2, 2)}, rf"expected a VAE folder, got .*{key}"),
    ):
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            open_vae(str(folder))


def test_what_is_no_vae_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected a VAE folder with config.json and weights"):
        open_vae(str(tmp_path / "empty"))
    (folder / "config.json").write_text('{"_class_name": "DDPMScheduler"}')
    with pytest.raises(ValueError, match=r"expected a VAE folder, got .*: its config is of 'DDPMScheduler', which"):
        open_vae(str(folder))


@pytest.mark.slow
def test_two_that_start_together_train_one_digits_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(*arguments: object) -> AutoencoderKL:
        trained.append(arguments)
        started.wait(timeout=0.5)  # the other one has no reason to begin before this one is done
        return tiny_vae()

    started = threading.Event()
    monkeypatch.setattr(prepare, "train_digits_vae", train)
    threads = [
        threading.Thread(target=make_digits_vae, args=(tmp_path / "new" / "vae", *DIGITS_SPLIT)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert (tmp_path / "new" / "vae" / prepare.SPLIT).is_file()


# --- what training is given


def config_of(digits_folder: Path, vae: Path, *arguments: str) -> Config:
    return parse_config(
        [
            *("--config", str(DIGITS), "--data.vae", str(vae), "--data.latents", str(digits_folder / "latents")),
            *arguments,
        ]
    )


def test_latents_normalised_by_their_own_statistics(digits_folder: Path, tmp_path: Path) -> None:
    """Of a VAE that has none per channel; the latents on disk and their hash of the VAE stay as they are."""
    vae = AutoencoderKL.from_pretrained(digits_folder / "vae")
    with pytest.raises(ValueError, match=r"data.vae: AutoencoderKL has latent statistics of its own, .*: keep one"):
        config = config_of(digits_folder, tmp_path / "vae", "--data.latent_statistics", "data")
        vae.register_to_config(latents_mean=[0.5] * 4)
        vae.save_pretrained(tmp_path / "vae")
        open_data(config, config.build_model(), Accelerator(cpu=True))
    vae.register_to_config(latents_mean=None, latents_std=None)
    vae.save_pretrained(tmp_path / "vae")
    manifest = Manifest.load(digits_folder / "latents")
    for statistics, given in (
        ("vae", {}),
        ("data", {"latents_mean": [*manifest.latents_mean], "latents_std": [*manifest.latents_std]}),
    ):
        config = config_of(digits_folder, tmp_path / "vae", "--data.latent_statistics", statistics)
        codec, train, held_out = open_data(config, config.build_model(), Accelerator(cpu=True))
        assert codec.given_statistics == given
    latents = torch.cat([codec.normalize(data.get(range(len(data)))[0]) for data in (train, held_out)])
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_one_process_of_a_share_and_of_a_machine_verifies(digits_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(digits_folder, digits_folder / "vae")
    verified = []
    monkeypatch.setattr("iwin_dit.training.data.LatentStore", lambda *_, verify: verified.append(verify) or stop())
    for rank, local in ((0, 0), (1, 1), (2, 0), (3, 1)):  # two machines, one share
        process = {"process_index": rank, "num_processes": 4, "is_local_main_process": local == 0}
        with pytest.raises(KeyboardInterrupt):
            open_data(config, config.build_model(), SimpleNamespace(**process, device=torch.device("cpu")))
    assert verified == [True, False, True, False]


def stop() -> None:
    raise KeyboardInterrupt


def test_a_vae_opens_after_auto_model_has_read_a_pipeline(tmp_path, monkeypatch):
    """AutoModel remembers, in its class, the name of the file that it found last."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(AutoModel, "config_name", "model_index.json")
    assert type(open_vae(str(tmp_path / "vae"))) is AutoencoderKL
