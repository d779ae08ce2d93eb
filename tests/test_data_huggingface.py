"""Hugging Face data sets made in a temporary folder; the Hub is never reached."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from iwin_dit.data.images import BrokenImageError
from tests.corpus import encode
from tests.test_data_sources import open_like_a_config

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["ant", "bee", "cat"]),
        "caption": datasets.Value("string"),
    }
)


def shade(value: int) -> bytes:
    return encode(Image.new("RGB", (4, 4), (value, 0, 0)))


def build(rows: int = 10, **columns: list[Any]) -> datasets.Dataset:
    """Row i has an image of red i and label i mod 3; columns replace the usual ones."""
    usual = {
        "image": [{"bytes": shade(i), "path": None} for i in range(rows)],
        "label": [i % 3 for i in range(rows)],
        "caption": ["?"] * rows,
    }
    return datasets.Dataset.from_dict(usual | columns, features=FEATURES, split="train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same ten rows as three Parquet files, as one saved split and as saved splits; a cache of its own."""
    folder = tmp_path_factory.mktemp("hf")
    rows = build()
    (folder / "parquet").mkdir()
    for i in range(3):
        rows.shard(3, i).to_parquet(folder / "parquet" / f"train-{i:05}-of-00003.parquet")
    rows.with_format("torch").save_to_disk(folder / "saved")
    datasets.DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(folder / "splits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.mark.parametrize(
    ("name", "streaming", "parts"),
    [
        ("parquet", False, [4, 4, 2]),
        ("parquet", True, [4, 3, 3]),  # the files
        ("saved", False, [4, 4, 2]),
        ("saved", True, [4, 3, 3]),
        ("splits", False, [4, 4, 2]),
    ],
)
def test_rows_become_samples(name: str, streaming: bool, parts: list[int], folder: Path) -> None:
    source = open_like_a_config(f"hf:{folder / name}", streaming=streaming)
    assert source.description == f"hf:{folder / name}"
    assert source.class_names == ("ant", "bee", "cat")
    samples = [list(source.items(part)) for part in range(source.num_parts)]
    assert [len(part) for part in samples] == parts
    together = list(itertools.chain(*samples))
    assert [sample.label for sample in together] == [i % 3 for i in range(10)]
    assert [sample.read()[0].getpixel((0, 0)) for sample in together] == [(i, 0, 0) for i in range(10)]
    assert len({sample.key for sample in together}) == 10
    assert together[9].key == f"hf:{folder / name}/train " + ("part 2 row 2" if streaming else "row 9")
    assert [sample.key for sample in source.items(1)] == [sample.key for sample in samples[1]]


def test_columns_of_bytes_and_integers(tmp_path: Path, folder: Path) -> None:
    columns = {"pixels": [shade(1), shade(2)], "class": [1, 2]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "data.parquet")
    source = open_like_a_config(f"hf:{tmp_path}", image_key="pixels", label_key="class")
    assert source.class_names == ("0", "1", "2")
    assert [(s.label, s.read()[0].getpixel((0, 0))) for s in source.items(0)] == [(1, (1, 0, 0)), (2, (2, 0, 0))]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    named = open_like_a_config(
        f"hf:{tmp_path}", image_key="pixels", label_key="class", class_names=tmp_path / "names.txt"
    )
    assert named.class_names == ("a", "b", "c")


def write_unembedded(folder: Path, images: list[Any]) -> str:
    """A data set whose images stay where they are, unlike in what the library itself writes."""
    folder.mkdir()
    parquet.write_table(build(len(images), image=images).data.table, folder / "train.parquet")
    return f"hf:{folder}"


