"""Labelled grids of pictures, for previews and samples."""

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
