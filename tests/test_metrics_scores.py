"""Inception score, KID, precision and recall against their definitions; statistics summed over two processes.

Letters: N images, C classes, D features.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from iwin_dit.metrics import processes, two_sample
from iwin_dit.metrics.feature_table import FeatureTable
from iwin_dit.metrics.inception_score import InceptionScore
from iwin_dit.metrics.moments import Moments
from iwin_dit.metrics.two_sample import kernel_inception_distance, precision_recall


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- inception score


def score(logits: Tensor, chunk_size: int, batch: int = 4) -> tuple[float, float]:
    metric = InceptionScore(len(logits), logits.shape[1], chunk_size)
    for rows in torch.arange(len(logits)).split(batch):
        metric.update(logits[rows], rows.tolist())
    return metric.score()


def score_by_definition(logits: np.ndarray, chunk_size: int) -> tuple[float, float]:
    """ADM's evaluator: exp of the mean KL divergence from each chunk's own marginal."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, len(p), chunk_size):
        part = p[start : start + chunk_size]
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(axis=0))), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


@pytest.mark.parametrize("n", [15, 13, 5, 3], ids=["whole chunks", "shorter last", "one chunk", "less than one"])
def test_inception_score_is_its_definition(n: int) -> None:
    logits = 2 * normal(n, 7)
    assert score(logits, 5) == pytest.approx(score_by_definition(logits.numpy(), 5), rel=1e-12)


@pytest.mark.parametrize(("n", "chunks"), [(15, 3), (13, 3), (5, 1), (3, 1), (0, 0)])
def test_inception_score_says_over_how_many_chunks(n: int, chunks: int) -> None:
    assert InceptionScore(n, 7, 5).chunks == chunks


def test_inception_score_is_torch_fidelitys_where_the_chunks_agree() -> None:
    logits = 2 * normal(30, 1008)
    theirs = isc_features_to_metric(logits, splits=3, shuffle=False)
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"])
    assert score(logits, 10) == pytest.approx(expected, rel=1e-12)


def test_inception_score_at_its_ends() -> None:
    assert score(torch.zeros(8, 5), 8) == pytest.approx((1, 0), abs=1e-12)  # nothing is recognised
    certain = 1e4 * torch.eye(5).repeat(4, 1)  # probabilities of 0 and 1: every class as often
    assert score(certain, 10) == pytest.approx((5, 0), abs=1e-12)


def test_inception_score_knows_images_by_index() -> None:
    logits, order = normal(13, 7), torch.randperm(13, generator=torch.Generator().manual_seed(0))
    first, second = InceptionScore(13, 7, 5), InceptionScore(13, 7, 5)
    for metric, rows in ((first, order[:6]), (second, order[6:]), (second, order[:0])):
        metric.update(logits[rows], rows.tolist())
    first.add_state(load(save(second.state())))
    assert first.score() == pytest.approx(score(logits, 5, batch=13), rel=1e-12)
    assert score(logits[order], 5) != pytest.approx(score(logits, 5), rel=1e-3)


def test_inception_score_of_incomplete_or_bad_logits_is_refused() -> None:
    metric = InceptionScore(7, 3, 5)
    with pytest.raises(ValueError, match=r"indices in \[0, 7\), got 6 to 7"):
        metric.update(torch.zeros(2, 3), [6, 7])
    with pytest.raises(ValueError, match=r"expected logits \(2, 3\) of 2 images, got \(2, 4\)"):
        metric.update(torch.zeros(2, 4), [0, 1])
    metric.update(torch.zeros(6, 3), range(6))
    with pytest.raises(ValueError, match=r"expected 7 images in chunks of \[5, 2\], got \[5, 1\]"):
        metric.score()
    metric.update(torch.tensor([[0.0, torch.nan, 0.0]]), [6])
    with pytest.raises(ValueError, match="logits are not all finite"):
        metric.score()
    with pytest.raises(ValueError, match=r"expected seen \(2,\) of the inception score, got \(3,\)"):
        metric.add_state(InceptionScore(11, 3, 5).state())


# --- features by index


def test_a_table_holds_each_image_at_its_index() -> None:
    rows = normal(9, 4).float()
    first, second = FeatureTable(9, 4), FeatureTable(9, 4)
    first.update(rows[[5, 0, 7]], [5, 0, 7])
    second.update(rows[[8, 1, 2]].double(), [8, 1, 2])
    second.update(rows[[3, 4, 6]], [3, 4, 6])
    state = load(save(second.state()))
    assert state["features"].shape == (6, 4)
    first.add_state(state)
    assert torch.equal(first.features(), rows)


