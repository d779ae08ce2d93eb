"""Bad and odd image files, built in code: what a real folder of images holds sooner or later."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_start(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """Signature and header of a PNG; colour 0 is grey, 2 is RGB."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


def large_png(side: int) -> bytes:
    """A whole black square of one bit a pixel: small on disk and quick to make, 4 bytes a pixel once it is RGB."""
    rows = zlib.compress(bytes((1 + -(-side // 8)) * side), 1)
    return png_start(side, side, bits=1, colour=0) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def odd_images() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Images in every mode and format that is read, by name, each with the one colour it must have as RGB."""
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *BLUE])
    grey16 = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    animation = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    return {
        "rgb.png": (encode(Image.new("RGB", (4, 4), RED)), RED),
        "rgb.bmp": (encode(Image.new("RGB", (4, 4), RED), "BMP"), RED),
        "rgb.webp": (encode(Image.new("RGB", (4, 4), RED), "WEBP", lossless=True), RED),
        "a png by content.jpg": (encode(Image.new("RGB", (4, 4), BLUE)), BLUE),
        "grey.png": (encode(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        "one bit.png": (encode(Image.new("1", (4, 4), 1)), WHITE),
        "16-bit.png": (encode(grey16), (100, 100, 100)),
        "16-bit transparent.png": (
            png_start(1, 1, bits=16, colour=0)
            + png_chunk(b"tRNS", b"\x12\x34")
            + png_chunk(b"IDAT", zlib.compress(b"\0\x12\x34"))
            + png_chunk(b"IEND", b""),
            WHITE,
        ),
        "16-bit colour.png": (
            png_start(1, 1, bits=16)
            + png_chunk(b"IDAT", zlib.compress(b"\0\xff\xff\0\0\0\0"))
            + png_chunk(b"IEND", b""),
            RED,
        ),
        "rgba.png": (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 51))), (255, 204, 204)),  # a fifth of red on white
        "rgba.webp": (encode(Image.new("RGBA", (4, 4), (0, 0, 255, 0)), "WEBP", lossless=True), WHITE),
        "grey alpha.png": (encode(Image.new("LA", (4, 4), (0, 0))), WHITE),
        "transparent colour.png": (encode(Image.new("RGB", (4, 4), RED), transparency=RED), WHITE),
        "palette.png": (encode(palette), BLUE),
        "palette transparent.png": (encode(palette, transparency=1), WHITE),
        "cmyk.jpg": (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), RED),
        "animated.png": (encode(animation[0], save_all=True, append_images=animation[1:]), RED),
        "animated.webp": (
            encode(animation[0], "WEBP", save_all=True, append_images=animation[1:], lossless=True),
            RED,
        ),
    }


def exif_rotated() -> bytes:
    """16 x 8 pixels as stored, 8 x 16 when upright, with the blue half on top."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it 90 degrees clockwise to see it upright: the left half comes to the top
    return encode(image, "JPEG", exif=exif, quality=100, subsampling=0)


def broken_images() -> dict[str, bytes]:
    """Files that must be refused, by name."""
    noise = encode(Image.effect_noise((64, 64), 50), "JPEG")
    return {
        "truncated.jpg": noise[:-200],
        "empty.png": b"",
        "text.png": b"this is not an image",
        "another format.png": encode(Image.new("L", (4, 4)), "GIF"),
        "short chunk.png": png_start(4, 4) + png_chunk(b"tRNS", b"") + b"\0\0\0\x08IDATabc",
        "huge.png": png_start(30_000, 30_000),
        "large.png": large_png(12_000),
    }
