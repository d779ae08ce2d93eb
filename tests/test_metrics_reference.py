"""Reference files: ADM's arrays in and out, what is refused, and what a file says of where it comes from."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iwin_dit.metrics.moments import Gaussian
from iwin_dit.metrics.reference import REFERENCE_KEYS, load_reference, save_reference

PROVENANCE = {"features": {"inception": {"name": "inception", "protocol": "adm", "weights_sha256": "67"}}, "n": 30}


def gaussian(width: int, seed: int = 0) -> Gaussian:
    rows = torch.randn(30, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    covariance = rows.T.cov()
    return Gaussian(rows.mean(0), (covariance + covariance.T) / 2)  # whose last bits need not be symmetric


def random_images(n: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    widths = {features: i + 2 for i, features in enumerate(REFERENCE_KEYS)}
    gaussians = {features: gaussian(width, seed=width) for features, width in widths.items()}
    images = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=(5, 4, 5, 3))
    images[:] = random_images()
    path = tmp_path / "reference.npz"
    save_reference(path, gaussians, PROVENANCE, images)
    reference = load_reference(path, widths)
    assert reference.gaussians.keys() == gaussians.keys()
    for features, saved in gaussians.items():
        assert reference.gaussians[features].mean.equal(saved.mean)
        assert reference.gaussians[features].covariance.equal(saved.covariance)
    assert reference.provenance == PROVENANCE
    assert reference.images is not None
    assert np.array_equal(reference.images.read(range(5)).permute(0, 2, 3, 1).numpy(), random_images())
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


def test_adm_reads_what_is_saved(tmp_path: Path) -> None:
    """ADM's evaluator loads `mu, sigma, mu_s, sigma_s` with numpy, and streams `arr_0` from the archive."""
    path = tmp_path / "reference.npz"
    save_reference(path, {"pool": gaussian(4), "spatial": gaussian(3)}, PROVENANCE, random_images())
    with np.load(path) as archive:
        assert set(archive) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "provenance"}
        assert {archive[key].dtype for key in ("mu", "sigma", "mu_s", "sigma_s")} == {np.dtype(np.float64)}
        assert np.array_equal(archive["mu"], gaussian(4).mean)
        assert np.array_equal(archive["sigma_s"], gaussian(3).covariance)
        assert np.array_equal(archive["arr_0"], random_images())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_of_others_need_no_provenance(tmp_path: Path, dtype: type, order: Any) -> None:
    path, wanted = tmp_path / "others.npz", gaussian(4)
    sigma = np.array(wanted.covariance.numpy().astype(dtype), order=order)
    np.savez_compressed(path, mu=wanted.mean.numpy().astype(dtype), sigma=sigma)
    reference = load_reference(path, {"pool": 4})
    assert reference.provenance is None
    assert reference.images is None
    assert reference.gaussians["pool"].covariance.dtype == torch.float64
    assert reference.gaussians["pool"].covariance.numpy() == pytest.approx(sigma)
    assert reference.gaussians["pool"].mean.numpy() == pytest.approx(wanted.mean.numpy(), rel=1e-6)
    reference.check("inception", {"protocol": "clean"})  # nothing is known, so nothing is wrong


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, mu=gaussian(4).mean, sigma=gaussian(4).covariance, mu_s=np.array([object()]), labels=np.zeros(3))
    assert load_reference(path, {}).gaussians == {}
    assert load_reference(path, {"pool": 4}).gaussians.keys() == {"pool"}


def test_another_network_is_refused_with_every_difference(tmp_path: Path) -> None:
    save_reference(tmp_path / "reference.npz", {"pool": gaussian(4)}, PROVENANCE)
    reference = load_reference(tmp_path / "reference.npz", {"pool": 4})
    description = PROVENANCE["features"]["inception"]
    reference.check("inception", {**description, "batches": "any"})
    with pytest.raises(
        ValueError, match=r"protocol: 'adm' there, 'clean' here\n.*weights_sha256: '67' there, '0' here"
    ):
        reference.check("inception", {**description, "protocol": "clean", "weights_sha256": "0"})
    with pytest.raises(ValueError, match=r"made with the networks \['inception'\], without 'dinov2'"):
        reference.check("dinov2", {})


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    save_reference(path, {"pool": gaussian(4)}, PROVENANCE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        save_reference(path, {"pool": gaussian(5)}, PROVENANCE, np.array([object()]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"named \.npz"):
        save_reference(tmp_path / "reference", {}, PROVENANCE)


def test_what_another_library_rounded_is_symmetric_when_it_is_loaded(tmp_path: Path) -> None:
    rows = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = rows.T.cov().numpy()
    noise = 4e-7 * np.abs(sigma).max() * np.triu(np.ones((6, 6)), 1)
    np.savez(tmp_path / "close.npz", mu=np.zeros(6), sigma=sigma + noise)
    loaded = load_reference(tmp_path / "close.npz", {"pool": 6}).gaussians["pool"].covariance
    assert loaded.equal(loaded.T)
    assert loaded.numpy() == pytest.approx(sigma + (noise + noise.T) / 2, rel=1e-12)
    # Far below a thousandth of an entry, but no rounding beside the largest one.
    np.savez(tmp_path / "far.npz", mu=np.zeros(6), sigma=sigma + 10 * noise)
    with pytest.raises(ValueError, match="'sigma' is not symmetric"):
        load_reference(tmp_path / "far.npz", {"pool": 6})


FLOOR = {"value": 1.5, "n": 15, "against": 15}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "'features' by network"),
        ({"features": {"inception": "adm"}}, "'features' by network"),
        ({"n": "30"}, "'n' of 'provenance' to be a number of images, got '30'"),
        ({"n": True}, "got True"),
        ({"n": 30.5}, "got 30.5"),
        ({"n": 0}, "got 0"),
        ({"image_size": 256}, r"'image_size' of 'provenance' to be \[height, width\], got 256"),
        ({"image_size": [256]}, r"got \[256\]"),
        ({"image_size": [256, "256"]}, r"got \[256, '256'\]"),
        ({"floor": 1.5}, "'floor' of 'provenance' to be .* by features, got 1.5"),
        ({"floor": {"pool": 1.5}}, "got {'pool': 1.5}"),
        ({"floor": {"pool": {**FLOOR, "value": "1.5"}}}, "'value': '1.5'"),
        ({"floor": {"pool": {**FLOOR, "value": float("nan")}}}, "'value': nan"),
        ({"floor": {"pool": {**FLOOR, "value": 10**400}}}, "'value': 10000"),
        ({"floor": {"pool": {**FLOOR, "value": -1}}}, "'value': -1"),
        ({"floor": {"pool": {**FLOOR, "n": 15.5}}}, "'n': 15.5"),
        ({"floor": {"pool": {"value": 1.5, "n": 15}}}, "'against': number of images"),
    ],
)
def test_a_provenance_that_says_what_nobody_can_use_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    whole = {**PROVENANCE, "image_size": [4, 5], "floor": {"pool": FLOOR}}
    path = tmp_path / "ours.npz"
    for provenance in (whole, {**whole, "image_size": None, "floor": None}, {**whole, "floor": {}}):
        save_reference(path, {}, provenance)
        assert load_reference(path, {}).provenance == provenance
    np.savez(path, provenance=np.array(json.dumps({**whole, **change})))
    with pytest.raises(ValueError, match=message) as caught:
        load_reference(path, {})
    assert str(path) in str(caught.value)


