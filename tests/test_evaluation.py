"""The evaluation engine: values against direct computation, processes, restarts, floors, and what must not pass."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from iwin_dit.data.clips import ClipSettings
from iwin_dit.data.sources import keyed_permutation
from iwin_dit.evaluation import networks as networks_file
from iwin_dit.evaluation.evaluator import EvaluationError, Evaluator, Measurement, Request
from iwin_dit.evaluation.networks import open_networks
from iwin_dit.evaluation.partial import Partial, differences
from iwin_dit.evaluation.passes import run_pass
from iwin_dit.evaluation.real import RealSide
from iwin_dit.evaluation.suite import (
    METRICS,
    Real,
    Side,
    check_metrics,
    compute,
    kept_bytes,
    reported_names,
    shortfall,
)
from iwin_dit.evaluation.videos import Cut, VideoFiles
from iwin_dit.metrics.digits import DigitsFeatures
from iwin_dit.metrics.images import ImageTensor
from iwin_dit.metrics.moments import Gaussian
from iwin_dit.metrics.network import FeatureNetwork
from iwin_dit.metrics.reference import save_reference
from iwin_dit.metrics.result import environment
from iwin_dit.metrics.two_sample import kernel_inception_distance, precision_recall

WIDTHS = {"pool": 6, "spatial": 5, "logits": 4}
ALL = ("fid", "sfid", "is", "kid", "pr")
CUT = Cut(ClipSettings(2, frame_stride=3))
SIZE = 4  # pixels


class Linear(FeatureNetwork):
    """Seeded linear maps of the pixels under the names of the Inception's features."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = dict(WIDTHS)
        generator = torch.Generator().manual_seed(0)
        # Small integers, so that float32 is exact and a batch's size plays no part.
        maps = {name: torch.randint(-8, 9, (3 * SIZE**2, D), generator=generator).float() for name, D in WIDTHS.items()}
        self.maps = nn.ParameterDict(maps).requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8
        return {name: images.float().flatten(1) @ weights / 4096 for name, weights in self.maps.items()}

    def describe(self) -> dict[str, Any]:
        return {"name": "inception", "protocol": "adm", "weights_sha256": "0" * 64}


NETWORKS = {"inception": Linear()}


def pixels(count: int, seed: int, top: int = 256) -> Tensor:
    return torch.randint(0, top, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


REAL, FAKE = pixels(60, 1), pixels(41, 2, top=200)


class Failing(ImageTensor):
    """Images of which some cannot be read, in one process of those that read them."""

    def __init__(self, images: Tensor, bad: int, action: Callable[[], None]) -> None:
        super().__init__(images, "failing")
        self.prefetch, self.bad, self.action = False, bad, action

    def read(self, indices: Sequence[int]) -> Tensor:
        if self.bad in indices:
            self.action()
        return super().read(indices)


class Sampled(ImageTensor):
    """Images that are not read ahead, as samples are not."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images, "sampled")
        self.prefetch, self.asked = False, []

    def read(self, indices: Sequence[int]) -> Tensor:
        assert all(type(index) is int for index in indices)  # generators are seeded by them
        self.asked += indices
        return super().read(indices)


class Single(ImageTensor):
    """A set of one image."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images, "single")

    def __len__(self) -> int:
        return 1


def nan() -> None:
    raise FloatingPointError("NaN pixels")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return write_images(tmp_path / "real.npz", REAL)


def write_images(path: Path, images: Tensor) -> str:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy())
    return str(path)


def write_statistics(path: Path, provenance: dict[str, Any] | None, images: Tensor | None = None) -> str:
    """A reference file with the statistics of REAL; without provenance as ADM writes them."""
    mean_and_covariance = statistics(REAL)
    array = None if images is None else images.permute(0, 2, 3, 1).numpy()
    if provenance is not None:
        both = ("pool", "spatial")
        gaussians = {name: Gaussian(*map(torch.from_numpy, mean_and_covariance[name])) for name in both}
        save_reference(path, gaussians, provenance, array)
        return str(path)
    arrays = {} if array is None else {"arr_0": array}
    (mu, sigma), (mu_s, sigma_s) = mean_and_covariance["pool"], mean_and_covariance["spatial"]
    np.savez(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, **arrays)
    return str(path)


def evaluator(reference: str | None, metrics: Sequence[str] = ALL, **settings: Any) -> Evaluator:
    settings = {"batch_size": 7, **settings}
    return Evaluator(Request(tuple(metrics), reference, **settings), networks=NETWORKS)


def measure(reference: str | None, images: Tensor = FAKE, metrics: Sequence[str] = ALL, **settings: Any) -> Measurement:
    measurement = evaluator(reference, metrics, **settings).measure(ImageTensor(images, "images"), progress=False)
    assert measurement is not None
    return measurement


def values(measurement: Measurement) -> dict[str, float]:
    return {name: entry["value"] for name, entry in measurement.values.items()}


# --- direct computation


def features(images: Tensor) -> dict[str, np.ndarray]:
    return {name: rows.double().numpy() for name, rows in NETWORKS["inception"](images).items()}


