"""Labelled grids of pictures, alone and side by side, for previews and samples."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


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
