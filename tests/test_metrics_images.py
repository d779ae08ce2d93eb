"""Folders of images: what is read, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iwin_dit.metrics.images import ImageFiles


def save(path: Path, size: tuple[int, int] = (5, 4), mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels).convert(mode).save(path)
    return path


def test_images_come_in_the_order_of_their_paths_bit_for_bit(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, seed=i) for i, name in enumerate(["a/1.png", "a/2.PNG", "b/0.bmp", "c.png"])]
    (tmp_path / "notes.txt").write_text("no image")
    files = ImageFiles(tmp_path, allow_jpeg=False)
    assert files.paths == paths
    assert files.size == (4, 5)
    batch = files.read(range(4))
    assert batch.shape == (4, 3, 4, 5)
    for image, path in zip(batch, paths, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_grayscale_becomes_rgb(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.png", mode="L", seed=i)
    red, green, blue = ImageFiles(tmp_path, allow_jpeg=False).read([1])[0]
    assert red.equal(green)
    assert red.equal(blue)


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    for folder, seeds in (("a", (0, 1)), ("b", (0, 1)), ("c", (0, 2))):
        for i, seed in enumerate(seeds):
            save(tmp_path / folder / f"{i}.png", seed=seed)
    a, b, c = (ImageFiles(tmp_path / folder, allow_jpeg=False).sha256() for folder in "abc")
    assert a == b != c


def test_folders_that_cannot_count_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing, which is none"):
        ImageFiles(tmp_path / "missing", allow_jpeg=True)
    save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"at least 2 images .* got 1"):
        ImageFiles(tmp_path, allow_jpeg=True)
    save(tmp_path / "1.png", size=(6, 4))
    with pytest.raises(ValueError, match=r"one size in .*, got 1 of 4 x 5, 1 of 4 x 6"):
        ImageFiles(tmp_path, allow_jpeg=True)


def test_jpeg_is_for_references_only(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.jpg")
    assert len(ImageFiles(tmp_path, allow_jpeg=True)) == 2
    with pytest.raises(ValueError, match=r"0\.jpg is JPEG"):
        ImageFiles(tmp_path, allow_jpeg=False)


def test_a_jpeg_named_png_is_a_jpeg(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.jpg").rename(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"0\.png is JPEG"):
        ImageFiles(tmp_path, allow_jpeg=False)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_modes_without_one_meaning_are_refused(tmp_path: Path, mode: str) -> None:
    for i in range(2):
        Image.new("RGB", (5, 4)).convert(mode).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=f"is {mode}: convert it first"):
        ImageFiles(tmp_path, allow_jpeg=False)


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole, cut = save(tmp_path / "0.png", size=(64, 64)), save(tmp_path / "1.png", size=(64, 64), seed=1)
    cut.write_bytes(cut.read_bytes()[:2000])
    files = ImageFiles(tmp_path, allow_jpeg=False)  # the header is whole
    with pytest.raises(ValueError, match=r"1\.png is broken"):
        files.read([0, 1])
    whole.write_text("no image at all")
    with pytest.raises(ValueError, match=r"0\.png is no usable image"):
        ImageFiles(tmp_path, allow_jpeg=False)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)  # of 20: where Pillow alone only warns
    with pytest.raises(ValueError, match="decompression bomb"):
        ImageFiles(tmp_path, allow_jpeg=False)