def statistics(images: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (rows.mean(0), np.cov(rows, rowvar=False)) for name, rows in features(images).items()}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the eigenvalues of the product, which is not symmetric."""
    (m1, S1), (m2, S2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    cross = np.sqrt(np.maximum(np.linalg.eigvals(S1 @ S2).real, 0)).sum()
    return float(((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * cross)


def inception_score(logits: np.ndarray) -> float:
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return math.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def direct(real: Tensor, fake: Tensor) -> dict[str, float]:
    a, b, n = features(real), features(fake), len(fake)
    pools = [torch.from_numpy(rows["pool"]).float() for rows in (b, a)]
    precision, recall = precision_recall(*pools)
    return {
        f"fid_{n}": frechet(a["pool"], b["pool"]),
        f"sfid_{n}": frechet(a["spatial"], b["spatial"]),
        f"is_{n}": inception_score(b["logits"]),
        f"kid_{n}": kernel_inception_distance(*pools)[0],
        f"precision_{n}": precision,
        f"recall_{n}": recall,
    }


def test_every_value_is_that_of_direct_computation(reference: str) -> None:
    measurement = measure(reference)
    assert values(measurement) == pytest.approx(direct(REAL, FAKE), rel=1e-9)
    assert (measurement.n_fake, measurement.n_real) == (41, 60)
    assert measurement.images_per_second == pytest.approx(41 / measurement.seconds)


def test_the_record_says_what_the_values_depend_on(reference: str) -> None:
    measurement = measure(reference, batch_size=9, seed=5)
    record = json.loads(json.dumps(measurement.record, allow_nan=False))
    assert record["protocol"] == "adm"
    assert record["features"]["inception"] == {**NETWORKS["inception"].describe(), "widths": WIDTHS}
    assert record["statistics"] == {
        "dtype": "float64",
        "covariance": {"fid": "over n - 1", "sfid": "over n - 1"},
        "seed": 5,
    }
    assert (record["reference"]["path"], record["reference"]["n"]) == (reference, 60)
    assert len(record["reference"]["sha256"]) == 64
    assert record["reference"]["floor"] == {"n": 30, "against": 30}
    assert record["generated"]["n"] == 41
    assert record["generated"]["image_size"] == record["reference"]["image_size"] == [SIZE, SIZE]
    assert (record["run"]["processes"], record["run"]["batch_size"], record["run"]["device"]) == (1, 9, "cpu")
    assert measurement.values["kid_41"].keys() == {"value", "subsets", "subset_size", "seed"}  # all 41 in each: no std
    assert measurement.values["kid_41"]["subset_size"] == 41
    assert measurement.values["precision_41"] == {"value": pytest.approx(1, abs=1), "neighbours": 3, "n_real": 60}
    assert measurement.values["is_41"].keys() == {"value", "chunk", "chunks"}  # a single chunk has no deviation
    assert (measurement.values["is_41"]["chunk"], measurement.values["is_41"]["chunks"]) == (5000, 1)
    assert record["reference"]["images"] == {"n": 60, "of": 60}


def adm_inception_score(logits: np.ndarray) -> list[float]:
    """As in ADM's evaluator: chunks of 5000 consecutive images, of which the last may be shorter."""
    preds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for i in range(0, len(preds), 5000):
        part = preds[i : i + 5000]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(math.exp(np.mean(np.sum(kl, 1))))
    return scores


def test_the_chunks_of_the_inception_score_are_those_of_adm() -> None:
    images = torch.cat([pixels(5000, 1), pixels(7, 2, top=100)])
    entry = measure(None, images, ["is"], batch_size=999).values["is_5007"]
    chunks = adm_inception_score(features(images)["logits"])
    assert len(chunks) == entry["chunks"] == 2
    assert (entry["value"], entry["std"]) == pytest.approx((np.mean(chunks), np.std(chunks)), rel=1e-9)
    assert abs(entry["value"] / inception_score(features(images)["logits"]) - 1) > 1e-3  # which one chunk would give


@pytest.mark.slow
def test_kid_is_of_a_hundred_seeded_subsets_of_a_thousand(tmp_path: Path) -> None:
    real, fake = pixels(1300, 1), pixels(1200, 2, top=200)
    path = write_images(tmp_path / "real.npz", real)
    found = [measure(path, fake, ["kid"], batch_size=500, seed=seed).values["kid_1200"] for seed in (0, 7)]
    pools = [NETWORKS["inception"](images)["pool"] for images in (fake, real)]
    for seed, entry in zip((0, 7), found, strict=True):
        value, std = kernel_inception_distance(*pools, subsets=100, subset_size=1000, seed=seed)
        assert entry == {
            "value": pytest.approx(value, rel=1e-5),
            "std": pytest.approx(std, rel=1e-5),
            "subsets": 100,
            "subset_size": 1000,
            "seed": seed,
        }
    assert found[0]["value"] != found[1]["value"]


