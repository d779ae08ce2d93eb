"""Image folders built file by file, and the split rule."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iwin_dit.data.sources import (
    BrokenImageError,
    ImageFolder,
    centre_crop,
    keyed_permutation,
    read_image,
    split_indices,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_folder_reads_classes_in_order(tmp_path: Path) -> None:
    for name, colour in (("zebra", RED), ("ant", BLUE)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.new("RGB", (20, 12), colour).save(tmp_path / name / "deeper" / "a.PNG")
        (tmp_path / name / "notes.txt").write_text("left alone")
    source = ImageFolder(tmp_path, resolution=8)
    assert source.class_names == ("ant", "zebra")
    assert source.labels == [0, 1]
    assert len(source) == 2
    assert source[1].shape == (3, 8, 8)
    assert source[1].dtype == torch.uint8
    assert source[1].float().mean((1, 2)).tolist() == [255, 0, 0]


def test_folder_errors_come_before_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        ImageFolder(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match="found no folder there"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.gif").touch()
    with pytest.raises(ValueError, match=r"no images .* cat; fill or remove"):
        ImageFolder(tmp_path, 8)


def mean_colour(path: Path) -> tuple[int, ...]:
    return tuple(np.asarray(read_image(path)).reshape(-1, 3).mean(0).round().astype(int))


def test_modes_become_rgb(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(path)
    assert mean_colour(path) == (255, 204, 204)  # a fifth of red on white
    Image.new("LA", (4, 4), (0, 0)).save(path)
    assert mean_colour(path) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *BLUE])
    palette.save(path)
    assert mean_colour(path) == BLUE
    palette.save(path, transparency=1)
    assert mean_colour(path) == (255, 255, 255)
    Image.new("L", (4, 4), 77).save(path)
    assert mean_colour(path) == (77, 77, 77)
    Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)).save(path)
    assert mean_colour(path) == (100, 100, 100)  # 16 bits, scaled
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, format="JPEG")
    assert mean_colour(path)[0] > 200
    assert max(mean_colour(path)[1:]) < 60


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to see it upright: the left half comes to the top
    image.save(tmp_path / "x.png", exif=exif)
    upright = read_image(tmp_path / "x.png")
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2)) == BLUE


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_broken_files_are_named(tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(good, format="JPEG")
    broken = {
        "truncated.jpg": good.getvalue()[:-200],
        "empty.png": b"",
        "text.png": b"this is not an image",
        "huge.png": png_header(30_000, 30_000),
        "large.png": png_header(12_000, 12_000),  # Pillow only warns of this one
    }
    header = png_header(4, 4)
    broken["odd.png"] = header + b"\0\0\0\0tRNS" + struct.pack(">I", zlib.crc32(b"tRNS")) + b"\0\0\0\x08IDATabc"
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenImageError, match=name):
            read_image(tmp_path / name)


def test_centre_crop() -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (16, 1, 3))  # 64 x 16: the crop is columns 24 to 39
    same = np.asarray(centre_crop(Image.fromarray(ramp), 16))
    assert np.array_equal(same, ramp[:, 24:40])
    quarter = np.asarray(centre_crop(Image.fromarray(ramp), 4)).astype(int)  # two box halvings: means of four columns
    assert quarter[0, :, 0] == pytest.approx([25.5, 29.5, 33.5, 37.5], abs=1)
    assert centre_crop(Image.new("RGB", (5, 7)), 8).size == (8, 8)
    assert centre_crop(Image.new("RGB", (37, 91)), 12).size == (12, 12)


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
    for holdout in (0, 0.0, 98, 1.0, -1):
        with pytest.raises(ValueError, match="holdout of 1 to 97"):
            split_indices(labels, holdout, seed=0)


def test_keyed_permutation_is_pinned() -> None:
    assert keyed_permutation(8, 0, 1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]  # splits and epochs of old runs rest on it
    assert np.array_equal(np.sort(keyed_permutation(1000, 5)), np.arange(1000))