def test_a_table_wants_every_image_once() -> None:
    table = FeatureTable(5, 2)
    table.update(torch.zeros(3, 2), [0, 1, 4])
    with pytest.raises(ValueError, match=r"features of 5 images, 2 images \(2, 3\) did not come"):
        table.features()
    for twice in ([2, 4], [2, 2]):
        with pytest.raises(ValueError, match="came more often"):
            table.update(torch.zeros(2, 2), twice)
    with pytest.raises(ValueError, match=r"indices in \[0, 5\), got -1 to 3"):
        table.update(torch.zeros(2, 2), [-1, 3])
    with pytest.raises(ValueError, match=r"expected features \(1, 2\) of 1 images, got \(2, 2\)"):
        table.update(torch.zeros(2, 2), [3])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_table_names_the_images_whose_features_are_not_finite(value: float) -> None:
    table, rows = FeatureTable(2000, 2), torch.zeros(2000, 2)
    rows[1500, 1] = value
    table.update(rows, range(2000))
    with pytest.raises(ValueError, match=r"features of 1 images \(1500\) are not finite"):
        table.features()


# --- KID


def mmd_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    within = [sum(kernel(a, b) for a, b in itertools.permutations(s, 2)) / (len(s) * (len(s) - 1)) for s in (x, y)]
    return sum(within) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kid_of_whole_sets_is_the_unbiased_mmd() -> None:
    fake, real = normal(14, 6), 0.5 + normal(14, 6, seed=1)
    mean, std = kernel_inception_distance(fake, real, subsets=3)  # subsets of all 14 images
    assert mean == pytest.approx(mmd_by_definition(fake.numpy(), real.numpy()), rel=1e-10)
    assert std == pytest.approx(0, abs=1e-12)


def test_kid_is_the_mean_over_seeded_subsets() -> None:
    fake, real = normal(20, 6), 0.5 + normal(9, 6, seed=1)
    draws, values = np.random.RandomState(5), []
    for _ in range(4):
        x, y = (side.numpy()[draws.choice(len(side), 8, replace=False)] for side in (fake, real))
        values.append(mmd_by_definition(x, y))
    found = kernel_inception_distance(fake, real, subsets=4, subset_size=8, seed=5)
    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)


def test_kid_depends_on_its_seed_alone() -> None:
    fake, real = normal(30, 6), normal(40, 6, seed=1)
    np.random.seed(0)
    first = kernel_inception_distance(fake, real, subsets=5, subset_size=10, seed=1)
    np.random.seed(1)
    assert kernel_inception_distance(fake, real, subsets=5, subset_size=10, seed=1) == first
    assert kernel_inception_distance(fake, real, subsets=5, subset_size=10, seed=2) != first
    assert kernel_inception_distance(fake, real, subset_size=1000) == kernel_inception_distance(
        fake, real, subset_size=30
    )


def test_kid_in_float32_is_right_to_six_digits_after_the_point() -> None:
    fake, real = normal(200, 512).relu(), normal(200, 512, seed=1).relu()
    expected = kernel_inception_distance(fake, real, subsets=2)
    assert kernel_inception_distance(fake.float(), real.float(), subsets=2) == pytest.approx(expected, abs=1e-6)


# --- precision and recall


def coverage_by_definition(of: np.ndarray, by: np.ndarray, k: int) -> float:
    """Fraction of the vectors of `of` that lie in the ball to the k-th nearest other of some vector of `by`."""
    radii = [sorted(np.linalg.norm(a - b) for j, b in enumerate(by) if j != i)[k - 1] for i, a in enumerate(by)]
    return float(np.mean([any(np.linalg.norm(x - b) <= r for b, r in zip(by, radii, strict=True)) for x in of]))


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("block", [two_sample._BLOCK, 2000], ids=["one block", "blocks"])
def test_precision_and_recall_are_their_definitions(
    neighbours: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_sample, "_BLOCK", block)
    fake, real = 1.2 * normal(60, 4) + 1, normal(45, 4, seed=1)
    precision, recall = precision_recall(fake, real, neighbours=neighbours)
    assert precision == pytest.approx(coverage_by_definition(fake.numpy(), real.numpy(), neighbours), abs=1e-6)
    assert recall == pytest.approx(coverage_by_definition(real.numpy(), fake.numpy(), neighbours), abs=1e-6)
    assert 0 < precision < 1
    assert 0 < recall < 1
    assert recall != pytest.approx(precision, abs=0.05)  # so that neither passes for the other