@pytest.mark.slow
def test_of_many_real_images_ten_thousand_are_kept(tmp_path: Path) -> None:
    real = torch.cat([pixels(5030, 1), pixels(5030, 2, top=100)])
    path, statistics_too = write_images(tmp_path / "real.npz", real), write_statistics(tmp_path / "adm.npz", None, real)
    seeds = (0, 0, 1)
    engines = [evaluator(path, ["fid", "kid"], batch_size=1000, seed=seed) for seed in seeds]
    engines.append(evaluator(statistics_too, ["fid", "kid"], batch_size=1000))
    tables = []
    for engine in engines:
        assert engine.prepare(41, progress=False)
        tables.append(engine._real.real.tables["kid"])
        assert len(tables[-1]) == 10_000
    rows = NETWORKS["inception"](real)["pool"]
    order = np.sort(keyed_permutation(10_060, 0, 1)[:10_000])
    assert all(torch.equal(table, rows[order]) for table in (*tables[:2], tables[3]))
    assert not torch.equal(tables[2], tables[0])
    measurement = engines[0].measure(ImageTensor(FAKE, "images"), progress=False)
    assert measurement is not None
    assert measurement.values["fid_41"]["value"] == pytest.approx(direct(real, FAKE)["fid_41"], rel=1e-9)  # of all
    assert measurement.n_real == measurement.record["reference"]["n"] == 10_060
    assert measurement.record["reference"]["images"] == {"n": 10_000, "of": 10_060}
    assert evaluator(path, ["pr"]).kept_bytes(300) == 4 * 6 * (300 + 10_000)
    assert evaluator(path, ["fid"]).kept_bytes(300) == 2 * 8 * 6 * 7


def test_a_value_below_zero_by_more_than_rounding_is_an_error() -> None:
    """A covariance of a reference may have negative eigenvalues, though its entries look well."""
    side = Side(["fid"], NETWORKS, 41, "cpu", real=False)
    side.update(FAKE, range(41))
    mean, covariance = (torch.from_numpy(part) for part in statistics(FAKE)["pool"])
    values, vectors = torch.linalg.eigh(covariance)
    values[0] = -values[-1] / 2
    real = Real({"fid": Gaussian(mean, vectors * values @ vectors.T)}, {}, {})
    with pytest.raises(ValueError, match=r"fid comes out as -.*, which is no rounding"):
        compute(["fid"], side, real)


def test_batches_order_and_reading_ahead_play_no_part(reference: str) -> None:
    expected = values(measure(reference))
    assert values(measure(reference, batch_size=1)) == pytest.approx(expected, rel=1e-10)
    assert values(measure(reference, batch_size=100)) == pytest.approx(expected, rel=1e-10)
    sampled = Sampled(FAKE)
    measurement = evaluator(reference).measure(sampled, progress=False)
    assert measurement is not None
    assert values(measurement) == pytest.approx(expected, rel=1e-10)
    assert sampled.asked == list(range(41))


def test_a_set_against_itself_is_zero_and_keeps_its_raw_value(reference: str) -> None:
    entry = measure(reference, REAL, ["fid"]).values["fid_60"]
    assert entry["value"] == max(entry["raw"], 0) < 1e-6


def test_one_evaluator_measures_many_sets(reference: str) -> None:
    engine = evaluator(reference, ["fid", "pr"])
    engine.prepare(41, progress=False)
    for images in (FAKE, pixels(41, 3), pixels(20, 4)):
        measurement = engine.measure(ImageTensor(images, "images"), progress=False)
        assert measurement is not None
        expected = {k: v for k, v in direct(REAL, images).items() if k.split("_")[0] in ("fid", "precision", "recall")}
        assert values(measurement) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n_fake", "n"), [(20, 20), (41, 30), (60, 30)])
def test_the_floor_is_real_images_against_the_others(reference: str, n_fake: int, n: int) -> None:
    entry = measure(reference, pixels(n_fake, 2), ["fid"]).values[f"fid_{n_fake}"]
    assert (entry["floor"]["n"], entry["floor"]["against"]) == (n, 60 - n)
    rows = features(REAL)["pool"]
    again = measure(reference, pixels(n_fake, 3), ["fid"]).values[f"fid_{n_fake}"]["floor"]
    other = measure(reference, pixels(n_fake, 3), ["fid"], seed=1).values[f"fid_{n_fake}"]["floor"]
    assert again == entry["floor"] != other
    order = keyed_permutation(60, 0)
    assert entry["floor"]["value"] == pytest.approx(frechet(rows[order[n:]], rows[order[:n]]), rel=1e-9)


def test_too_few_real_images_have_no_floor(tmp_path: Path) -> None:
    measurement = measure(write_images(tmp_path / "three.npz", REAL[:3]), metrics=["fid"])
    assert "floor" not in measurement.values["fid_41"]
    assert measurement.record["reference"]["floor"] is None


# --- references


def test_what_is_known_of_a_reference_beforehand(reference: str, tmp_path: Path) -> None:
    bare = write_statistics(tmp_path / "bare.npz", None)
    adm = write_statistics(tmp_path / "adm.npz", None, REAL)
    provenance = {"features": {"inception": NETWORKS["inception"].describe()}, "n": 60, "image_size": [SIZE, SIZE]}
    ours = write_statistics(tmp_path / "ours.npz", provenance)
    kind, size = "statistics", [SIZE, SIZE]
    cases = [
        (reference, ["fid", "pr"], {"kind": "images", "n": 60, "image_size": size, "protocol": "adm"}),
        (bare, ["fid"], {"kind": kind, "n": None, "image_size": None, "protocol": "not stated"}),
        (adm, ["fid", "pr"], {"kind": kind, "n": None, "image_size": size, "protocol": "not stated"}),
        (ours, ["fid"], {"kind": kind, "n": 60, "image_size": size, "protocol": "adm"}),
        (None, ["is"], {"kind": None, "n": None, "image_size": None, "protocol": None}),
    ]
    for path, metrics, expected in cases:
        assert evaluator(path, metrics).about_reference() == expected


