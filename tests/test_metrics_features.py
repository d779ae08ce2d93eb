"""The feature networks: Inception against three libraries, DINOv2 and I3D against plain recomputation, the digits."""

import hashlib
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from cleanfid.resize import build_resizer
from pytorch_fid import inception as pytorch_fid
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks.seeded_inception import write_seeded_weights, write_torch_home
from iwin_dit.files import sha256
from iwin_dit.metrics import dinov2, inception
from iwin_dit.metrics.digits import DigitsFeatures, train_digits_features
from iwin_dit.metrics.dinov2 import DINOv2Features, find_dinov2_weights, resize_position_table
from iwin_dit.metrics.frechet import frechet_distance
from iwin_dit.metrics.i3d import I3DFeatures
from iwin_dit.metrics.inception import (
    PROTOCOLS,
    WIDTHS,
    InceptionFeatures,
    find_inception_weights,
    resize_bilinear_tf1,
)
from iwin_dit.metrics.inputs import exact_float32
from iwin_dit.metrics.moments import Moments
from tests.test_metrics_frechet import oracle


def random_images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(seed))


def small_and_large() -> tuple[Tensor, Tensor]:
    """Images that are enlarged to 299 x 299, and one that is reduced: resizes differ more there."""
    return random_images(2, 64), random_images(1, 400)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Payload:
    """Unpickling this makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


# --- what all networks do first


def precisions() -> list[str]:
    backends = (torch.backends.cudnn, torch.backends.mkldnn)
    return [b.conv.fp32_precision for b in backends] + [torch.backends.cuda.matmul.fp32_precision]


@pytest.fixture(params=[False, True])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """TF32 switched off or on by the caller."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = request.param
    yield request.param
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


def test_exact_float32_switches_tf32_off_and_puts_it_back(tf32: bool) -> None:
    outside = precisions()
    with exact_float32(torch.device("cpu")):
        assert precisions() == ["ieee"] * 3
        assert not torch.is_grad_enabled()
    assert precisions() == outside
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
    with pytest.raises(KeyError), exact_float32(torch.device("cpu")):
        raise KeyError
    assert precisions() == outside


# --- the resize of TensorFlow 1


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


# --- Inception: finding and checking the weights


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


def test_weights_with_another_hash_are_not_even_read(tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    torch.save(Payload(marker), path)
    with pytest.raises(ValueError, match=f"begins with 6726825d, but that of .* is {sha256(path)}"):
        InceptionFeatures(path)
    with pytest.raises(ValueError, match="Weights only load failed"):  # nor unpickled, should the hash fit
        InceptionFeatures(path, sha256_prefix=sha256(path)[:8])
    assert not marker.exists()


def test_files_that_hold_no_such_weights_are_refused(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(weights.read_bytes()[:1_000_000])  # a broken download
    with pytest.raises(ValueError, match="replace it by http"):
        InceptionFeatures(path)
    with pytest.raises(ValueError, match=r"weights\.pth to be a file of tensors"):
        InceptionFeatures(path, sha256_prefix="")
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"weights\.pth to hold the weights of the FID Inception"):
        InceptionFeatures(path, sha256_prefix="")


def test_seeded_weights_are_the_same_bytes_under_any_name(tmp_path: Path, weights: Path) -> None:
    assert sha256(write_seeded_weights(tmp_path / "other_name.pth")) == sha256(weights)


# --- Inception: its features, against the other libraries


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights under `hub/checkpoints` of the folder that TORCH_HOME is to name."""
    return write_torch_home(tmp_path_factory.mktemp("torch"))


def open_inception(weights: Path, protocol: str = "adm", features: tuple[str, ...] = ("pool",)) -> InceptionFeatures:
    return InceptionFeatures(weights, protocol, features, sha256_prefix="")


@pytest.fixture(scope="module")
def networks(weights: Path) -> dict[str, InceptionFeatures]:
    """Networks that give all features, by protocol."""
    return {protocol: open_inception(weights, protocol, tuple(WIDTHS)) for protocol in PROTOCOLS}


@pytest.fixture(scope="module")
def everything(networks: dict[str, InceptionFeatures]) -> InceptionFeatures:
    return networks["adm"]


def their_inception(weights: Path, monkeypatch: pytest.MonkeyPatch, **kwargs: bool) -> nn.Module:
    """pytorch-fid's own class, which finds the weights where it would have downloaded them to."""
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    return pytorch_fid.InceptionV3(**kwargs).eval()


def torch_fidelity(weights: Path, *features: str) -> nn.Module:
    return FeatureExtractorInceptionV3("inception-v3-compat", list(features), str(weights))


def torchmetrics_fid(weights: Path) -> FrechetInceptionDistance:
    return FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights), antialias=False)