def test_a_provenance_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.npz"
    np.savez_compressed(path, provenance=np.array("[" * 1_000_000))
    with pytest.raises(ValueError, match=r"deep\.npz is not a usable reference: 'provenance' is nested too deeply"):
        load_reference(path, {})


class Payload:
    """Unpickling this makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": EYE[0]}, r"no 'sigma', the statistics of the 'pool' features, but \['mu'\]"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, r"no 'mu' and 'sigma'.*\['arr_0'\]: give images instead"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, r"'mu' to be floating point \(3,\), got float64 \(4,\)"),
        ({"mu": EYE[0], "sigma": EYE[0]}, r"'sigma' to be floating point \(3, 3\), got float64 \(3,\)"),
        ({"mu": np.zeros(3, np.int64), "sigma": EYE}, "got int64"),
        ({"mu": EYE[0], "sigma": np.full((3, 3), np.nan)}, "'sigma' holds NaN"),
        ({"mu": EYE[0], "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": EYE[0], "sigma": -EYE}, "'sigma' is no covariance"),
        ({"mu": EYE[0], "sigma": 2 - EYE}, "'sigma' is no covariance"),
        ({"mu": EYE[0], "sigma": EYE, "provenance": np.array("{")}, "not a usable reference"),
        ({"mu": EYE[0], "sigma": EYE, "provenance": np.array("[]")}, "'provenance' to be a JSON object"),
        ({"mu": EYE[0], "sigma": EYE, "provenance": np.array(b"{}")}, r"'provenance' to be text \(\), got \|S2"),
        ({"mu": EYE[0], "sigma": EYE, "arr_0": EYE}, r"expected 'arr_0' to be uint8"),
    ],
)
def test_bad_references_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_reference(path, {"pool": 3})
    assert str(path) in str(caught.value)


def test_a_reference_without_sfid_says_how_to_make_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", mu=EYE[0], sigma=EYE)
    with pytest.raises(ValueError, match=r"no 'mu_s' and 'sigma_s'.*\['mu', 'sigma'\].*evaluate_fid\.py reference"):
        load_reference(tmp_path / "plain.npz", {"pool": 3, "spatial": 2})


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.npz", tmp_path / "marker"
    for key in ("mu", "sigma", "provenance", "arr_0"):
        arrays = {"mu": EYE[0], "sigma": EYE, key: np.array([Payload(marker)] * 3, dtype=object)}
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match="got object"):
            load_reference(path, {"pool": 3})
    assert not marker.exists()


@pytest.mark.parametrize("shape", [(1 << 40,), (3,)])
def test_headers_that_lie_about_their_content_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path, header = tmp_path / "bad.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", header.getvalue() + b"\0" * 8)  # one number, whatever the header says
        archive.writestr("sigma.npy", b"")
    with pytest.raises(ValueError, match=r"'mu' is float64 .* bytes by its header, but the archive holds 8"):
        load_reference(path, {"pool": 3})


def test_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    path.write_text("not a zip")
    with pytest.raises(ValueError, match="no zip archive"):
        load_reference(path, {"pool": 3})
    with pytest.raises(FileNotFoundError):
        load_reference(tmp_path / "missing.npz", {"pool": 3})


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    save_reference(path, {"pool": gaussian(30)}, PROVENANCE)
    content = path.read_bytes()
    middle = content.index(b"sigma.npy") + 4000
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=r"not a usable reference: Bad CRC"):
        load_reference(path, {"pool": 30})
