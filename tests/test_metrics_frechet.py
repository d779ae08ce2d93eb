"""The Frechet distance against closed forms, an independent oracle and torchmetrics; the statistics however they come.

Letters: D features, N vectors of a set.
"""

import itertools
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iwin_dit.metrics.frechet import frechet_distance
from iwin_dit.metrics.moments import Gaussian, Moments

D = 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(seed: int) -> Tensor:
    """A random rotation of D axes."""
    return torch.linalg.qr(normal(D, D, seed=seed))[0]


def around(covariance: Tensor, mean: Tensor | None = None) -> Gaussian:
    return Gaussian(torch.zeros(len(covariance), dtype=torch.float64) if mean is None else mean, covariance)


def moments(rows: Tensor, batch: int = 1000) -> Moments:
    result = Moments(rows.shape[1])
    for part in rows.split(batch):
        result.update(part)
    return result


def distance(real: Tensor, fake: Tensor, batch: int = 1000) -> float:
    return frechet_distance(moments(real, batch).gaussian(), moments(fake, batch).gaussian())


def oracle(a: Tensor, b: Tensor) -> float:
    """The distance without any D x D matrix: tr sqrt(S1 S2) is the nuclear norm of A0 B0^T / sqrt((n-1)(m-1))."""
    a0, b0 = a - a.mean(0), b - b.mean(0)
    trace = a0.square().sum() / (len(a) - 1) + b0.square().sum() / (len(b) - 1)
    cross = torch.linalg.matrix_norm(a0 @ b0.T, "nuc") / ((len(a) - 1) * (len(b) - 1)) ** 0.5
    return ((a.mean(0) - b.mean(0)).square().sum() + trace - 2 * cross).item()


# --- closed forms


def test_mean_shift_is_its_squared_length() -> None:
    eye, shift = torch.eye(D, dtype=torch.float64), torch.full((D,), 0.5, dtype=torch.float64)
    assert frechet_distance(around(eye), around(eye, shift)) == pytest.approx(D * 0.25, rel=1e-12)


@pytest.mark.parametrize("rotated", [False, True])
def test_commuting_covariances(rotated: bool) -> None:
    a, b = uniform(D) + 0.1, uniform(D, seed=1) + 0.1
    q = basis(2) if rotated else torch.eye(D, dtype=torch.float64)
    value = frechet_distance(around(q * a @ q.T), around(q * b @ q.T))
    assert value == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-11)


def test_two_by_two_matrices_that_do_not_commute() -> None:
    S1 = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    S2 = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    P = S1 @ S2
    expected = S1.trace() + S2.trace() - 2 * (P.trace() + 2 * P.det().sqrt()).sqrt()
    assert frechet_distance(around(S1), around(S2)) == pytest.approx(expected.item(), rel=1e-13)


def test_spectra_over_twelve_decades() -> None:
    a = torch.logspace(-12, 0, D, dtype=torch.float64)
    b, q = a.flip(0), basis(0)
    value = frechet_distance(around(q * a @ q.T), around(q * b @ q.T))
    assert value == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-6)


