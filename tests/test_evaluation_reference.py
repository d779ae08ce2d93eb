"""Making reference files: against numpy on the same features, whatever the batches, folders and processes."""

import itertools
import logging
import multiprocessing
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iwin_dit.data.images import centre_crop
from iwin_dit.data.sources import ImageFolder, ImageSource
from iwin_dit.evaluation import reference
from iwin_dit.evaluation.reference import FlatFolder, make_reference, open_reference_source
from iwin_dit.metrics.digits import DigitsFeatures
from iwin_dit.metrics.frechet import frechet_distance
from iwin_dit.metrics.moments import Gaussian
from iwin_dit.metrics.network import FeatureNetwork
from iwin_dit.metrics.reference import load_reference
from tests.faults import FORKSERVER

R = 8


class Means(FeatureNetwork):
    """Means of colours and of rows as features; and logits, which no reference holds."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = {"pool": 3, "spatial": R, "logits": 1}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pixels = images.float()
        return {
            "pool": pixels.mean((2, 3)),
            "spatial": pixels.mean((1, 3)),
            "logits": pixels.mean((1, 2, 3), keepdim=True)[..., 0, 0],
        }

    def describe(self) -> dict[str, Any]:
        return {"name": "means", "protocol": "plain", "weights_sha256": "none"}


NETWORKS = {"means": Means()}


def write_images(folder: Path, n: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        size = rng.integers(R, 4 * R, 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def cropped(paths: Sequence[Path]) -> np.ndarray:
    return np.stack([np.asarray(centre_crop(Image.open(path), R)) for path in paths])


def features(images: np.ndarray, name: str) -> np.ndarray:
    return Means()(torch.from_numpy(images).permute(0, 3, 1, 2))[name].double().numpy()


def distance(first: Tensor, second: Tensor) -> float:
    """Between two sets of rows."""
    return frechet_distance(*(Gaussian(half.mean(0), half.T.cov()) for half in (first, second)))


def make(source: ImageSource, out: Path, **settings: Any) -> dict[str, Any]:
    return make_reference(source, NETWORKS, out, **({"resolution": R, "progress": False} | settings))


def test_statistics_are_those_of_the_cropped_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", 23)
    images = cropped(sorted(folder.iterdir()))
    provenance = make(FlatFolder(folder, part_size=10), tmp_path / "r.npz", keep_images=7, seed=3, batch_size=4)
    loaded = load_reference(tmp_path / "r.npz", {"pool": 3, "spatial": R})
    for name, gaussian in loaded.gaussians.items():
        rows = features(images, name)
        assert gaussian.mean.numpy() == pytest.approx(rows.mean(0), rel=1e-12)
        assert gaussian.covariance.numpy() == pytest.approx(np.cov(rows, rowvar=False), rel=1e-9, abs=1e-9)
    assert loaded.provenance == provenance
    loaded.check("means", Means().describe())
    assert provenance["features"] == {"means": Means().describe()}
    assert provenance["n"] == 23
    assert provenance["image_size"] == [R, R]
    assert provenance["source"]["description"] == str(folder)
    assert provenance["source"]["broken"] == []
    assert provenance["images"] == {"n": 7, "choice": "random", "seed": 3}
    assert {"python", "packages", "commit"} <= provenance["environment"].keys()
    with np.load(tmp_path / "r.npz") as archive:
        assert set(archive) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "provenance"}
        kept = {image.tobytes() for image in archive["arr_0"]}
    assert len(kept) == 7
    assert kept < {image.tobytes() for image in images}


def test_the_kept_images_are_a_seeded_choice_in_random_order(tmp_path: Path) -> None:
    source = FlatFolder(write_images(tmp_path / "photos", 40), part_size=16)
    all_images = [image.tobytes() for image in cropped(sorted((tmp_path / "photos").iterdir()))]

    def kept(**settings: Any) -> list[int]:
        make(source, tmp_path / "r.npz", **settings)
        images = load_reference(tmp_path / "r.npz", {}).images
        assert images is not None
        return [all_images.index(x.numpy().tobytes()) for x in images.read(range(len(images))).permute(0, 2, 3, 1)]

    everything = kept(keep_images=100)
    assert sorted(everything) == list(range(40))
    assert everything != sorted(everything)
    assert kept(keep_images=9) == everything[:9]
    assert kept(keep_images=9, batch_size=3) == everything[:9]
    assert kept(keep_images=9, seed=1) != everything[:9]


def test_the_floor_is_the_distance_of_two_halves(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", 8)
    rows = torch.from_numpy(features(cropped(sorted(folder.iterdir())), "pool"))

    splits = {
        chosen: distance(rows[list(chosen)], rows[[i for i in range(8) if i not in chosen]])
        for size in range(2, 7)
        for chosen in itertools.combinations(range(8), size)
    }
    seen = set()
    for seed in range(12):
        floor = make(FlatFolder(folder), tmp_path / "r.npz", seed=seed, keep_images=0)["floor"]["pool"]
        assert floor["n"] + floor["against"] == 8
        of_this_size = {chosen: value for chosen, value in splits.items() if len(chosen) == floor["n"]}
        seen |= {chosen for chosen, value in of_this_size.items() if floor["value"] == pytest.approx(value, rel=1e-6)}
    assert len(seen) >= 12  # each of the halves is one of these splits
    assert len({len(chosen) for chosen in seen}) > 1  # and its size is a matter of chance, too


@pytest.mark.slow
def test_the_floor_of_class_folders_is_that_of_random_halves(tmp_path: Path) -> None:
    """Images of a class lie side by side and are alike: halves that share them out are no random samples."""
    root, rng = tmp_path / "classes", np.random.default_rng(0)
    for label, colour in enumerate(rng.integers(20, 230, (12, 3))):
        (root / f"{label:02}").mkdir(parents=True)
        for i in range(10):
            pixels = (colour + rng.integers(-3, 4, (R, R, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{label:02}" / f"{i}.png")
    rows = torch.from_numpy(features(cropped(sorted(root.rglob("*.png"))), "pool"))

    def random_halves() -> float:
        order = rng.permutation(len(rows))
        return distance(rows[order[:60]], rows[order[60:]])

    expected = sorted(random_halves() for _ in range(400))
    for name, source in (("flat", FlatFolder(root)), ("classes", ImageFolder(root, 50))):
        floors = [
            make(source, tmp_path / f"{name}.npz", seed=seed, keep_images=0, batch_size=120)["floor"]["pool"]["value"]
            for seed in range(9)
        ]
        assert expected[0] <= min(floors), (name, floors)
        assert max(floors) <= 1.5 * expected[-1], (name, floors)
        assert expected[40] < np.median(floors) < expected[-40], (name, floors)


def test_a_handful_of_images_may_have_no_floor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_images(tmp_path / "photos", 4)
    floors = []
    for seed in range(8):
        caplog.clear()
        floors.append(make(FlatFolder(folder), tmp_path / "r.npz", seed=seed, keep_images=0)["floor"])
        assert ("no floor of pool: 4 images are too few" in caplog.text) == (floors[-1] == {})
        assert load_reference(tmp_path / "r.npz", {"pool": 3}).provenance is not None
    assert {} in floors
    assert {(floor["pool"]["n"], floor["pool"]["against"]) for floor in floors if floor} == {(2, 2)}
    (folder / "003.png").unlink()
    with pytest.raises(ValueError, match=r"at least 4 images in .*photos, got 3"):
        make(FlatFolder(folder), tmp_path / "other.npz")
    assert not (tmp_path / "other.npz").exists()


def test_digits_in_the_features_of_their_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DigitsFeatures().requires_grad_(False)
    source = open_reference_source("digits")
    out = tmp_path / "digits.npz"
    provenance = make_reference(
        source, {"digits": network}, out, resolution=32, keep_images=10, batch_size=500, progress=False
    )
    loaded = load_reference(out, {"digits": 64})
    images = torch.stack([torch.from_numpy(np.array(s.read()[0])) for p in range(2) for s in source.items(p)])
    rows = network(images.permute(0, 3, 1, 2))["digits"].double()
    assert loaded.gaussians["digits"].covariance.numpy() == pytest.approx(rows.T.cov().numpy(), rel=1e-4, abs=1e-9)
    assert loaded.images is not None
    assert len(loaded.images) == 10
    assert provenance["n"] == 1797
    assert 0 < provenance["floor"]["digits"]["value"] < rows.T.cov().trace()
    with pytest.raises(ValueError, match="expect 32 x 32 images"):
        make_reference(source, {"digits": network}, tmp_path / "r.npz", resolution=16, progress=False)


def test_folders_with_and_without_class_folders_are_the_same_images(tmp_path: Path) -> None:
    root = tmp_path / "classes"
    for label in range(3):
        write_images(root / str(label), 5, seed=label)
    (root / "0" / "notes.txt").write_text("no image")
    flat = open_reference_source(str(root))
    assert isinstance(flat, FlatFolder)
    assert flat.num_ignored == 1
    for hidden in (".cache", "0/.thumbnails"):
        write_images(root / hidden, 1)
    assert open_reference_source(str(root)).fingerprint == flat.fingerprint
    (root / "2" / "back").symlink_to(root, target_is_directory=True)
    assert open_reference_source(str(root)).fingerprint == flat.fingerprint
    (root / "2" / "back").unlink()
    keys = [
        [s.key for p in range(source.num_parts) for s in source.items(p)] for source in (flat, ImageFolder(root, 4))
    ]
    assert keys[0] == keys[1]
    assert flat.fingerprint == ImageFolder(root, 4).fingerprint
    assert {s.label for s in flat.items(0)} == {0}
    with pytest.raises(ValueError, match=r"data.image_key is for tars and Hugging Face data sets alone"):
        open_reference_source(str(root), image_key="png")
    with pytest.raises(ValueError, match="which is not a folder"):
        open_reference_source(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        open_reference_source(str(tmp_path / "empty"))


def test_broken_images_are_named_and_refused_unless_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_images(tmp_path / "photos", 12)
    broken = [folder / f"{i:03}.png" for i in (2, 9)]
    whole = [path for path in sorted(folder.iterdir()) if path not in broken]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"1 broken images, at most 0 may be: mend or remove them\n  .*002\.png"):
        make(FlatFolder(folder), tmp_path / "r.npz")
    assert not (tmp_path / "r.npz").exists()
    with caplog.at_level(logging.WARNING):
        provenance = make(FlatFolder(folder), tmp_path / "r.npz", max_broken=2)
    assert provenance["source"]["broken"] == [str(path) for path in broken]
    assert provenance["n"] == 10
    assert "a broken image (2 so far)" in caplog.text
    rows = features(cropped(whole), "pool")
    assert load_reference(tmp_path / "r.npz", {"pool": 3}).gaussians["pool"].mean.numpy() == pytest.approx(rows.mean(0))


def test_an_error_ends_the_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the garbage collector comes by, which has waited for itself in a thread that was just starting."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    source, before = FlatFolder(write_images(tmp_path / "photos", 12)), threading.active_count()
    monkeypatch.setattr(Means, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        make(source, tmp_path / "r.npz", batch_size=2)
    assert raised.tb is not None  # which keeps the frames, and what they hold
    assert threading.active_count() == before


def test_mistakes_are_refused_before_the_work(tmp_path: Path) -> None:
    source = FlatFolder(write_images(tmp_path / "photos", 4))
    with pytest.raises(ValueError, match=r"expected a name that ends in \.npz"):
        make(source, tmp_path / "reference")
    with pytest.raises(ValueError, match="in a folder that exists"):
        make(source, tmp_path / "missing" / "r.npz")
    for settings in ({"keep_images": 1}, {"resolution": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="keep_images of 0 or at least 2, got"):
            make(source, tmp_path / "r.npz", **settings)
    with pytest.raises(ValueError, match=r"features that a reference holds \(pool, .*\), got \[\]"):
        make_reference(source, {}, tmp_path / "r.npz", resolution=R)


# --- several processes


def _rank(rank: int, folders: Sequence[tuple[Path, int]], out: Path, results: "multiprocessing.Queue[Any]") -> None:
    """One of two processes, which make a file of each folder, in parts of a size."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=2)
    reference._PATIENCE = 0  # the processes agree after every batch
    for i, (folder, part_size) in enumerate(folders):
        found: Any
        try:
            source = FlatFolder(folder, part_size)
            found = make(source, out / f"{i}.npz", keep_images=6, max_broken=1, batch_size=2)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        results.put((i, rank, found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_file_of_one(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 11)
    (photos / "005.png").write_text("no image")
    worse = write_images(tmp_path / "worse", 11)
    for i in (1, 5):  # one is either process's
        (worse / f"{i:03}.png").write_text("no image")
    worst = write_images(tmp_path / "worst", 11)
    for i in (5, 6):  # both are the second one's
        (worst / f"{i:03}.png").write_text("no image")
    folders = [(photos, 4), (photos, 100), (worse, 4), (worst, 4)]  # of the second, one process has all
    results = FORKSERVER.Queue()
    workers = [FORKSERVER.Process(target=_rank, args=(rank, folders, tmp_path, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {(i, rank): result for i, rank, result in (results.get(timeout=60) for _ in range(2 * len(folders)))}
    for worker in workers:
        worker.join()
    for i, (folder, part_size) in enumerate(folders[:2]):
        assert found[i, 0] == found[i, 1]
        alone = make(FlatFolder(folder, part_size), tmp_path / "alone.npz", keep_images=6, max_broken=1)
        together = found[i, 0]
        for name, floor in alone.pop("floor").items():
            assert together["floor"][name] == pytest.approx(floor, rel=1e-6)  # of sets without full rank
        together.pop("floor")
        assert (alone.pop("run")["processes"], together.pop("run")["processes"]) == (1, 2)
        assert alone == together
        with np.load(tmp_path / "alone.npz") as one, np.load(tmp_path / f"{i}.npz") as two:
            assert np.array_equal(one["arr_0"], two["arr_0"])
            for key in ("mu", "sigma", "mu_s", "sigma_s"):
                assert two[key] == pytest.approx(one[key], rel=1e-12, abs=1e-10)
    for rank in range(2):
        for i, told in ((2, "2 broken images, at most 1 may be"), (3, "rank 1 of 2 failed: ValueError: 2 broken")):
            assert told in found[i, rank], (i, rank, found[i, rank])
            assert not (tmp_path / f"{i}.npz").exists()
