"""Image files to square RGB images: the one decoder that every image source uses, and ADM's resize and crop.

Knows nothing of labels, data sets or tensors. Everything here may be called from several threads at once.
Letter: R image side.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # the only decoders Pillow may try: the rare ones are where its holes are
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PIXELS = 128 * 2**20  # 384 MiB of RGB; more than the largest cameras, less than a decompression bomb


class BrokenSampleError(ValueError):
    """An image or a clip that cannot be used; the message names it. The reader decides how many of them to skip."""


class BrokenImageError(BrokenSampleError):
    """An image that cannot be decoded."""


def read_image(file: Path | bytes, key: str) -> Image.Image:
    """Read one image as RGB.

    Args:
        file: A PNG, JPEG, WEBP or BMP file or its content, whatever its name says; of an animation, the first frame.
        key: Names the image in messages.

    Returns:
        The RGB image, upright (EXIF orientation applied). For what becomes of other modes see `to_rgb`.

    Raises:
        BrokenImageError: Not such a file, truncated, or of more than `MAX_PIXELS` pixels (which are not allocated).
        OSError: The file cannot be read at all: a failing disk is no reason to skip images.
    """
    content = file if isinstance(file, bytes) else file.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # Pillow's own limit is a warning that cannot be made an error for one thread, and an error far above.
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,} in all")
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # on damaged files Pillow raises nearly anything: TypeError, SyntaxError, struct.error
        raise BrokenImageError(f"{key}: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency is composited on white, 16-bit grey is scaled to 8 bits (not clipped)."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255
        values = np.asarray(image)
        grey = (values.astype(np.float64) / 257).round().astype(np.uint8)
        grey[values == image.info.get("transparency")] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Resize the short side to `resolution` and cut the central square, as ADM's data loader does (arXiv 2105.05233).

    The image is halved with a box filter while its short side is at least twice the target, which avoids aliasing, then
    resized bicubically.

    Args:
        image: An RGB image of any size; a smaller one is enlarged.
        resolution: Side R of the result.

    Returns:
        An RGB image of R x R pixels.

    Raises:
        BrokenImageError: So long and thin that it would have more than `MAX_PIXELS` pixels before the crop.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise BrokenImageError(f"{image.width} x {image.height} pixels is too thin to become a square of {resolution}")
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + resolution, top + resolution))
