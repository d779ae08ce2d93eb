"""The feature networks: Inception with its weights and its resize, and the digits classifier."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from iwin_dit.files import sha256
from iwin_dit.metrics import inception
from iwin_dit.metrics.digits import DigitsFeatures, train_digits_features
from iwin_dit.metrics.inception import InceptionFeatures, find_inception_weights, resize_bilinear_tf1


def resize_per_pixel(image: list[list[float]], size: int) -> list[list[float]]:
    """TensorFlow 1's bilinear rule, one output pixel at a time."""
    height, width = len(image), len(image[0])
    result = []
    for i in range(size):
        y = i * height / size
        top, bottom, v = int(y), min(int(y) + 1, height - 1), y - int(y)
        row = []
        for j in range(size):
            x = j * width / size
            left, right, u = int(x), min(int(x) + 1, width - 1), x - int(x)
            upper = (1 - u) * image[top][left] + u * image[top][right]
            lower = (1 - u) * image[bottom][left] + u * image[bottom][right]
            row.append((1 - v) * upper + v * lower)
        result.append(row)
    return result


@pytest.mark.parametrize("size", [3, 5, 13])  # smaller, identity on one axis, larger
def test_resize_agrees_with_the_rule_per_pixel(size: int) -> None:
    images = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) * 255
    expected = torch.tensor([[resize_per_pixel(channel.tolist(), size) for channel in image] for image in images])
    torch.testing.assert_close(resize_bilinear_tf1(images, size), expected, rtol=1e-6, atol=1e-4)


def test_resize_to_the_same_size_is_the_identity() -> None:
    images = torch.rand(1, 3, 299, 299)
    assert torch.equal(resize_bilinear_tf1(images, 299), images)


def test_weights_are_found_in_the_cache_under_both_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"):
        (folder / name).touch()
        assert find_inception_weights(download=False) == folder / name


def test_missing_weights_tell_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with socket.socket() as closed:  # bound but not listening: refuses every connection
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(inception, "WEIGHTS_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/weights.pth")
        with pytest.raises(FileNotFoundError, match="the download failed") as failed:
            find_inception_weights()
    with pytest.raises(FileNotFoundError, match="the download is switched off") as switched_off:
        find_inception_weights(download=False)
    for caught in (failed, switched_off):
        for part in (str(tmp_path / "hub" / "checkpoints"), "pt_inception", "6726825d", "--inception-weights"):
            assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"mine\.pth does not exist"):
        find_inception_weights(tmp_path / "mine.pth")


def test_a_silent_server_is_an_error_and_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "_DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        monkeypatch.setattr(inception, "WEIGHTS_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth")
        with pytest.raises(FileNotFoundError, match="timed out"):
            find_inception_weights()
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_a_download_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setattr(inception, "WEIGHTS_URL", (tmp_path / "weights.pth").as_uri())
    with pytest.raises(FileNotFoundError, match="invalid hash"):
        find_inception_weights()
    assert list((tmp_path / "home" / "hub" / "checkpoints").iterdir()) == []


class Payload:
    """Unpickling this makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_weights_with_another_hash_are_not_even_read(tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    torch.save(Payload(marker), path)
    with pytest.raises(ValueError, match=f"begins with 6726825d, but that of .* is {sha256(path)}"):
        InceptionFeatures(path)
    with pytest.raises(Exception, match="Weights only load failed"):  # nor unpickled, should the hash fit
        InceptionFeatures(path, sha256_prefix=sha256(path)[:8])
    assert not marker.exists()


def seeded_inception(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """pytorch-fid's graph as torchvision's class runs it, weights drawn so that deep features don't vanish."""
    from pytorch_fid import inception as theirs

    with monkeypatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = theirs.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.8, 1.2),
                (module.bias, -0.1, 0.1),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.8, 1.2),
            ):
                nn.init.uniform_(tensor, low, high, generator=generator)
    return network.eval()


@torch.no_grad()
def features_of(network: nn.Module, images: Tensor) -> Tensor:
    network.fc = nn.Identity()
    return network((images.float() - 128) / 128)


@pytest.mark.slow
def test_inception_is_pytorch_fids_network_on_adms_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, path = seeded_inception(monkeypatch), tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    ours = InceptionFeatures(path, sha256_prefix=sha256(path)[:8])
    stock = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    stock.load_state_dict(network.state_dict())
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = ours(images)
    assert features.shape == (2, 2048)
    assert torch.equal(features, features_of(network, images))  # at 299 x 299 the resize is the identity
    # A control that must differ: torchvision's own graph with the same weights has other poolings.
    error = (features - features_of(stock.eval(), images)).norm() / features.norm()
    assert error > 0.02
    small = torch.nn.functional.avg_pool2d(images.float(), 8).to(torch.uint8)
    torch.testing.assert_close(ours(small)[:1], ours(small[:1]), rtol=1e-5, atol=1e-6)
    assert ours.describe()["weights_sha256"] == sha256(path)
    assert [ours.metric_name(n) for n in (10_000, 49_999, 50_000)] == ["fid_10000", "fid_49999", "fid"]


def random_digits(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n) % 10


def test_digits_features_survive_saving_and_training_is_seeded(tmp_path: Path) -> None:
    images, labels = random_digits(20)
    state = torch.get_rng_state()
    features = train_digits_features(images, labels, seed=0, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not DigitsFeatures.is_saved(tmp_path)
    features.save(tmp_path, {"held_out_accuracy": 0.5})
    assert DigitsFeatures.is_saved(tmp_path)
    loaded = DigitsFeatures.load(tmp_path)
    assert torch.equal(loaded(images), features(images))
    assert loaded(images).shape == (20, loaded.num_features)
    assert loaded.describe() == features.describe()
    assert loaded.describe()["weights_sha256"] == sha256(tmp_path / "model.safetensors")
    again, other = (train_digits_features(images, labels, seed=seed, epochs=1).describe() for seed in (0, 1))
    assert again == features.describe() != other
    assert features.metric_name(50_000) == "frechet_digits"


def test_digits_features_refuse_other_weights_and_other_sizes(tmp_path: Path) -> None:
    features = DigitsFeatures()
    features.save(tmp_path, {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"model\.safetensors with sha256 .* delete"):
        DigitsFeatures.load(tmp_path)
    with pytest.raises(ValueError, match="32 x 32 images, got 32 x 28"):
        features(torch.zeros(2, 3, 32, 28, dtype=torch.uint8))
