"""Folders of class folders, opening a source by its name, and the split rule."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iwin_dit.data.images import BrokenImageError
from iwin_dit.data.sources import ImageFolder, ImageSource, check_label, keyed_permutation, open_source, split_indices
from tests.corpus import BLUE, RED, broken_images, encode


def open_like_a_config(source: str | Path, **settings: Any) -> ImageSource:
    """`open_source` with the configuration's defaults."""
    defaults: dict[str, Any] = {
        "split": "train",
        "revision": None,
        "config": None,
        "streaming": False,
        "image_key": None,
        "label_key": None,
        "class_names": None,
        "num_classes": 3,
        "part_size": 4,
    }
    return open_source(str(source), **(defaults | settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes ant (3 blue images), bee (1) and zebra (2 red ones, a level deeper)."""
    files = ["ant/1.png", "ant/2.png", "ant/3.png", "bee/1.png", "zebra/deeper/1.PNG", "zebra/deeper/2.png"]
    for file in files:
        path = tmp_path / "photos" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(Image.new("RGB", (20, 12), RED if "zebra" in file else BLUE)))
        (path.parent / ".hidden").write_text("left alone")
    return tmp_path / "photos"


def test_a_folder_is_cut_into_parts_in_order(folder: Path) -> None:
    source = open_like_a_config(folder)
    assert source.description == str(folder)
    assert source.class_names == ("ant", "bee", "zebra")
    assert source.num_parts == 2
    parts = [list(source.items(part)) for part in range(2)]
    assert [[sample.label for sample in part] for part in parts] == [[0, 0, 0, 1], [2, 2]]
    assert parts[1][0].key == str(folder / "zebra/deeper/1.PNG")
    assert parts[1][0].read()[0].getpixel((0, 0)) == RED
    assert [sample.key for sample in source.items(1)] == [sample.key for sample in parts[1]]


def test_a_broken_image_is_found_when_it_is_read(folder: Path) -> None:
    (folder / "bee" / "1.png").write_bytes(broken_images()["truncated.jpg"])
    broken = list(open_like_a_config(folder).items(0))[3]
    with pytest.raises(BrokenImageError, match=r"bee/1.png: OSError: .* truncated"):
        broken.read()


def test_folder_errors_come_before_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        ImageFolder(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match="found no folder there"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.gif").touch()
    with pytest.raises(ValueError, match=r"no images .* cat; fill or remove"):
        ImageFolder(tmp_path, 8)


def test_files_that_are_not_named_as_images_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ImageFolder(folder, 8).num_ignored == 0
    assert not caplog.text
    for name in ("1.gif", "2.tif", "3.avif", "4.jfif"):
        (folder / "ant" / name).touch()
    assert ImageFolder(folder, 8).num_ignored == 4
    (warning,) = caplog.messages
    assert warning.startswith(f"4 files in {folder} are not named as images (.png, ")
    assert warning.endswith(f"{folder}/ant/1.gif, {folder}/ant/2.tif, {folder}/ant/3.avif, ...")


def test_hidden_folders_are_left_alone_and_links_are_followed(folder: Path, tmp_path: Path) -> None:
    before = [sample.key for part in range(2) for sample in open_like_a_config(folder).items(part)]
    elsewhere = tmp_path / "elsewhere"
    for hidden in (".cache", "ant/.thumbnails", "zebra/deeper/.ipynb_checkpoints"):
        (folder / hidden).mkdir()
        (folder / hidden / "1.png").touch()
    (folder / "ant" / ".thumbnails" / "notes.txt").touch()
    source = ImageFolder(folder, 8)
    assert source.class_names == ("ant", "bee", "zebra")
    assert [sample.key for sample in source.items(0)] == before
    assert source.num_ignored == 0
    (folder / "zebra" / "deeper").rename(elsewhere)
    (folder / "zebra" / "deeper").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder / "zebra", target_is_directory=True)
    (folder / "bee" / "self").symlink_to(folder / "bee", target_is_directory=True)
    assert [sample.key for sample in ImageFolder(folder, 8).items(0)] == before


def test_a_changed_folder_is_another_source(folder: Path) -> None:
    before = ImageFolder(folder, 8).fingerprint
    moved = folder.rename(folder.with_name("moved"))
    (moved / "ant" / "notes.txt").touch()
    assert ImageFolder(moved, 8).fingerprint == before  # what it depends on is below the folder, and an image
    image = moved / "ant" / "1.png"
    image.rename(moved / "ant" / "0.png")
    renamed = ImageFolder(moved, 8).fingerprint
    (moved / "ant" / "0.png").write_bytes(b"?")
    assert len({before, renamed, ImageFolder(moved, 8).fingerprint}) == 3


def test_class_names_from_a_file(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Ameise\nHonigbiene, wilde\n斑馬\n", encoding="utf-8")
    assert open_like_a_config(folder, class_names=names).class_names == ("Ameise", "Honigbiene, wilde", "斑馬")
    with pytest.raises(ValueError, match=r"expected 4 class names in .*names.txt.* got 3 lines, 0 of them empty"):
        open_like_a_config(folder, class_names=names, num_classes=4)
    names.write_text("a\n\nb\n")
    with pytest.raises(ValueError, match="got 3 lines, 1 of them empty"):
        open_like_a_config(folder, class_names=names)
    names.write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"data.class_names lists 2 names, but .*photos has 3 classes"):
        open_like_a_config(folder, class_names=names, num_classes=2)
    with pytest.raises(ValueError, match=r"gone.txt, which is not a file"):
        open_like_a_config(folder, class_names=tmp_path / "gone.txt")


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("photos", {"streaming": True, "split": "test"}, "data.source_split, data.streaming is for a Hugging Face"),
        ("a.tar", {"split": "test"}, "data.source_split is for a Hugging Face"),
        ("a.tar", {"revision": "v1", "config": "a"}, "data.source_revision, data.source_config is for a Hugging Face"),
        ("digits", {"image_key": "png"}, "data.image_key is for tars and Hugging Face"),
        ("photos", {"label_key": "cls"}, "data.label_key is for tars and Hugging Face"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(source: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_like_a_config(source, **settings)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(ValueError, match=rf"from 0 to 9 \(10 classes\), got {label} in a.tar/1.png"):
        check_label(label, 10, "a.tar/1.png")


def test_split_is_stratified_disjoint_and_fixed() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 2 + [7] * 19
    train, held_out = split_indices(labels, 20, seed=3)
    assert len(held_out) == 20
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    assert np.bincount(np.asarray(labels)[held_out], minlength=8).tolist() == [10, 6, 0, 0, 0, 0, 0, 4]
    assert set(np.asarray(labels)[train]) == {0, 1, 2, 7}
    assert np.array_equal(held_out, split_indices(labels, 20, seed=3)[1])
    assert not np.array_equal(held_out, split_indices(labels, 20, seed=4)[1])
    assert len(split_indices(labels, 0.1, seed=0)[1]) == 10
    assert np.bincount(np.asarray(labels)[split_indices(labels, 97, seed=0)[0]]).tolist() == [1, 1, 1, 0, 0, 0, 0, 1]
    for holdout in (0.0001, 98, 1.0, -1):
        with pytest.raises(ValueError, match=r"holdout of 1 to 97 .*, or 0, got"):
            split_indices(labels, holdout, seed=0)


@pytest.mark.parametrize("holdout", [0, 0.0])
def test_nothing_need_be_held_out(holdout: float) -> None:
    for labels in ([0, 0, 1], [0, 1]):  # of the second, nothing could be
        train, held_out = split_indices(labels, holdout, seed=0)
        assert (train.tolist(), held_out.tolist()) == (list(range(len(labels))), [])


def test_keyed_permutation_is_pinned() -> None:
    assert keyed_permutation(8, 0, 1).tolist() == [0, 3, 4, 2, 1, 6, 5, 7]  # splits and epochs of old runs rest on it
    assert np.array_equal(np.sort(keyed_permutation(1000, 5)), np.arange(1000))


def test_no_two_keys_share_a_permutation() -> None:
    """Not even where numpy alone would read them as one seed."""
    keys = [(), (5,), (5, 0), (5, 0, 0), (0, 5), (2**32, 1), (0, 1, 1), (0, 2**32 + 1), (2**64 - 1,), (2**32 - 1,)]
    assert len({tuple(keyed_permutation(100, *key)) for key in keys}) == len(keys)