def test_a_collapsed_model_is_precise_but_recalls_little() -> None:
    real = normal(100, 2)
    fake = 0.01 * normal(100, 2, seed=1)
    precision, recall = precision_recall(fake, real)
    assert precision == 1
    assert recall < 0.1


# --- what both refuse


@pytest.mark.parametrize("metric", [kernel_inception_distance, precision_recall])
def test_features_that_no_metric_compares_are_refused(metric) -> None:
    good, bad = normal(10, 4), normal(10, 4)
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"at least \d images on each side, got 10 fake, 1 real"):
        metric(good, good[:1])
    with pytest.raises(ValueError, match="the same D"):
        metric(good, good[:, :3])
    for fake, real in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="not all finite"):
            metric(fake, real)


def test_a_ball_needs_its_neighbours() -> None:
    with pytest.raises(ValueError, match="at least 4 images on each side, got 10 fake, 3 real"):
        precision_recall(normal(10, 4), normal(3, 4), neighbours=3)
    assert precision_recall(normal(4, 4), normal(4, 4), neighbours=3) == (1, 1)


@pytest.mark.parametrize(
    ("metric", "module"), [(kernel_inception_distance, "metric_kid"), (precision_recall, "metric_prc")]
)
def test_without_torch_fidelity_the_error_names_the_extra(metric, module: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, f"torch_fidelity.{module}", None)  # importing it fails
    with pytest.raises(ImportError, match=r'pip install "iwin-dit\[eval\]"'):
        metric(normal(10, 4), normal(10, 4))


# --- processes

ROWS = 11 + normal(90, 7)
CUTS = {"uneven": 61, "empty": 90}  # images of rank 0; the second process has the rest, or none


def observed(rows: range, reduce: bool) -> dict[str, Tensor]:
    """All statistics of some of ROWS, or of all processes'."""
    statistics = {"moments": Moments(7), "score": InceptionScore(90, 7, 40), "table": FeatureTable(90, 7)}
    for part in (rows[i : i + 8] for i in range(0, len(rows), 8)):
        for each in statistics.values():
            each.update(ROWS[list(part)], part)
    for each in statistics.values():
        if reduce:
            each.reduce()
    return {f"{name}.{key}": value for name, each in statistics.items() for key, value in each.state().items()}


def _rank(rank: int, folder: Path) -> None:
    """One of two processes: writes what it has found to a file of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, cut in CUTS.items():
        states = observed(range(cut) if rank == 0 else range(cut, 90), reduce=True)
        found |= {f"{name}.{key}": value for key, value in states.items()}
    assert (processes.rank(), processes.world_size()) == (rank, 2)
    assert processes.from_main({"from": rank}) == {"from": 0}
    assert processes.gather(f"rank {rank}") == ["rank 0", "rank 1"]
    assert [processes.agree(status) for status in (rank, 1 - rank, -3)] == [1, 1, -3]
    number = torch.tensor(1 << 40)
    assert processes.sum_over_processes(number) is number
    assert number == 1 << 41
    save_file(found, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_one_perhaps_empty_find_what_one_finds(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = observed(range(90), reduce=False)
    for name in CUTS:
        for key, expected in alone.items():
            assert torch.equal(first[f"{name}.{key}"], second[f"{name}.{key}"]), (name, key)
            exact = 0.0 if key.startswith("table") or not expected.is_floating_point() else 1e-12
            scale = expected.double().abs().max().item()
            torch.testing.assert_close(first[f"{name}.{key}"], expected, rtol=0, atol=exact * scale)


def test_alone_nothing_is_sent() -> None:
    tensor = torch.ones(3)
    assert (processes.rank(), processes.world_size()) == (0, 1)
    assert processes.sum_over_processes(tensor) is tensor
    assert processes.from_main("value") == "value"
    assert processes.gather("value") == ["value"]
    assert processes.agree(-2) == -2
    state = observed(range(90), reduce=False)
    assert all(torch.equal(state[key], value) for key, value in observed(range(90), reduce=True).items())
