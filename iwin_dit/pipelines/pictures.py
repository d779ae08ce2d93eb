"""Labelled grids of pictures and of clips, for previews and samples, and clips as GIFs."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GIF_MAX_FPS = 50.0  # a GIF counts time in hundredths of a second, and players take 2 of them to be the least
GIF_MIN_FPS = 100 / 65535  # in 16 bits
GRID_MAX_SIDE = 65535  # pixels of a GIF: 16 bits
GRID_MAX_PIXELS = 2**28  # of all frames of a grid together, which lie in memory at once: 0.8 GB


def image_grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], cell: int = 64) -> Image.Image:
    """Lay out pictures in rows, each with a label in front.

    Args:
        rows: PIL images, one list per row.
        labels: Text per row.
        cell: Smallest height of a picture in pixels; smaller ones are enlarged by a whole factor, without smoothing.

    Returns:
        One picture.
    """
    (width, height), font, margin = _layout(rows[0][0].size, labels, cell)
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", grid_size(rows[0][0].size, columns, labels, cell), "white")
    draw = ImageDraw.Draw(grid)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        middle = y * (height + 2) + height // 2
        draw.text((margin - 2, middle), label, fill="black", font=font, anchor="rm")
        for x, image in enumerate(row):
            picture = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (margin + 4 + x * (width + 2), y * (height + 2)))
    return grid


def grid_size(size: tuple[int, int], columns: int, labels: Sequence[str], cell: int = 64) -> tuple[int, int]:
    """Size of an `image_grid`.

    Args:
        size: Width and height of a picture in pixels.
        columns: Pictures in a row.
        labels: Text per row.
        cell: As for `image_grid`.

    Returns:
        Width and height in pixels.
    """
    (width, height), _, margin = _layout(size, labels, cell)
    return margin + 4 + columns * (width + 2), len(labels) * (height + 2)


def check_grid(
    size: tuple[int, int], columns: int, labels: Sequence[str], frames: int = 1, fps: float | None = None
) -> None:
    """Refuse a grid that is too large for a file or for memory, or too fast for a GIF.

    Args:
        size: Width and height of a picture in pixels.
        columns: Pictures in a row.
        labels: Text per row.
        frames: Of a clip, each of which is a grid.
        fps: Frames per second of clips; None of pictures.

    Raises:
        ValueError: If a side is longer than `GRID_MAX_SIDE`, the frames have more than `GRID_MAX_PIXELS` together, or
            `check_gif` refuses the rate.
    """
    if fps is not None:
        check_gif(fps)
    width, height = grid_size(size, columns, labels)
    if max(width, height) > GRID_MAX_SIDE or frames * width * height > GRID_MAX_PIXELS:
        raise ValueError(
            f"a grid has sides of at most {GRID_MAX_SIDE:,} pixels and {GRID_MAX_PIXELS:,} pixels in all, got "
            f"{frames} of {width:,} x {height:,}"
        )


def _layout(
    size: tuple[int, int], labels: Sequence[str], cell: int
) -> tuple[tuple[int, int], ImageFont.ImageFont | ImageFont.FreeTypeFont, int]:
    """Width and height of a picture as shown, the font of the labels, and the width that they take."""
    factor = max(1, -(-cell // size[1]))
    width, height = size[0] * factor, size[1] * factor
    font = ImageFont.load_default(size=max(12, height // 5))
    return (width, height), font, 8 + max(int(font.getlength(label)) for label in labels)


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
        ValueError: If it is not from `GIF_MIN_FPS` to `GIF_MAX_FPS`.
    """
    if not GIF_MIN_FPS <= fps <= GIF_MAX_FPS:
        rates = f"{GIF_MIN_FPS:.2g} to {GIF_MAX_FPS:g} frames per second"
        raise ValueError(f"a GIF shows {rates}, got {fps:g}: choose another rate or format")


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


def save_frames(frames: Sequence[Image.Image], folder: Path) -> None:
    """Write frames as PNGs, 0000.png and so on: without loss, and as clips are read from folders.

    Args:
        frames: PIL images.
        folder: Where; PNGs that it has already are deleted, or a longer clip's would be read as the end of this one.
    """
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.png"):
        path.unlink()
    for i, frame in enumerate(frames):
        frame.save(folder / f"{i:04d}.png")


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
