"""The one image decoder and the crop, on bad and odd files."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iwin_dit.data import images
from iwin_dit.data.images import BrokenImageError, centre_crop, read_image
from tests.corpus import BLUE, RED, broken_images, encode, exif_rotated, large_png, odd_images

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
ODD, BROKEN = odd_images(), broken_images()


@pytest.mark.parametrize("name", ODD)
def test_every_mode_becomes_rgb(name: str, tmp_path: Path) -> None:
    content, colour = ODD[name]
    (tmp_path / name).write_bytes(content)
    for image in (read_image(content, name), read_image(tmp_path / name, name)):
        assert image.mode == "RGB"
        assert np.asarray(image).reshape(-1, 3).mean(0) == pytest.approx(colour, abs=2)  # CMYK is JPEG


def test_exif_orientation_is_applied() -> None:
    upright = read_image(exif_rotated(), "x")
    assert upright.size == (8, 16)
    for y, colour in ((2, BLUE), (13, RED)):
        assert upright.getpixel((4, y)) == pytest.approx(colour, abs=3)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named(name: str) -> None:
    with pytest.raises(BrokenImageError, match=rf"^a folder/{name}: \w+"):
        read_image(BROKEN[name], f"a folder/{name}")


def test_a_file_that_cannot_be_read_is_no_broken_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "gone.png", "gone.png")


def test_images_over_the_pixel_limit_are_not_allocated(tmp_path: Path) -> None:
    """A process of its own, whose peak memory is known: decoded, the larger one would take 576 MB."""
    for name in ("huge.png", "large.png"):
        (tmp_path / name).write_bytes(BROKEN[name])
    (tmp_path / "fits.png").write_bytes(large_png(3_000))
    code = (
        "import resource, runpy, sys; from pathlib import Path\n"
        "images = runpy.run_path(sys.argv[1]); read_image = images['read_image']\n"  # spares the import of torch
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"  # MiB on Linux
        "folder = Path(sys.argv[2]); read_image(folder / 'fits.png', ''); before = peak()\n"
        "for name in ('huge.png', 'large.png'):\n"
        "    try: read_image(folder / name, name)\n"
        "    except images['BrokenImageError']: print(name, peak() - before)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, images.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth = dict(line.split() for line in done.stdout.splitlines())
    assert list(growth) == ["huge.png", "large.png"]
    assert max(map(float, growth.values())) < 100


def test_reading_in_threads() -> None:
    contents = [content for content, _ in ODD.values()] * 8 + [BROKEN["large.png"], exif_rotated()] * 8
    filters = list(warnings.filters)

    def read(content: bytes) -> bytes | None:
        try:
            return read_image(content, "x").tobytes()
        except BrokenImageError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, contents)) == [read(content) for content in contents]
    assert warnings.filters == filters


# --- the crop, against its definition: convolutions written out


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def resize_axis(values: np.ndarray, size: int, kernel: Callable[[np.ndarray], np.ndarray], axis: int) -> np.ndarray:
    """One axis of a uint8 array, the kernel widened when it shrinks, the result rounded to uint8."""
    ratio = values.shape[axis] / size
    centres = (np.arange(size) + 0.5) * ratio
    weights = kernel((np.arange(values.shape[axis]) - centres[:, None] + 0.5) * (1 / max(ratio, 1)))
    weights /= weights.sum(1, keepdims=True)
    resized = np.moveaxis(np.tensordot(weights, values.astype(float), (1, axis)), 0, axis)
    return (resized.clip(0, 255) + 0.5).astype(np.uint8)


def adm_crop(values: np.ndarray, resolution: int) -> np.ndarray:
    """ADM's crop of an image (H, W, 3)."""
    while min(values.shape[:2]) >= 2 * resolution:
        height, width = values.shape[0] // 2, values.shape[1] // 2
        values = resize_axis(resize_axis(values, width, box, 1), height, box, 0)
    scale = resolution / min(values.shape[:2])
    height, width = round(values.shape[0] * scale), round(values.shape[1] * scale)
    values = resize_axis(resize_axis(values, width, bicubic, 1), height, bicubic, 0)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return values[top : top + resolution, left : left + resolution]


@pytest.mark.parametrize(("width", "height", "resolution"), [(64, 16, 16), (37, 91, 12), (5, 7, 8), (207, 126, 20)])
def test_the_crop_is_adms(width: int, height: int, resolution: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cropped = np.asarray(centre_crop(Image.fromarray(values), resolution)).astype(int)
    assert cropped.shape == (resolution, resolution, 3)
    assert np.abs(cropped - adm_crop(values, resolution)).max() <= 1  # Pillow's weights are of 22 bits


def test_the_crop_leaves_an_image_of_the_right_size_alone() -> None:
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    assert centre_crop(image, 32).tobytes() == image.tobytes()


def test_the_crop_refuses_what_would_become_too_large() -> None:
    with pytest.raises(BrokenImageError, match="1 x 20000 pixels is too thin"):
        centre_crop(read_image(encode(Image.new("L", (1, 20_000))), "x"), 256)