def test_a_large_folder_of_real_images_has_a_hint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_images(tmp_path / "many.npz", torch.zeros(50_001, 3, SIZE, SIZE, dtype=torch.uint8))
    with caplog.at_level(logging.INFO):
        evaluator(path, ["kid"])  # of which it would measure 10,000
        assert "evaluate_fid.py" not in caplog.text
        evaluator(path, ["fid"])
    assert "50001 images" in caplog.text
    assert "`evaluate_fid.py reference` makes a file" in caplog.text


def test_a_file_of_statistics_gives_the_value_of_its_images(reference: str, tmp_path: Path) -> None:
    by_images = measure(reference)
    path = write_statistics(tmp_path / "adm.npz", None, REAL)
    measurement = measure(path)
    assert values(measurement) == pytest.approx(values(by_images), rel=1e-9)
    assert measurement.n_real is None
    record = measurement.record["reference"]
    assert (record["kind"], record["protocol"], record["provenance"]) == ("statistics", "not stated", None)
    assert record["images"] == {"n": 60, "of": 60, "image_size": [SIZE, SIZE]}
    assert measurement.values["precision_41"]["n_real"] == 60


def test_provenance_is_recorded_and_checked(tmp_path: Path) -> None:
    made_with = NETWORKS["inception"].describe()
    floor = {"pool": {"value": 0.5, "n": 30, "against": 30}}
    provenance = {"features": {"inception": made_with}, "n": 60, "source": "here", "floor": floor}
    measurement = measure(write_statistics(tmp_path / "ours.npz", provenance), metrics=["fid"])
    assert measurement.n_real == 60
    assert measurement.values["fid_41"]["floor"] == floor["pool"]
    assert measurement.record["reference"]["protocol"] == "adm"
    assert measurement.record["reference"]["provenance"] == provenance
    for key, other in (("protocol", "clean"), ("weights_sha256", "1" * 64)):
        path = write_statistics(
            tmp_path / "other.npz", {**provenance, "features": {"inception": {**made_with, key: other}}}
        )
        with pytest.raises(ValueError, match=key):
            evaluator(path, ["fid"])


def test_references_that_do_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    statistics_alone = write_statistics(tmp_path / "statistics.npz", None)
    cases = [
        (None, ["fid", "is"], "fid compare with real images: expected a reference, got none"),
        (statistics_alone, ["fid", "kid", "pr"], "kid and pr compare with real images, and .* has statistics alone"),
        (str(tmp_path / "missing"), ["fid"], "got .*missing: no such file"),
        ("digits", ["fvd"], "expected a folder of clips"),
        ("moving_digits", ["fid"], "moving_digits compares with itself alone"),
        ("digits", ["moving_digits"], "moving_digits compares with itself alone"),
    ]
    for name, metrics, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            RealSide(
                name,
                metrics,
                {**NETWORKS, "i3d": NETWORKS["inception"], "motion": NETWORKS["inception"]},
                "cpu",
                batch_size=5,
                seed=0,
                cut=Cut(),
            )


def test_the_inception_score_needs_no_reference() -> None:
    measurement = measure(None, metrics=["is"])
    assert values(measurement) == pytest.approx({"is_41": direct(REAL, FAKE)["is_41"]}, rel=1e-9)
    assert measurement.n_real is None
    assert measurement.record["reference"] is None


def test_the_digits_and_their_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DigitsFeatures().save(networks_file.CLASSIFIER, {})
    engine = Evaluator(Request(("frechet_digits",), "digits"))
    measurement = engine.measure(ImageTensor(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), "black"), progress=False)
    assert measurement is not None
    entry = measurement.values["frechet_digits"]
    assert entry["value"] > entry["floor"]["value"] > 0
    assert (entry["floor"]["n"], entry["floor"]["against"], measurement.n_real) == (20, 1777, 1797)
    assert measurement.record["protocol"] is None


