"""Labelled grids of pictures and of clips, for previews and samples, and clips as files that can be played."""

import contextlib
import importlib.util
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from diffusers.utils.export_utils import encode_video
from PIL import Image, ImageDraw, ImageFont

GIF_MAX_FPS = 50.0  # a GIF counts time in hundredths of a second, and players take 2 of them to be the least


def image_grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], cell: int = 64) -> Image.Image:
    """Lay out pictures in rows, each with a label in front.

    Args:
        rows: PIL images, one list per row.
        labels: Text per row.
        cell: Smallest height of a picture in pixels; smaller ones are enlarged by a whole factor, without smoothing.

    Returns:
        One picture.
    """
    width, height = rows[0][0].size
    factor = max(1, -(-cell // height))
    width, height = width * factor, height * factor
    font = ImageFont.load_default(size=max(12, height // 5))
    margin = 8 + max(int(font.getlength(label)) for label in labels)
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (margin + 4 + columns * (width + 2), len(rows) * (height + 2)), "white")
    draw = ImageDraw.Draw(grid)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        middle = y * (height + 2) + height // 2
        draw.text((margin - 2, middle), label, fill="black", font=font, anchor="rm")
        for x, image in enumerate(row):
            picture = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (margin + 4 + x * (width + 2), y * (height + 2)))
    return grid


def clip_grid(rows: Sequence[Sequence[Sequence[Image.Image]]], labels: Sequence[str]) -> list[Image.Image]:
    """Lay out clips in rows, each with a label in front.

    Args:
        rows: Clips, one list per row; a clip is the list of its frames, as many in each.
        labels: Text per row.

    Returns:
        One `image_grid` per frame.

    Raises:
        ValueError: If the clips differ in length.
    """
    lengths = {len(clip) for row in rows for clip in row}
    if len(lengths) != 1:
        raise ValueError(f"expected clips of one length, got {sorted(lengths)} frames")
    return [image_grid([[clip[t] for clip in row] for row in rows], labels) for t in range(*lengths)]


def check_gif(fps: float) -> None:
    """Refuse a rate that no GIF can be played at.

    Args:
        fps: Frames per second.

    Raises:
        ValueError: If it is not above 0 and at most `GIF_MAX_FPS`.
    """
    if not 0.0 < fps <= GIF_MAX_FPS:
        raise ValueError(f"a GIF shows more than 0 and at most {GIF_MAX_FPS:g} frames per second, got {fps:g}")


def save_gif(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write frames as a GIF that repeats for ever, 256 colours a frame.

    A GIF counts in hundredths of a second. Each frame begins at the one nearest to its time, so that the clip plays at
    `fps` on the whole; diffusers' `export_to_gif` would round every frame alike, and play 8 frames per second as 8.33.
    A frame that equals the one before is not stored again: that one is shown for longer.

    Args:
        frames: PIL images of one size.
        path: File to write.
        fps: Frames per second.

    Raises:
        ValueError: If `check_gif` refuses the rate.
    """
    check_gif(fps)
    starts = [10 * round(100 * i / fps) for i in range(len(frames) + 1)]  # in milliseconds, as Pillow wants them
    durations = [end - start for start, end in itertools.pairwise(starts)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def check_mp4(width: int, height: int, fps: float) -> None:
    """Refuse what diffusers' `encode_video` would fail at, or change: it writes H.264 at whole frames per second.

    Args:
        width: Of a frame, in pixels.
        height: Likewise.
        fps: Frames per second.

    Raises:
        ValueError: If a side is odd, or the rate is not a whole number.
        ImportError: If PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise ImportError('an MP4 file needs PyAV: pip install "iwin-dit[video]"')
    if width % 2 or height % 2:
        raise ValueError(f"an MP4 file (H.264, yuv420p) has even sides, got {width} x {height} pixels")
    if fps < 1 or fps % 1:
        raise ValueError(f"an MP4 file is written at whole frames per second, got {fps:g}")


def save_mp4(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write frames as an MP4 file: H.264, with loss.

    Args:
        frames: PIL images of one size, RGB.
        path: File to write.
        fps: Frames per second.

    Raises:
        ValueError: If `check_mp4` refuses size or rate.
        ImportError: If PyAV is not installed.
    """
    check_mp4(*frames[0].size, fps)
    with contextlib.redirect_stderr(io.StringIO()):  # it shows a progress bar for every file
        encode_video(list(frames), int(fps), str(path))


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Lay out pictures from left to right, each under its title.

    Args:
        pictures: PIL images of one height.
        titles: Text per picture.

    Returns:
        One picture.
    """
    header, gap = 24, 16
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (width, header + pictures[0].height), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=14)
    x = 0
    for picture, title in zip(pictures, titles, strict=True):
        draw.text((x + picture.width // 2, header // 2), title, fill="black", font=font, anchor="mm")
        page.paste(picture, (x, header))
        x += picture.width + gap
    return page
