"""Whether clips show the digit that was asked for, and move it as real ones do: features of the moving digits.

The digit is cut out of each frame where its brightness lies, and recognised by a classifier that has seen still digits
alone. Must not know where clips and labels come from, nor how real digits move.

Letters: B frames of a batch, or clips of it; N clips of a set, T frames, H W image axes, R side of the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .digits import IMAGE_SIZE, NUM_CLASSES, DigitsFeatures
from .inputs import exact_float32, expect_clips
from .network import FeatureNetwork

BACKGROUND = 32  # grey levels of 255 that count as black: a decoder's noise must not move the centre of mass
BLANK = 10.0  # fully bright pixels above the background that a frame must have in all; real digits have 40 and more
_NO_STEP = -1.0  # in place of a displacement from or to a blank frame


@dataclass(frozen=True)
class Motion:
    """What a set of clips comes to.

    Attributes:
        recognition: Share of frames that are recognised as the label of their clip; a blank one is not.
        by_class: The same of the clips of each label; None where there are none.
        displacement: Median over clips and pairs of neighbouring frames of the way of the digit's centre of mass, in
            pixels; 0 where there are no two frames with a digit in them.
        blank: Share of frames without a digit.
    """

    recognition: float
    by_class: tuple[float | None, ...]
    displacement: float
    blank: float


def crop_digits(frames: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the digit out of each frame: a window around the centre of mass of what is brighter than the background.

    The window is enlarged bilinearly to the size that the classifier takes; beyond the frame it is black.

    Args:
        frames: `(B, 3, H, W)` uint8, bright on black.
        window: R, in pixels of the frame.

    Returns:
        The digits, `(B, 3, 32, 32)` uint8; the centres (y, x) in pixels, `(B, 2)` float32; and which frames are blank,
        `(B,)` bool, whose digit and centre mean nothing.
    """
    H, W = frames.shape[-2:]
    light = (frames.float().mean(dim=1) - BACKGROUND).clamp(min=0) / (255 - BACKGROUND)  # (B, H, W)
    mass = light.sum(dim=(1, 2))
    y, x = (torch.arange(n, device=frames.device) + 0.5 for n in (H, W))  # of the centres of the pixels
    moments = torch.stack([light.sum(dim=2) @ y, light.sum(dim=1) @ x], dim=1)
    centres = moments / mass.clamp(min=1e-6)[:, None]
    places = (torch.arange(IMAGE_SIZE, device=frames.device) + 0.5) * (window / IMAGE_SIZE) - window / 2
    rows, columns = ((centres[:, i, None] + places) * (2 / n) - 1 for i, n in ((0, H), (1, W)))  # (B, 32) in [-1, 1]
    grid = torch.stack(
        [columns[:, None, :].expand(-1, IMAGE_SIZE, -1), rows[:, :, None].expand(-1, -1, IMAGE_SIZE)], dim=-1
    )
    digits = F.grid_sample(frames.float(), grid, padding_mode="zeros", align_corners=False)
    return digits.round().clamp(0, 255).to(torch.uint8), centres, mass < BLANK


class MovingDigitsFeatures(FeatureNetwork):
    """What a clip shows and how it moves, as one row of numbers, of which `summarise` takes many.

    Args:
        classifier: Of digits as `crop_digits` gives them.
        window: R, in pixels: the side of the digits in the data set.
        frames: T.
    """

    def __init__(self, classifier: DigitsFeatures, window: int, frames: int) -> None:
        super().__init__()
        self.classifier, self.window, self.frames = classifier, window, frames
        self.widths = {"motion": NUM_CLASSES + frames}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch of B clips.

        Args:
            images: `(B, T, 3, 32, 32)` uint8.

        Returns:
            `(B, 10 + T)` float32, named `motion`: the share of frames that are recognised as each digit; the T - 1
            displacements of the centre of mass, in pixels, -1 where one of both frames is blank; the share of frames
            that are.

        Raises:
            ValueError: If the batch is not of that kind.
        """
        expect_clips(images)
        expected, got = (self.frames, 3, IMAGE_SIZE, IMAGE_SIZE), tuple(images.shape[1:])
        if got != expected:
            raise ValueError(
                f"moving_digits expects clips {expected}, got {got}: it measures the built-in moving digits alone; "
                "for other clips give metric fvd"
            )
        with exact_float32(images.device):
            digits, centres, blank = crop_digits(images.flatten(0, 1), self.window)
            classes = self.classifier.class_logits(digits).argmax(dim=1)
            shown = F.one_hot(classes, NUM_CLASSES) * ~blank[:, None]
            shown, centres, blank = (part.unflatten(0, images.shape[:2]) for part in (shown, centres, blank))
            steps = torch.linalg.vector_norm(centres.diff(dim=1), dim=2)  # (B, T - 1)
            steps = steps.masked_fill(blank[:, 1:] | blank[:, :-1], _NO_STEP)
            shares = [part.float().mean(dim=1) for part in (shown, blank[:, :, None])]
        return {"motion": torch.cat([shares[0], steps, shares[1]], dim=1)}

    def describe(self) -> dict[str, Any]:
        """Everything about the features that a number depends on, ready for JSON."""
        return {
            **self.classifier.describe(),
            "name": "moving_digits",
            "protocol": "moving_digits",
            "frames": self.frames,
            "crop": f"{self.window} x {self.window} pixels around the centre of mass of max(grey - {BACKGROUND}, 0), "
            f"enlarged bilinearly to {IMAGE_SIZE} x {IMAGE_SIZE}",
            "blank": f"max(grey - {BACKGROUND}, 0) / {255 - BACKGROUND} adds up to less than {BLANK:g} pixels",
        }


def summarise(rows: Tensor, labels: Sequence[int]) -> Motion:
    """Sum up what clips show and how they move.

    Args:
        rows: `(N, 10 + T)` features of `MovingDigitsFeatures`.
        labels: The digits that they should show, N of them.

    Returns:
        Shares and the median.

    Raises:
        ValueError: There are more or fewer labels than clips, or one of them is no digit.
    """
    wanted = torch.tensor(labels, dtype=torch.int64)
    if len(wanted) != len(rows) or not all(0 <= label < NUM_CLASSES for label in labels):
        raise ValueError(
            f"expected a label from 0 to {NUM_CLASSES - 1} for each of {len(rows)} clips, got {len(wanted)} labels, "
            f"{min(labels, default=None)} to {max(labels, default=None)}"
        )
    rows = rows.double()
    steps = rows[:, NUM_CLASSES:-1]
    seen = steps[steps != _NO_STEP].numpy()
    recognised = rows[torch.arange(len(rows)), wanted]
    of_classes = [recognised[wanted == digit] for digit in range(NUM_CLASSES)]
    return Motion(
        recognised.mean().item(),
        tuple(part.mean().item() if len(part) else None for part in of_classes),
        float(np.median(seen)) if len(seen) else 0.0,
        rows[:, -1].mean().item(),
    )