class Clips(FeatureNetwork):
    """Linear features of clips, under the name of I3D's."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = {"i3d": 6}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        B, T, C, H, W = images.shape
        return {"i3d": NETWORKS["inception"](images.reshape(B * T, C, H, W))["pool"].reshape(B, T, -1).sum(1)}

    def describe(self) -> dict[str, Any]:
        return {"name": "i3d"}


def write_clips(folder: Path) -> Tensor:
    """Clips of 4 frames, each a folder."""
    clips = REAL[:48].view(12, 4, 3, SIZE, SIZE)
    for i, clip in enumerate(clips):
        (folder / f"clip{i:02}").mkdir()
        for t, frame in enumerate(clip):
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"clip{i:02}" / f"{t}.png")
    return clips


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut(ClipSettings(2)), "of 2 frames at stride 3, as the reference's, got 2 frames at stride 1 in"),
        (Cut(ClipSettings(1, frame_stride=3)), "of 2 frames, got 1 in"),
        (Cut(ClipSettings(2, frame_stride=3), 2), "got 2 frames at stride 3, cropped to 2 x 2 in"),
        (Cut(ClipSettings(2, 1, 3)), "got 2 frames at stride 3 of 1 a second in"),
    ],
)
def test_clips_cut_otherwise_than_the_reference_are_refused(tmp_path: Path, cut: Cut, message: str) -> None:
    write_clips(tmp_path)
    engine = Evaluator(Request(("fvd",), str(tmp_path), cut=CUT), networks={"i3d": Clips()})
    fake = VideoFiles(tmp_path, cut)
    for clip in fake.paths:  # which are not read before it is refused
        clip.rename(clip.with_name(f"moved-{clip.name}"))
    with pytest.raises(ValueError, match=f"expected clips .*{message}"):
        engine.measure(fake, progress=False)


def test_clips_are_compared_by_covariances_over_n(tmp_path: Path) -> None:
    clips = write_clips(tmp_path)
    engine = Evaluator(Request(("fvd",), str(tmp_path), cut=CUT), networks={"i3d": Clips()})
    fake = FAKE[:40].view(20, 2, 3, SIZE, SIZE)
    measurement = engine.measure(ImageTensor(fake, "clips"), progress=False)
    assert measurement is not None
    rows = [Clips()(part)["i3d"].double().numpy() for part in (clips[:, ::3], fake)]
    m1, m2, S1, S2 = *(x.mean(0) for x in rows), *(np.cov(x, rowvar=False, ddof=0) for x in rows)
    cross = np.sqrt(np.linalg.eigvals(S1 @ S2).real).sum()
    expected = ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * cross
    assert measurement.values["fvd_20"]["value"] == pytest.approx(expected, rel=1e-9)
    assert measurement.record["statistics"]["covariance"] == {"fvd": "over n"}
    assert (measurement.record["reference"]["frames"], measurement.record["reference"]["frame_stride"]) == (2, 3)


# --- metrics as data


def test_names() -> None:
    assert [reported_names("fid", n) for n in (50_000, 49_999)] == [("fid",), ("fid_49999",)]
    assert reported_names("pr", 100) == ("precision_100", "recall_100")
    assert reported_names("pr", 50_000) == ("precision", "recall")
    assert reported_names("frechet_digits", 7) == ("frechet_digits",)
    assert reported_names("fvd", 60_000) == ("fvd_60000",)
    assert reported_names("moving_digits", 7) == ("digit_recognition", "digit_displacement", "blank_frames")
    assert [name for name, metric in METRICS.items() if metric.greater_is_better] == ["is", "pr", "moving_digits"]
    assert [name for name, metric in METRICS.items() if metric.clips] == ["fvd", "moving_digits"]


@pytest.mark.parametrize(
    ("metric", "reported", "best_first"),
    [
        ("fid", "fid_100", (1.0, 2.0)),
        ("is", "is_100", (2.0, 1.0)),
        ("moving_digits", "digit_recognition", (0.9, 0.8)),
        ("moving_digits", "digit_displacement", (1.1, 0.8, 2.0)),
        ("moving_digits", "blank_frames", (0.0, 0.1)),
    ],
)
def test_which_way_is_up(metric: str, reported: str, best_first: tuple[float, ...]) -> None:
    assert tuple(sorted(best_first, key=lambda value: shortfall(metric, reported, value))) == best_first


@pytest.mark.parametrize(
    ("metrics", "protocol", "message"),
    [
        (["fid", "fud"], "adm", "metrics of fid, sfid, .*, each once, got fid, fud"),
        (["fid", "fid"], "adm", "each once"),
        ([], "adm", "got none"),
        (["fvd", "fid"], "adm", "fvd is of clips, .* expected it alone, got fvd, fid"),
        (["fvd", "moving_digits"], "adm", "expected it alone"),
        (["sfid"], "clean", "sfid is defined under protocol adm, got 'clean'"),
        (["fid", "pr"], "pytorch-fid", "pr is defined under protocol adm"),
        (["kid"], "bicubic", "protocol adm or pytorch-fid or clean, got 'bicubic'"),
    ],
)
def test_metrics_that_do_not_exist_or_fit_are_refused(metrics: list[str], protocol: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metrics(metrics, protocol)
    with pytest.raises(ValueError, match=message):
        Request(tuple(metrics), protocol=protocol)


def test_what_no_metric_uses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frechet_digits does not use inception"):
        open_networks(
            ["frechet_digits"],
            protocol="adm",
            inception_weights=Path("weights.pth"),
            dinov2=None,
            i3d=None,
            device="cpu",
        )
    with pytest.raises(ValueError, match="fvd needs the TorchScript file"):
        open_networks(["fvd"], protocol="adm", inception_weights=None, dinov2=None, i3d=None, device="cpu")
    with pytest.raises(ValueError, match="batch_size"):
        Request(("fid",), batch_size=0)
    for metric in ("fid", "moving_digits"):
        with pytest.raises(ValueError, match=f"for the files of fvd, got 16 frames .* 8 a second for {metric}"):
            Request((metric,), cut=Cut(ClipSettings(16, 8.0)))


def test_metrics_share_what_they_keep_and_its_size_is_known() -> None:
    side = Side(ALL, NETWORKS, 41, "cpu", real=False)
    side.update(FAKE, range(41))
    state = side.state()
    assert {key.rpartition(".")[0] for key in state} == {
        "moments.pool",
        "moments.spatial",
        "table.pool",
        "score.logits",
    }
    statistics = sum(tensor.nbytes for key, tensor in state.items() if tensor.dtype.is_floating_point)
    assert abs(statistics - kept_bytes(ALL, NETWORKS, 41, real=False)) < 32  # what is small beside them
    assert kept_bytes(["fid"], NETWORKS, 10, real=False) == kept_bytes(["fid"], NETWORKS, 10**6, real=False)
    real = Side(ALL, NETWORKS, 60, "cpu", real=True)
    assert "score.logits.seen" not in real.state()
    with pytest.raises(ValueError, match=r"expected statistics of .*, got those of \['moments.pool'\]"):
        side.add_state(Side(["fid"], NETWORKS, 41, "cpu", real=False).state())


def test_the_memory_of_features_is_stated_beforehand(reference: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        measure(reference)
    assert "kid and pr keep features" in caplog.text
    assert evaluator(reference, ["kid"]).kept_bytes(10_000) == 4 * 6 * (10_000 + 60)
    assert evaluator(None, ["is"]).kept_bytes(5001) == 2 * 8 * 4


# --- errors, stops, restarts


def test_bad_features_and_counts_are_errors(reference: str) -> None:
    with pytest.raises(ValueError, match="at least 2 generated images, got 1"):
        evaluator(reference).measure(Single(FAKE), progress=False)
    with pytest.raises(FloatingPointError, match="NaN pixels"):
        evaluator(reference).measure(Failing(FAKE, 20, nan), progress=False)
    side = Side(["fid"], NETWORKS, 41, "cpu", real=False)
    side.update(FAKE[:40], range(40))
    with pytest.raises(ValueError, match="expected 41 images, got the pool features of 40"):
        side.check_complete()
    with pytest.raises(ValueError, match="features of 3 images, got those of 2"):
        side.update(FAKE[:2], range(3))


def test_tf32_is_off_while_measuring_and_put_back(reference: str) -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    seen = []

    class Watching(Sampled):
        def read(self, indices: Sequence[int]) -> Tensor:
            seen.append([flag.fp32_precision for flag in flags])
            return super().read(indices)

    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "tf32"
    try:
        evaluator(reference).measure(Watching(FAKE), progress=False)
        assert [flag.fp32_precision for flag in flags] == ["tf32", "tf32"]
    finally:
        for flag, precision in zip(flags, before, strict=True):
            flag.fp32_precision = precision
    assert seen
    assert all(precision == ["ieee", "ieee"] for precision in seen)


def test_a_stop_while_the_reference_is_measured(reference: str) -> None:
    assert evaluator(reference).measure(Sampled(FAKE), stopping=lambda: True, progress=False) is None


class Asked(Sampled):
    """Images that know what decides their pixels."""

    def request(self) -> dict[str, Any]:
        return {"seed": 3, "interval": (0, 1)}


def test_a_request_has_all_that_decides_the_values(reference: str, tmp_path: Path) -> None:
    request = evaluator(reference).request_for(Asked(FAKE))
    assert request["generated"] == {"n": 41, "seed": 3, "interval": [0, 1]}
    assert request["features"]["inception"]["weights_sha256"] == "0" * 64
    assert request == evaluator(reference, batch_size=3).request_for(Asked(FAKE))
    made_by = environment()
    versions = {package: made_by["packages"][package] for package in ("torch", "diffusers")}
    assert request["code"] == {"commit": made_by["commit"], **versions}
    assert all(versions.values())
    others = [
        evaluator(write_images(tmp_path / "other.npz", FAKE)).request_for(Asked(FAKE)),
        evaluator(reference, seed=1).request_for(Asked(FAKE)),
        evaluator(reference, ["fid"]).request_for(Asked(FAKE)),
        evaluator(reference).request_for(Asked(FAKE[:40])),
        evaluator(reference).request_for(Sampled(FAKE)),
    ]
    assert request not in others
    assert len(others[-1]["generated"]["sha256"]) == 64


REQUEST = {"model": "tiny", "sampling": {"seed": 0}}


@pytest.mark.parametrize("damage", ["error", "stop", "stop and another batch size"])
def test_an_interrupted_evaluation_goes_on_by_index(reference: str, tmp_path: Path, damage: str) -> None:
    expected = values(measure(reference))
    folder = tmp_path / "fid.json.partial"
    first = Failing(FAKE, 23, nan)
    turns = iter(range(100))
    if damage == "error":
        with pytest.raises(FloatingPointError):
            evaluator(reference).measure(first, partial=Partial(folder, REQUEST), progress=False)
    else:
        stopped = evaluator(reference).measure(
            Sampled(FAKE), partial=Partial(folder, REQUEST), stopping=lambda: next(turns) >= 11, progress=False
        )  # the reference takes 9 batches
        assert stopped is None
    assert sorted(Partial(folder, REQUEST).done()) == list(range(21))
    again = Sampled(FAKE)
    engine = evaluator(reference, batch_size=4 if "another" in damage else 7)
    partial = Partial(folder, REQUEST)
    measurement = engine.measure(again, partial=partial, progress=False)
    assert measurement is not None
    assert values(measurement) == pytest.approx(expected, rel=1e-10)
    assert again.asked == list(range(21, 41))
    assert measurement.record["run"]["images_of_earlier_attempts"] == 21
    # and where all is done, nothing is read any more
    none = Sampled(FAKE)
    finished = evaluator(reference).measure(none, partial=Partial(folder, REQUEST), progress=False)
    assert finished is not None
    assert values(finished) == pytest.approx(expected, rel=1e-10)
    assert not none.asked
    partial.remove()
    assert not folder.exists()


def test_another_request_is_refused_with_its_differences(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "partial", REQUEST)
    partial.begin(1)
    partial.save({"x": torch.ones(2)}, [0])
    other = {"model": "tiny", "sampling": {"seed": 1}, "steps": 5}
    with pytest.raises(
        ValueError, match=r"\(sampling.seed is 0 there, 1 was asked for; steps is nothing there, 5 was asked for\)"
    ):
        Partial(tmp_path / "partial", other)
    (tmp_path / "partial" / "request.json").write_text("{")
    with pytest.raises(ValueError, match="is broken"):
        Partial(tmp_path / "partial", REQUEST)
    (tmp_path / "partial" / "request.json").unlink()
    with pytest.raises(ValueError, match="delete"):
        Partial(tmp_path / "partial", REQUEST)


def test_differences_are_named_by_their_place() -> None:
    there, asked = {"a": {"b": 1.0, "c": None}, "d": [1]}, {"a": {"b": 3.0}, "d": [1], "e": "x"}
    assert differences(there, there) == []
    assert differences(there, asked) == [
        "a.b is 1.0 there, 3.0 was asked for",
        "a.c is null there, nothing was asked for",
        'e is nothing there, "x" was asked for',
    ]


def test_saving_copies_nothing(tmp_path: Path) -> None:
    """Allocations of torch and Python: the statistics of FID alone are 34 MB."""
    state = {"scatter": torch.rand(600, 600, dtype=torch.float64), "count": torch.tensor(3)}
    partial = Partial(tmp_path / "partial", REQUEST)
    partial.begin(1)
    tracemalloc.start()
    try:
        with torch.profiler.profile(profile_memory=True) as profiler:
            partial.save(state, range(3))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages())
    assert peak + allocated < state["scatter"].nbytes / 2
    (earlier,) = Partial(tmp_path / "partial", REQUEST).earlier_states()
    assert earlier.keys() == state.keys()
    assert torch.equal(earlier["scatter"], state["scatter"])


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty"])
def test_a_damaged_part_is_done_again(
    reference: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "partial"
    for bad in (15, 30):
        with pytest.raises(FloatingPointError):
            evaluator(reference).measure(Failing(FAKE, bad, nan), partial=Partial(folder, REQUEST), progress=False)
    _, second = sorted(folder.glob("attempt-*"))
    content = second.read_bytes()
    damaged = {
        "cut": content[:-5],
        "flip": content[:-200] + bytes([content[-200] ^ 1]) + content[-199:],
        "text": b"not safetensors",
        "empty": b"",
    }
    second.write_bytes(damaged[damage])
    images, partial = Sampled(FAKE), Partial(folder, REQUEST)
    measurement = evaluator(reference).measure(images, partial=partial, progress=False)
    assert measurement is not None
    assert values(measurement) == pytest.approx(values(measure(reference)), rel=1e-10)
    assert images.asked == list(range(14, 41))
    assert f"{second} is broken" in caplog.text
    assert len(list(folder.glob("attempt-*"))) == 3  # neither is written over


def test_images_that_two_files_have_are_refused(reference: str, tmp_path: Path) -> None:
    side = Side(ALL, NETWORKS, 41, "cpu", real=False)
    side.update(FAKE[:3], range(3))
    for attempt in (1, 2):
        partial = Partial(tmp_path / "partial", REQUEST)
        partial.begin(attempt)
        partial.save(side.state(), range(3))
    with pytest.raises(ValueError, match="counted twice"):
        evaluator(reference).measure(Sampled(FAKE), partial=Partial(tmp_path / "partial", REQUEST), progress=False)


def test_a_save_that_fails_is_a_warning(reference: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    partial = Partial(tmp_path / "partial", REQUEST, save_every=0)
    (tmp_path / "partial").write_text("in its place")
    measurement = evaluator(reference).measure(Sampled(FAKE), partial=partial, progress=False)
    assert measurement is not None
    assert "could not save" in caplog.text


# --- processes


def _serve(rank: int, rendezvous: str, jobs: Any, results: Any) -> None:
    """A process of a gloo group, which does what it is sent until that is None."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results.put(None)
    while (sent := jobs.get()) is not None:
        job, arguments = sent
        results.put(job(rank, *arguments))
    torch.distributed.destroy_process_group()