def test_images_beside_the_data_set(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.png").write_bytes(shade(7))
    images: list[Any] = [{"bytes": None, "path": path} for path in (str(tmp_path / "a.png"), "gone.png", "/dev/zero")]
    name = write_unembedded(tmp_path / "local", [*images, None, {"bytes": b"?", "path": None}])
    good, *broken = open_like_a_config(name, part_size=5).items(0)
    assert good.read()[0].getpixel((0, 0)) == (7, 0, 0)
    for i, sample in enumerate(broken, start=1):
        with pytest.raises(BrokenImageError, match=f"local/train row {i}: "):
            sample.read()
    name = write_unembedded(tmp_path / "remote", [{"bytes": None, "path": "hf://datasets/someone/something/a.png"}])
    with pytest.raises(
        ValueError, match=r"train part 0 row 0 lies outside the data set, at hf://.*set data.streaming: "
    ):
        list(open_like_a_config(name, streaming=True).items(0))
    name = write_unembedded(tmp_path / "address", [{"bytes": None, "path": "https://example.org/a.png"}])
    with pytest.raises(ValueError, match=r"row 0 lies outside the data set, at https://.*; store the images' bytes"):
        list(open_like_a_config(name).items(0))


def test_structs_of_bytes_and_path(tmp_path: Path, folder: Path) -> None:
    """Parquet from elsewhere does not say that its structs are images."""
    images = pyarrow.array([{"bytes": shade(5), "path": "a.png"}])
    parquet.write_table(pyarrow.table({"image": images, "label": pyarrow.array([2])}), tmp_path / "train.parquet")
    for streaming in (False, True):
        (sample,) = open_like_a_config(f"hf:{tmp_path}", streaming=streaming).items(0)
        assert (sample.label, sample.read()[0].getpixel((0, 0))) == (2, (5, 0, 0))


def test_configurations(tmp_path: Path, folder: Path) -> None:
    """Data sets with several of them name them in the card."""
    card = "---\nconfigs:\n"
    for name, rows in (("small", 1), ("large", 2)):
        (tmp_path / name).mkdir()
        build(rows).to_parquet(tmp_path / name / "train.parquet")
        card += f"- config_name: {name}\n  data_files: {name}/*.parquet\n"
    (tmp_path / "README.md").write_text(card + "---\n")
    assert len(list(open_like_a_config(f"hf:{tmp_path}", config="large").items(0))) == 2
    with pytest.raises(ValueError, match=r"(?s)Config name is missing.*\['small', 'large'\].*\(data.source_config\)"):
        open_like_a_config(f"hf:{tmp_path}")


@pytest.mark.parametrize("streaming", [False, True])
def test_changed_files_are_another_source(streaming: bool, tmp_path: Path, folder: Path) -> None:
    def fingerprint() -> str:
        return open_like_a_config(f"hf:{tmp_path}", streaming=streaming).fingerprint

    build(2).to_parquet(tmp_path / "train.parquet")
    before = fingerprint()
    assert fingerprint() == before
    build(3).to_parquet(tmp_path / "train.parquet")
    assert fingerprint() != before


def test_a_commit_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Hub is asked for, and that another commit is another source; local files stand in for it."""
    asked: list[tuple[Any, ...]] = []

    def dataset_info(self: object, name: str, revision: str | None, timeout: float) -> SimpleNamespace:
        asked.append((name, revision))
        return SimpleNamespace(sha=f"commit of {revision}")

    def load_dataset(path: str, **settings: Any) -> Any:
        asked.append((path, settings["revision"], settings["name"]))
        return local(str(folder / "parquet"), split=settings["split"], streaming=settings["streaming"])

    local = datasets.load_dataset
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first, second = (
        open_like_a_config("hf:someone/something", streaming=True, revision=revision, config="large").fingerprint
        for revision in ("v1", None)
    )
    assert first != second
    name = "someone/something"
    assert asked == [(name, "v1"), (name, "v1", "large"), (name, None), (name, None, "large")]


@pytest.mark.parametrize(("label", "message"), [(-1, "from 0 to 2 .* got -1 in .*row 1"), (None, "row 1 has no label")])
def test_labels_that_are_none(label: int | None, message: str, tmp_path: Path) -> None:
    build(2, label=[0, label]).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        list(open_like_a_config(f"hf:{tmp_path}").items(0))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("parquet", {"split": "test"}, "cannot open hf:.*parquet, split 'test': Unknown split"),
        ("saved", {"split": "test"}, r"split 'test': it has train \(data.source_split\)"),
        ("splits", {"split": "val"}, "it has train, test"),
        ("cache", {"streaming": True}, "cannot open hf:.*cache, split 'train'"),
        ("parquet", {"image_key": "img"}, r"data.image_key: .*\(image, label, caption\), got 'img'"),
        ("parquet", {"image_key": "caption"}, r"data.image_key: .* got 'caption', which is Value\('string'\)"),
        ("parquet", {"label_key": "caption"}, r"got 'caption', .*: dataset.class_encode_column\('caption'\).save_to"),
        ("parquet", {"revision": "v1"}, r"data.source_revision is for data sets on the Hub; leave it out"),
        ("saved", {"config": "small"}, r"data.source_config is not for a folder of save_to_disk; leave it out"),
    ],
)
def test_data_sets_that_are_refused(name: str, settings: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "cache").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        open_like_a_config(f"hf:{folder / name}", **settings)


def test_the_hub_is_out_of_reach(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(ValueError, match=r"cannot open hf:someone/something, .*HF_HUB_OFFLINE=1 uses what is cached"):
        open_like_a_config("hf:someone/something")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot open hf:someone/something, .*Couldn't reach"):
        open_like_a_config("hf:someone/something", streaming=True)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "iwin-dit\[hf\]"'):
        open_like_a_config("hf:someone/something")
