"""The Frechet distance against closed forms and an independent oracle, and the reading of reference files."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from iwin_dit.metrics.frechet import FeatureNetwork, FeatureStatistics, FrechetDistance, load_statistics


class Table(FeatureNetwork):
    """Features by row number, which an image carries in its first two bytes: any vector without any network."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.num_features = rows.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[256 * images[:, 0, 0, 0].long() + images[:, 0, 0, 1].long()]


def numbered(start: int, stop: int) -> Tensor:
    """Images (B, 3, 1, 2) that stand for the rows start to stop."""
    i = torch.arange(start, stop)
    return torch.stack([i // 256, i % 256], dim=1)[:, None, None].expand(-1, 3, -1, -1).to(torch.uint8)


def distance(real: Tensor, fake: Tensor, batch: int = 1000) -> float:
    metric = FrechetDistance(Table(torch.cat([real, fake])))
    for images, is_real in ((numbered(0, len(real)), True), (numbered(len(real), len(real) + len(fake)), False)):
        for part in images.split(batch):
            metric.update(part, real=is_real)
    return metric.compute().value


def with_diagonal_covariance(variances: Tensor, mean: Tensor) -> Tensor:
    """2 D points whose mean and unbiased covariance are exactly these."""
    n = 2 * len(variances)
    points = torch.diag(((n - 1) / 2 * variances).sqrt())
    return torch.cat([points, -points]) + mean


def oracle(a: Tensor, b: Tensor) -> float:
    """The distance without any D x D matrix: tr sqrt(S1 S2) is the nuclear norm of A0 B0^T / sqrt((n-1)(m-1))."""
    a0, b0 = a - a.mean(0), b - b.mean(0)
    trace = a0.square().sum() / (len(a) - 1) + b0.square().sum() / (len(b) - 1)
    cross = torch.linalg.matrix_norm(a0 @ b0.T, "nuc") / ((len(a) - 1) * (len(b) - 1)) ** 0.5
    return ((a.mean(0) - b.mean(0)).square().sum() + trace - 2 * cross).item()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_mean_shift_is_its_squared_length() -> None:
    ones, shift = torch.ones(16, dtype=torch.float64), torch.full((16,), 0.5, dtype=torch.float64)
    real, fake = with_diagonal_covariance(ones, 0 * ones), with_diagonal_covariance(ones, shift)
    assert distance(real, fake) == pytest.approx(16 * 0.25, rel=1e-12)


def test_diagonal_covariances() -> None:
    a, b = normal(16).square(), normal(16, seed=1).square()
    real, fake = with_diagonal_covariance(a, 0 * a), with_diagonal_covariance(b, 0 * b)
    assert distance(real, fake) == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("n", [8, 256])  # rank-deficient, full rank
def test_agrees_with_the_nuclear_norm_oracle(n: int) -> None:
    real, fake = normal(n, 64), 1 + 2 * normal(n + 3, 64, seed=1)
    assert distance(real, fake) == pytest.approx(oracle(real, fake), rel=1e-6)


def test_batches_order_and_sides_do_not_matter() -> None:
    real, fake = normal(100, 8), normal(90, 8, seed=1).exp()
    value = distance(real, fake)
    assert distance(real, fake, batch=7) == pytest.approx(value, rel=1e-12)
    assert distance(real.flip(0), fake) == pytest.approx(value, rel=1e-12)
    assert distance(fake, real) == pytest.approx(value, rel=1e-9)


def test_a_set_against_itself_is_zero_and_the_raw_value_is_kept() -> None:
    rows = normal(8, 64)  # rank-deficient: the formula gives about -1e-6
    metric = FrechetDistance(Table(rows))
    for real in (True, False):
        metric.update(numbered(0, 8), real=real)
    result = metric.compute()
    assert result.value == max(result.raw, 0.0) < 1e-3
    assert result.raw > -1e-3
    assert (result.n_real, result.n_fake) == (8, 8)


@pytest.mark.parametrize("real", [True, False])
def test_features_that_are_not_finite_are_refused(real: bool) -> None:
    rows = normal(8, 4)
    rows[7, 2] = torch.nan
    metric = FrechetDistance(Table(rows))
    metric.update(numbered(0, 4), real=not real)
    metric.update(numbered(4, 8), real=real)
    with pytest.raises(
        ValueError, match=f"features of the {'real' if real else 'generated'} images are not all finite"
    ):
        metric.compute()


def test_too_few_images_and_wrong_batches_are_refused() -> None:
    metric = FrechetDistance(Table(normal(8, 4)))
    metric.update(numbered(0, 8), real=True)
    metric.update(numbered(0, 1), real=False)
    with pytest.raises(ValueError, match="at least 2 images on each side, got 8 real and 1 generated"):
        metric.compute()
    with pytest.raises(ValueError, match="expected uint8 images"):
        metric.update(torch.zeros(2, 3, 4, 4), real=True)
    with pytest.raises(ValueError, match="expected uint8 images"):
        metric.update(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), real=True)


def write_npz(path: Path, rows: Tensor, **extra: np.ndarray) -> Path:
    np.savez(path, mu=rows.mean(0).numpy(), sigma=np.cov(rows.numpy(), rowvar=False), **extra)
    return path


def test_an_npz_reference_gives_the_distance_of_its_images(tmp_path: Path) -> None:
    real, fake = normal(100, 8) + 5, normal(90, 8, seed=1)
    path = write_npz(tmp_path / "reference.npz", real, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    metric = FrechetDistance(Table(fake))
    metric.set_real_statistics(load_statistics(path, 8))
    metric.update(numbered(0, 90), real=False)
    result = metric.compute()
    assert result.value == pytest.approx(oracle(real, fake), rel=1e-9)
    assert result.n_real is None
    with pytest.raises(ValueError, match="given as statistics"):
        metric.update(numbered(0, 2), real=True)
    with pytest.raises(ValueError, match="expected statistics of 8 features, got 4"):
        metric.set_real_statistics(FeatureStatistics(torch.zeros(4), torch.zeros(4, 4)))


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
        ({"mu": EYE[0]}, r"arrays 'mu' and 'sigma', got \['mu'\]"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, r"got \['arr_0'\]; give a folder of images instead"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, r"'mu' to be floating point \(3,\), got float64 \(4,\)"),
        ({"mu": EYE[0], "sigma": EYE[0]}, r"'sigma' to be floating point \(3, 3\), got float64 \(3,\)"),
        ({"mu": np.zeros(3, np.int64), "sigma": EYE}, "got int64"),
        ({"mu": EYE[0], "sigma": np.full((3, 3), np.nan)}, "'sigma' holds NaN"),
        ({"mu": EYE[0], "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
    ],
)
def test_bad_references_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_statistics(path, 3)
    assert str(path) in str(caught.value)


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.npz", tmp_path / "marker"
    np.savez(path, mu=np.array([Payload(marker)] * 3, dtype=object), sigma=EYE)
    with pytest.raises(ValueError, match="got object"):
        load_statistics(path, 3)
    assert not marker.exists()


@pytest.mark.parametrize(("shape", "message"), [((1 << 40,), r"got float64 \(1099511627776,\)"), ((3,), "bad.npz")])
def test_headers_that_lie_about_their_content_are_refused(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    path, header = tmp_path / "bad.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", header.getvalue() + b"\0" * 8)  # one number, whatever the header says
    with pytest.raises(ValueError, match=message):
        load_statistics(path, 3)


def test_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    path.write_text("not a zip")
    with pytest.raises(ValueError, match="not a usable reference"):
        load_statistics(path, 3)
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "missing.npz", 3)


def _rank(
    rank: int, rendezvous: str, real: Tensor, fake: Tensor, given: bool, results: "torch.multiprocessing.Queue"
) -> None:
    """One of two processes; the second holds a third of the real images and no generated one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    metric = FrechetDistance(Table(torch.cat([real, fake])))
    n, cut = len(real), 2 * len(real) // 3
    if given:
        metric.set_real_statistics(FeatureStatistics(real.mean(0), real.T.cov()))
    else:
        metric.update(numbered(0, cut) if rank == 0 else numbered(cut, n), real=True)
    if rank == 0:
        metric.update(numbered(n, n + len(fake)), real=False)
    result = metric.compute()
    results.put((result.value, result.n_fake))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_two_processes_one_without_work_give_the_value_of_one(tmp_path: Path, given: bool) -> None:
    real, fake = normal(90, 8), normal(50, 8, seed=1) + 1
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "rendezvous"), real, fake, given, results)
    workers = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    values = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert values[0] == values[1]
    assert values[0] == (pytest.approx(distance(real, fake), rel=1e-12), 50)