Pair = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes, started once: `pair(job, ...)` gives what `job(rank, ...)` returns on each."""
    context = torch.multiprocessing.get_context("spawn")
    jobs, results = ([context.Queue() for _ in range(2)] for _ in range(2))
    rendezvous = str(tmp_path_factory.mktemp("pair") / "rendezvous")
    workers = [context.Process(target=_serve, args=(rank, rendezvous, jobs[rank], results[rank])) for rank in range(2)]
    for worker in workers:
        worker.start()

    def run(job: Callable[..., Any], *arguments: Any) -> list[Any]:
        for queue in jobs:
            queue.put((job, arguments))
        return [queue.get(timeout=60) for queue in results]

    for queue in results:
        queue.get(timeout=120)
    yield run
    for queue, worker in zip(jobs, workers, strict=True):
        queue.put(None)
        worker.join(10)
        worker.kill()


def _measure(rank: int, reference: str, batch_size: int) -> Measurement | None:
    return evaluator(reference, batch_size=batch_size).measure(ImageTensor(FAKE, "images"), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [7, 20])  # rounds, the last of which with 20 only one process takes part in
def test_two_processes_give_the_value_of_one(pair: Pair, reference: str, batch_size: int) -> None:
    first, second = pair(_measure, reference, batch_size)
    assert first == second
    assert values(first) == pytest.approx(values(measure(reference)), rel=1e-10)
    assert first.record["run"]["processes"] == 2
    floors = [each.values["fid_41"]["floor"]["value"] for each in (first, measure(reference))]
    assert floors[0] == pytest.approx(floors[1], rel=1e-10)


def _go_on(rank: int, reference: str, folder: str) -> tuple[Measurement | None, list[int]]:
    images = Sampled(FAKE)
    return evaluator(reference).measure(images, partial=Partial(Path(folder), REQUEST), progress=False), images.asked


@pytest.mark.slow
def test_a_process_without_images_changes_nothing(pair: Pair, reference: str, tmp_path: Path) -> None:
    side, partial = Side(ALL, NETWORKS, 41, "cpu", real=False), Partial(tmp_path / "partial", REQUEST)
    side.update(FAKE[:40], range(40))
    partial.begin(1)
    partial.save(side.state(), range(40))
    (first, asked), (second, not_asked) = pair(_go_on, reference, str(tmp_path / "partial"))
    assert (asked, not_asked) == ([40], [])
    assert first == second
    assert values(first) == pytest.approx(values(measure(reference)), rel=1e-10)


def _fail(rank: int, reference: str, bad: int, prefetch: bool) -> tuple[str, bool]:
    images = Failing(FAKE, bad, nan)
    images.prefetch = prefetch
    try:
        evaluator(reference).measure(images, progress=False)
    except EvaluationError as error:
        return str(error), isinstance(error.__cause__, FloatingPointError)
    return "no error", False


def _fail_at_the_end(rank: int, reference: str) -> str:
    """Features of one process are not finite, which the main process finds."""
    engine, network = evaluator(reference, ["fid"]), Linear()
    engine.networks = {"inception": network}
    if rank == 1:
        network.maps["pool"][0] = torch.nan
    try:
        engine.measure(ImageTensor(FAKE, "images"), progress=False)
    except EvaluationError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "prefetch"), [(15, False), (15, True), (40, False)])
def test_an_error_of_one_process_is_raised_on_all_and_names_it(
    pair: Pair, reference: str, bad: int, prefetch: bool
) -> None:
    found, failed = pair(_fail, reference, bad, prefetch), bad % 2
    assert [text for text, _ in found] == [f"rank {failed} of 2 failed: FloatingPointError: NaN pixels"] * 2
    assert [is_cause for _, is_cause in found] == [rank == failed for rank in range(2)]
    texts = pair(_fail_at_the_end, reference)
    assert texts[0] == texts[1]
    assert "rank 0 of 2 failed: ValueError: the features are not all finite" in texts[0]


def _stop(rank: int, reference: str, folder: str) -> tuple[bool, list[int]]:
    images = Sampled(FAKE)
    measurement = evaluator(reference).measure(
        images,
        partial=Partial(Path(folder), REQUEST),
        stopping=lambda: rank == 1 and bool(images.asked),
        progress=False,
    )
    return measurement is None, images.asked


@pytest.mark.slow
def test_a_stop_of_one_process_stops_all_and_another_number_goes_on(pair: Pair, reference: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "partial")
    found = pair(_stop, reference, folder)
    assert found == [(True, list(range(0, 14, 2))), (True, list(range(1, 14, 2)))]
    measurement, asked = _go_on(0, reference, folder)  # one process
    assert asked == list(range(14, 41))
    assert measurement is not None
    assert values(measurement) == pytest.approx(values(measure(reference)), rel=1e-10)
    assert measurement.record["run"]["images_of_earlier_attempts"] == 14


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_more_processes(pair: Pair, reference: str, tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    code = (
        "import sys; from pathlib import Path; from tests.test_evaluation import *;"
        f"evaluator({reference!r}).measure(Failing(FAKE, 23, kill), progress=False,"
        f"partial=Partial(Path({str(folder)!r}), REQUEST, save_every=0))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    seen = Partial(folder, REQUEST).done().tolist()
    assert seen in (list(range(7)), list(range(14)), list(range(21)))  # saving may take more than its tenth of the time
    (measurement, first), (_, second) = pair(_go_on, reference, str(folder))
    assert sorted(seen + first + second) == list(range(41))
    assert values(measurement) == pytest.approx(values(measure(reference)), rel=1e-10)


def test_a_pass_reads_each_image_once_and_closes_its_reader() -> None:
    for prefetch in (False, True):
        images, got = ImageTensor(FAKE, "images"), {}
        images.prefetch = prefetch

        def work(batch: Tensor, indices: list[int], got: dict = got) -> None:
            got |= dict(zip(indices, batch, strict=True))

        assert run_pass(images, [5, 3, 40, 1, 7], 2, "cpu", work, progress=False)
        assert list(got) == [5, 3, 40, 1, 7]
        assert all(torch.equal(got[index], FAKE[index]) for index in got)
        assert run_pass(images, [], 2, "cpu", work, progress=False)
        assert not run_pass(images, range(41), 2, "cpu", work, stopping=lambda: True, progress=False)