@pytest.mark.slow
@torch.no_grad()
def test_three_libraries_give_the_same_features(
    weights: Path, everything: InceptionFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = their_inception(weights, monkeypatch, resize_input=False, normalize_input=False)
    of_torchmetrics = torchmetrics_fid(weights).inception
    of_torch_fidelity = torch_fidelity(weights, "2048", "logits_unbiased")
    for images in small_and_large():
        features, n = everything(images), len(images)
        assert {name: value.shape for name, value in features.items()} == {k: (n, width) for k, width in WIDTHS.items()}
        assert {value.dtype for value in features.values()} == {torch.float32}
        prepared = (resize_bilinear_tf1(images.float(), 299) - 128) / 128
        assert torch.equal(features["pool"], theirs(prepared)[0].flatten(1))
        assert torch.equal(features["pool"], of_torchmetrics(images))
        pool, logits = of_torch_fidelity(images)
        assert torch.equal(features["pool"], pool)
        assert torch.equal(features["logits"], logits)


@torch.no_grad()
def test_torchvisions_own_graph_is_another_network(weights: Path, everything: InceptionFeatures) -> None:
    """The control: the same weights with other poolings must differ, else the agreement above means nothing."""
    stock = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    stock.load_state_dict(torch.load(weights, weights_only=True))
    stock.fc = nn.Identity()
    images = random_images(2, 64)
    ours, theirs = everything(images)["pool"], stock.eval()(PROTOCOLS["adm"].prepare(images))
    assert (ours - theirs).norm() / ours.norm() > 0.01


@pytest.mark.slow
@torch.no_grad()
def test_spatial_features_are_the_first_channels_of_mixed_6_conv(weights: Path, everything: InceptionFeatures) -> None:
    """By torch-fidelity's modules, called one by one up to Mixed_6c; then the branch that is `mixed_6/conv`."""
    theirs = torch_fidelity(weights, "2048")
    for images in small_and_large():
        x, n = PROTOCOLS["adm"].prepare(images), len(images)
        for name, module in theirs.named_children():
            if name == "Mixed_6d":
                break
            x = module(x)
        conv = F.conv2d(x, theirs.Mixed_6d.branch1x1.conv.weight)
        grid = F.relu(theirs.Mixed_6d.branch1x1.bn(conv)).numpy()
        assert grid.shape == (n, 192, 17, 17)
        nhwc = np.transpose(grid, (0, 2, 3, 1))[..., :7]
        features = everything(images)["spatial"]
        torch.testing.assert_close(features, torch.from_numpy(nhwc.reshape(n, 2023)), rtol=1e-5, atol=1e-6)
        assert features[-1, (3 * 17 + 5) * 7 + 2].item() == pytest.approx(float(grid[-1, 2, 3, 5]), rel=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_protocol_pytorch_fid_is_that_librarys_arithmetic(
    weights: Path, networks: dict[str, InceptionFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = their_inception(weights, monkeypatch, resize_input=True, normalize_input=True)
    for images in small_and_large():
        to_floats = torch.stack([torchvision.transforms.ToTensor()(image.permute(1, 2, 0).numpy()) for image in images])
        features = networks["pytorch-fid"](images)["pool"]
        assert torch.equal(features, theirs(to_floats)[0].flatten(1))
        assert (features - networks["adm"](images)["pool"]).norm() / features.norm() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_protocol_clean_is_clean_fids_resize(
    weights: Path, networks: dict[str, InceptionFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = their_inception(weights, monkeypatch, resize_input=False, normalize_input=False)
    for images in small_and_large():
        resized = np.stack([build_resizer("clean")(image.permute(1, 2, 0).numpy()) for image in images])
        x = torch.from_numpy(resized.transpose(0, 3, 1, 2).copy())
        assert x.dtype == torch.float32
        features = networks["clean"](images)["pool"]
        assert torch.equal(features, theirs((x - 128) / 128)[0].flatten(1))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_image_plays_a_part_in_the_features_of_another(
    networks: dict[str, InceptionFeatures], protocol: str
) -> None:
    images, network = random_images(2, 48), networks[protocol]
    together, alone = network(images), network(images[1:])
    for name in WIDTHS:
        torch.testing.assert_close(together[name][1:], alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_only_what_was_asked_for_is_given(weights: Path, everything: InceptionFeatures) -> None:
    images = random_images(1, 32)
    all_of_it, state = everything(images), torch.get_rng_state()
    for names in (("spatial",), ("logits", "pool")):
        network = open_inception(weights, features=names)
        features = network(images)
        assert features.keys() == set(names) == network.widths.keys()
        assert all(torch.equal(features[name], all_of_it[name]) for name in names)
        assert network.describe() == everything.describe()
    assert torch.equal(torch.get_rng_state(), state)  # opening a network must not change what training draws
    assert everything.describe() == {
        "name": "inception",
        "protocol": "adm",
        "weights_sha256": sha256(weights),
        "resize": "TF1 bilinear to 299, antialias=False",
        "normalisation": "(x - 128) / 128",
        "dtype": "float32",
    }


def test_autocast_and_gradients_of_the_caller_play_no_part(everything: InceptionFeatures) -> None:
    images = random_images(1, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = everything(images)["pool"]
    assert torch.equal(features, everything(images)["pool"])
    assert not features.requires_grad


def test_unknown_protocols_features_and_batches_are_refused(weights: Path, everything: InceptionFeatures) -> None:
    with pytest.raises(ValueError, match="a protocol of adm, pytorch-fid, clean, got tf"):
        open_inception(weights, "tf")
    with pytest.raises(ValueError, match="features of pool, spatial, logits, got dinov2"):
        open_inception(weights, features=("dinov2",))
    for batch in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), random_images(2, 8)[0]):
        with pytest.raises(ValueError, match=r"uint8 images \(B, 3, H, W\), got torch"):
            everything(batch)


# --- FID: the same number as the other libraries'


def two_sets() -> tuple[Tensor, Tensor]:
    """Images of blobs, 12 each; the second set is darker and of finer blobs."""
    sets = []
    for seed, (grid, gain) in enumerate(((6, 1.0), (9, 0.8))):
        blobs = F.interpolate(torch.rand(12, 3, grid, grid, generator=generator(seed)), size=(64, 64), mode="bilinear")
        sets.append((blobs * gain * 255).round().to(torch.uint8))
    return sets[0], sets[1]


def our_fid(network: InceptionFeatures, real: Tensor, fake: Tensor) -> float:
    gaussians = []
    for images in (real, fake):
        moments = Moments(2048)
        for batch in images.split(5):
            moments.update(network(batch)["pool"])
        gaussians.append(moments.gaussian())
    return frechet_distance(*gaussians)


@pytest.mark.slow
def test_fid_agrees_with_torchmetrics(weights: Path) -> None:
    real, fake = two_sets()
    metric = torchmetrics_fid(weights)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert our_fid(open_inception(weights), real, fake) == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_fid_agrees_with_torch_fidelity(weights: Path) -> None:
    real, fake = two_sets()
    network = torch_fidelity(weights, "2048")
    statistics = [fid_features_to_statistics(network(images)[0]) for images in (real, fake)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert our_fid(open_inception(weights), real, fake) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_fid_agrees_with_pytorch_fid_under_its_protocol(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its features; its own distance calls scipy's sqrtm with an argument that SciPy 1.18 dropped."""
    real, fake = two_sets()
    network = their_inception(weights, monkeypatch)  # with its own resize and normalisation
    theirs = oracle(*(network(images.float() / 255)[0].flatten(1).double() for images in (real, fake)))
    assert our_fid(open_inception(weights, "pytorch-fid"), real, fake) == pytest.approx(theirs, rel=1e-5)


# --- DINOv2


@pytest.fixture(scope="module")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random DINOv2 of patch size 14 and a 5 x 5 position table."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=70)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, as torch has it."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def position_matrix(length: int, size: int) -> np.ndarray:
    """What resizes one axis, entry by entry: sample at (i + 0.5) / factor - 0.5, borders repeated."""
    matrix, factor = np.zeros((size, length)), (size + 0.1) / length
    for i in range(size):
        position = (i + 0.5) / factor - 0.5
        for j in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            matrix[i, min(max(j, 0), length - 1)] += cubic(position - j)
    return matrix


@pytest.mark.parametrize("length", [5, 37])
def test_the_position_table_is_resized_as_dinov2s_code_does(length: int) -> None:
    table = torch.randn(1, 1 + length**2, 3, generator=generator(0))
    resized = resize_position_table(table, 16)
    matrix, grid = position_matrix(length, 16), table[0, 1:].numpy().reshape(length, length, 3)
    expected = np.einsum("ih,jw,hwd->ijd", matrix, matrix, grid).reshape(256, 3)
    np.testing.assert_allclose(resized[0, 1:].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(resized[:, 0], table[:, 0])
    assert resize_position_table(resized, 16) is resized
    plain = F.interpolate(torch.from_numpy(grid).permute(2, 0, 1)[None], size=(16, 16), mode="bicubic")
    assert (plain[0].permute(1, 2, 0).flatten(0, 1) - resized[0, 1:]).abs().max() > 1e-2  # what transformers does


def plain_dinov2(w: dict[str, Tensor], images: Tensor) -> Tensor:
    """The class token of DINOv2, from the weights by the paper's definition, 4 heads, float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True).double()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[:, :, None, None]
    projection = "embeddings.patch_embeddings.projection"
    x = F.conv2d((x / 255 - mean) / std, w[f"{projection}.weight"], w[f"{projection}.bias"], stride=14)
    matrix = torch.from_numpy(position_matrix(5, 16))
    table = w["embeddings.position_embeddings"]
    grid = torch.einsum("ih,jw,hwd->ijd", matrix, matrix, table[0, 1:].unflatten(0, (5, 5))).flatten(0, 1)
    x = x.flatten(2).transpose(1, 2) + grid
    x = torch.cat([(w["embeddings.cls_token"] + table[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    for i in range(2):
        layer = f"encoder.layer.{i}"
        h = norm(f"{layer}.norm1", x)
        q, k, v = (
            linear(f"{layer}.attention.attention.{name}", h).unflatten(2, (4, 8)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        h = ((q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + w[f"{layer}.layer_scale1.lambda1"] * linear(f"{layer}.attention.output.dense", h)
        h = F.gelu(linear(f"{layer}.mlp.fc1", norm(f"{layer}.norm2", x)))
        x = x + w[f"{layer}.layer_scale2.lambda1"] * linear(f"{layer}.mlp.fc2", h)
    return norm("layernorm", x)[:, 0]


def test_dinov2_features_equal_a_plain_recomputation(tiny_dinov2: Path) -> None:
    images, state = random_images(2, 50), torch.get_rng_state()
    network = DINOv2Features(str(tiny_dinov2))
    assert torch.equal(torch.get_rng_state(), state)
    features = network(images)["dinov2"]
    assert features.shape == (2, 32)
    assert features.dtype == torch.float32
    assert network.widths == {"dinov2": 32}
    w = load_file(tiny_dinov2 / "model.safetensors")
    expected = plain_dinov2(w, images)
    torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-4)
    assert network.describe()["weights_sha256"] == sha256(tiny_dinov2 / "model.safetensors")
    with pytest.raises(ValueError, match="expected uint8 images"):
        network(images.float())


def test_folders_that_hold_no_dinov2_are_refused(tiny_dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json and no model\.safetensors in it.* --dinov2"):
        DINOv2Features(str(tmp_path))
    config = json.loads((tiny_dinov2 / "config.json").read_text())
    tensors = load_file(tiny_dinov2 / "model.safetensors")
    projection = "embeddings.patch_embeddings.projection.weight"
    other_patches = {"patch_size": 15, "image_size": 75}
    for change, replaced, message in (
        ({"model_type": "vit"}, {}, "of model_type dinov2, got vit"),
        ({}, {"layernorm.weight": None}, r"missing or misshapen layernorm\.weight"),
        (other_patches, {}, f"missing or misshapen {projection}"),
        (other_patches, {projection: torch.zeros(32, 3, 15, 15)}, "whose patch size divides 224, got 15"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        kept = {name: tensor for name, tensor in {**tensors, **replaced}.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            DINOv2Features(str(tmp_path))


def test_the_hubs_cache_is_used_offline_and_checked(
    tiny_dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nor in the Hub's cache, and the download is switched off"):
        find_dinov2_weights("some/dinov2", download=False)
    root = tmp_path / "models--some--dinov2"
    for folder in ("blobs", "refs", "snapshots/abc"):
        (root / folder).mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        content = (tiny_dinov2 / name).read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (root / "snapshots" / "abc" / name).symlink_to(blob)
    assert DINOv2Features("some/dinov2", download=False).widths == {"dinov2": 32}
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"with sha256 {blob.name}, got .* delete .*{blob.name}"):
        DINOv2Features("some/dinov2", download=False)


def test_a_silent_hub_is_an_error_and_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(dinov2, "_ANSWER_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(FileNotFoundError, match=r"the download failed: .*timed out"):
            find_dinov2_weights("some/dinov2")


# --- I3D


class TinyI3D(nn.Module):
    """The signature of I3D; gives the mean of each channel and frame, 12 numbers, and zeros."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if rescale:
            x = x / 127.5 - 1
        if resize and return_features:
            x = F.pad(x.mean(dim=[3, 4]).flatten(1), [0, 400 - 12])
        return x


def save_scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(module), path)
    return path


def test_i3d_sees_clips_as_stylegan_v_gives_them(tmp_path: Path) -> None:
    path = save_scripted(TinyI3D(), tmp_path / "i3d_torchscript.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = I3DFeatures(path)
    clips = torch.randint(0, 256, (2, 4, 3, 8, 6), dtype=torch.uint8, generator=generator(0))
    features = network(clips)["i3d"]
    expected = np.zeros((2, 400))
    for b in range(2):
        for c in range(3):
            for t in range(4):
                expected[b, 4 * c + t] = clips[b, t, c].double().mean().item() / 127.5 - 1
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6)
    assert network.widths == {"i3d": 400}
    assert network.describe()["weights_sha256"] == sha256(path)
    assert network.describe()["covariance"] == "over n"
    with pytest.raises(ValueError, match=r"uint8 clips \(B, T, 3, H, W\), got torch.uint8 \(2, 3, 8, 6\)"):
        network(clips[:, 0])


def test_networks_that_are_no_i3d_are_refused(tmp_path: Path) -> None:
    class Other(TinyI3D):
        def forward(
            self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
        ) -> Tensor:
            return x.mean(dim=[2, 3, 4])

    network = I3DFeatures(save_scripted(Other(), tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"to give \(1, 400\) features, got \(1, 3\)"):
        network(torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(FileNotFoundError, match=r"missing\.pt does not exist.*StyleGAN-V.*i3d_torchscript\.pt.*--i3d"):
        I3DFeatures(tmp_path / "missing.pt")


def test_a_pickle_in_the_place_of_i3d_is_never_opened(tmp_path: Path) -> None:
    path, marker = tmp_path / "i3d_torchscript.pt", tmp_path / "marker"
    for legacy in (False, True):
        torch.save(Payload(marker), path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r"TorchScript archive .*, got another kind of file"):
            I3DFeatures(path)
    whole = save_scripted(TinyI3D(), tmp_path / "whole.pt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="TorchScript archive"):
        I3DFeatures(path)
    assert not marker.exists()


# --- the digits classifier


def random_digits(n: int) -> tuple[Tensor, Tensor]:
    return random_images(n, 32), torch.arange(n) % 10


def test_digits_features_survive_saving_and_training_is_seeded(tmp_path: Path) -> None:
    images, labels = random_digits(20)
    state = torch.get_rng_state()
    features = train_digits_features(images, labels, seed=0, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not DigitsFeatures.is_saved(tmp_path)
    features.save(tmp_path, {"held_out_accuracy": 0.5})
    assert DigitsFeatures.is_saved(tmp_path)
    loaded = DigitsFeatures.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(images)["digits"], features(images)["digits"])
    assert loaded(images)["digits"].shape == (20, 64)
    assert loaded.widths == {"digits": 64}
    assert loaded.describe() == features.describe()
    assert loaded.describe()["weights_sha256"] == sha256(tmp_path / "model.safetensors")
    again, other = (train_digits_features(images, labels, seed=seed, epochs=1).describe() for seed in (0, 1))
    assert again == features.describe() != other


def test_digits_features_refuse_other_weights_and_other_sizes(tmp_path: Path) -> None:
    features = DigitsFeatures()
    features.save(tmp_path, {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"model\.safetensors with sha256 .* delete"):
        DigitsFeatures.load(tmp_path)
    with pytest.raises(ValueError, match="32 x 32 images, got 32 x 28"):
        features(torch.zeros(2, 3, 32, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected uint8 images"):
        features(torch.zeros(2, 3, 32, 32))


def test_the_gradients_that_training_needs_pass_the_logits_alone() -> None:
    features, (images, labels) = DigitsFeatures(), random_digits(4)
    assert not features(images)["digits"].requires_grad
    F.cross_entropy(features.class_logits(images), labels).backward()
    assert all(parameter.grad is not None for parameter in features.parameters())