def test_disjoint_supports_add_up() -> None:
    a, b, shift = normal(D).square(), normal(D, seed=1).square(), normal(D, seed=2)
    a[: D // 2], b[D // 2 :] = 0, 0
    expected = a.sum() + b.sum() + shift.square().sum()
    assert frechet_distance(around(a.diag()), around(b.diag(), shift)) == pytest.approx(expected.item(), rel=1e-12)


def test_without_covariance_it_is_the_distance_of_the_means() -> None:
    zero, shift = torch.zeros(D, D, dtype=torch.float64), normal(D)
    assert frechet_distance(around(zero), around(zero, shift)) == pytest.approx(shift.square().sum().item(), rel=1e-13)
    assert frechet_distance(around(zero), around(zero)) == 0


# --- the oracle


@pytest.mark.parametrize(("n", "rel"), [(4 * D, 1e-11), (D // 8, 1e-6)], ids=["full rank", "rank-deficient"])
def test_agrees_with_the_nuclear_norm_oracle(n: int, rel: float) -> None:
    real, fake = normal(n, D), 0.3 + 1.5 * normal(n + 3, D, seed=1) @ basis(2)
    assert distance(real, fake) == pytest.approx(oracle(real, fake), rel=rel)


@pytest.mark.parametrize("n", [4 * D, D // 8])
def test_scale_comes_out_squared(n: int) -> None:
    real, fake = normal(n, D), 1 + normal(n, D, seed=1)
    assert distance(1e6 * real, 1e6 * fake) == pytest.approx(1e12 * oracle(real, fake), rel=1e-6)


def test_statistics_stored_as_float32_are_decomposed_in_float64() -> None:
    real, fake = normal(D // 8, D), 1 + normal(D // 8, D, seed=1)
    stored = [Gaussian(g.mean.float(), g.covariance.float()) for g in (moments(x).gaussian() for x in (real, fake))]
    assert frechet_distance(*stored) == pytest.approx(oracle(real, fake), rel=1e-3)


@pytest.mark.parametrize("n", [4 * D, D // 8])
def test_a_set_against_itself_is_zero_but_for_rounding(n: int) -> None:
    rows = 10 * normal(n, D)
    assert -1e-3 <= distance(rows, rows) <= 1e-9


def test_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Table(torch.nn.Module):
        """Features by row number, which an image carries in its first byte: any vector without any network."""

        num_features = 16

        def forward(self, images: Tensor) -> Tensor:
            return rows[images[:, 0, 0, 0].long()]

    rows = torch.cat([normal(128, 16), 0.2 + normal(128, 16, seed=1).exp()])
    numbered = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    metric = FrechetInceptionDistance(feature=Table())
    metric.update(numbered[:128], real=True)
    metric.update(numbered[128:], real=False)
    assert distance(rows[:128], rows[128:]) == pytest.approx(metric.compute().item(), rel=1e-6)


# --- what must not matter


def test_it_is_symmetric_and_blind_to_a_common_rotation() -> None:
    real, fake, q = normal(3 * D, D), normal(2 * D, D, seed=1).exp(), basis(2)
    value = distance(real, fake)
    assert distance(fake, real) == pytest.approx(value, rel=1e-11)
    assert distance(real @ q, fake @ q) == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_a_constant_far_above_the_deviations_does_not_matter(batch: int) -> None:
    real, fake = normal(300, 8), 0.2 + normal(301, 8, seed=1)
    assert distance(1e4 + real, 1e4 + fake, batch) == pytest.approx(distance(real, fake), rel=1e-9)


def close(result: Moments, rows: Tensor) -> None:
    """Statistics are those that numpy finds in all rows at once, to 1e-12 of the largest number in them."""
    found, mean = result.gaussian(), rows.mean(0).numpy()
    covariance = np.cov(rows.numpy(), rowvar=False)
    assert result.count == len(rows)
    np.testing.assert_allclose(found.mean, mean, rtol=0, atol=1e-12 * np.abs(mean).max())
    np.testing.assert_allclose(found.covariance, covariance, rtol=0, atol=1e-12 * np.abs(covariance).max())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(24)),
    cuts=st.lists(st.integers(0, 24), max_size=6),
    parts=st.integers(1, 3),
    data=st.data(),
)
def test_any_order_batches_and_attempts_give_the_statistics_of_one_shot(
    order: Sequence[int], cuts: list[int], parts: int, data: st.DataObject
) -> None:
    rows = 3 + normal(24, 5)
    sides = [Moments(5) for _ in range(parts)]  # some may see nothing
    edges = [0, *sorted(cuts), 24]
    for start, stop in itertools.pairwise(edges):  # batches, some of them empty
        data.draw(st.sampled_from(sides)).update(rows[list(order[start:stop])], order[start:stop])
    merged = Moments(5)
    for side in sides:
        merged.add_state(load(save(side.state())))  # through the bytes of a safetensors file
    close(merged, rows)


def test_a_state_restores_the_statistics_bit_for_bit_and_shares_nothing() -> None:
    first = moments(normal(20, 4))
    state, second = first.state(), Moments(4)
    second.add_state(state)
    assert second.count == 20
    assert torch.equal(second.mean, first.mean)
    assert torch.equal(second.scatter, first.scatter)
    first.update(normal(20, 4, seed=1))
    second.add_state(state)
    assert state["count"] == 20
    assert torch.equal(second.mean, state["mean"])
    assert torch.equal(second.scatter, 2 * state["scatter"])


def test_features_of_lower_precision_are_summed_in_float64() -> None:
    rows = 100 + normal(500, 4).float()
    close(moments(rows, batch=13), rows.double())


def test_the_biased_covariance_divides_by_the_count() -> None:
    statistics = moments(normal(10, 4))
    biased, unbiased = statistics.gaussian(unbiased=False), statistics.gaussian()
    torch.testing.assert_close(biased.covariance, 0.9 * unbiased.covariance, rtol=1e-14, atol=0)
    assert torch.equal(biased.mean, unbiased.mean)


class LiveMemory(TorchDispatchMode):
    """Notes the most bytes that results of torch's operations hold at once; what LAPACK takes inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._results = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        known = {pointer for _, pointer, _ in self._results}
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() in known or storage.data_ptr() not in given:  # else of the caller
                self._results.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
        self._results = [entry for entry in self._results if entry[0]() is not None]
        self.peak = max(self.peak, sum({pointer: size for _, pointer, size in self._results}.values()))
        return result


def test_few_matrices_live_at_once() -> None:
    wide = 600
    statistics, matrix = moments(normal(700, wide)), wide**2 * 8
    with LiveMemory() as live:
        gaussian = statistics.gaussian()
    assert matrix <= live.peak < 1.05 * matrix
    with LiveMemory() as live:
        assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-6)
    assert matrix <= live.peak < 2.5 * matrix


# --- what is refused


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite_are_refused_before_any_decomposition(value: float) -> None:
    good, shift = around(torch.eye(D, dtype=torch.float64)), torch.zeros(D, dtype=torch.float64)
    shift[3] = value
    for bad in (around(good.covariance, shift), around(good.covariance + shift.diag())):
        with pytest.raises(ValueError, match="of the real images are not all finite"):
            frechet_distance(bad, good)
        with pytest.raises(ValueError, match="of the generated images are not all finite"):
            frechet_distance(good, bad)


def test_statistics_of_other_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same D on both sides, got \[\(3,\), \(3, 3\), \(4,\), \(4, 4\)\]"):
        frechet_distance(around(torch.eye(3)), around(torch.eye(4)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_have_no_statistics(value: float) -> None:
    rows = normal(8, 4)
    rows[7, 2] = value
    with pytest.raises(ValueError, match="features are not all finite"):
        moments(rows, batch=3).gaussian()


def test_one_image_has_no_covariance() -> None:
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 images, got {n}"):
            moments(normal(n, 4)).gaussian()


def test_features_of_another_network_are_refused() -> None:
    statistics = moments(normal(8, 4))
    with pytest.raises(ValueError, match=r"expected features \(B, 4\), got \(8, 5\)"):
        statistics.update(normal(8, 5))
    with pytest.raises(ValueError, match=r"expected statistics of 4 features, got a scatter of \(5, 5\)"):
        statistics.add_state(moments(normal(8, 5)).state())
