"""Moving digits, the built-in clips: scikit-learn's digits, half as large as the frame, that move and bounce.

Knows nothing of stored latents, models or metrics. Letters: T frames of a clip, J clips of a digit.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image

from .clips import ClipSettings
from .digits import DIGIT_NAMES, load_digits
from .sources import Item, choose_class_names, count_parts

FRAME_SIZE = 32  # pixels
DIGIT_SIZE = 16
MIN_SPEED, MAX_SPEED = 1, 2  # pixels a frame
DEFAULT_CLIPS = ClipSettings(frames=16, frame_rate=8.0)
_SUB = 16  # positions are whole numbers of these parts of a pixel, and so all arithmetic is exact
_ROOM = (FRAME_SIZE - DIGIT_SIZE) * _SUB  # how far the digit can go on each axis
# All velocities (y, x) of a speed in range, in parts of a pixel: one drawn evenly has any direction.
_GRID = np.mgrid[-MAX_SPEED * _SUB : MAX_SPEED * _SUB + 1, -MAX_SPEED * _SUB : MAX_SPEED * _SUB + 1].reshape(2, -1).T
_VELOCITIES = _GRID[((_GRID**2).sum(1) >= (MIN_SPEED * _SUB) ** 2) & ((_GRID**2).sum(1) <= (MAX_SPEED * _SUB) ** 2)]
_KEY = 0x6D6F7665  # sets these draws apart from whatever else is drawn by place


class MovingDigits:
    """Clips of the 1,797 digits of scikit-learn, moving in a black frame of 32x32, as an `ImageSource`.

    A digit, enlarged to 16x16 as `Digits` enlarges to 32x32, starts anywhere and moves straight on, by 1 to 2 pixels a
    frame in any direction, until its square meets a border and bounces off it. Positions are sixteenths of a pixel, and
    the digit is interpolated bilinearly between pixels, so its centre of mass moves as smoothly. Start and velocity
    depend on digit and clip alone. Unlike other sources it is also a sequence of uint8 tensors (T, 3, 32, 32), with
    `labels` beside it; sample i is clip i mod J of digit i div J.

    Args:
        part_size: Clips per part, in whole digits; the last part holds the rest.
        clips: Frames of a clip, which shows every `frame_stride`-th frame of the motion; how many clips of a digit; and
            the rate that they play at, on which the motion per frame does not depend.
        class_names: Names by label; by default "0" to "9".

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: `class_names` are not ten.
    """

    def __init__(
        self,
        part_size: int = 1797,
        clips: ClipSettings = DEFAULT_CLIPS,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.description = "moving_digits"
        self.fingerprint = "scikit-learn's digits, moved by the first rule"
        self.num_ignored = 0
        self.resolution = FRAME_SIZE
        self.class_names = choose_class_names(class_names, DIGIT_NAMES, self.description)
        digits, labels = load_digits(DIGIT_SIZE)
        self._digits = digits.numpy()  # (1797, 16, 16)
        self.labels: list[int] = [label for label in labels for _ in range(clips.clips_per_video)]
        self._clips, self._part_size = clips, clips.videos_per_part(part_size)
        self.num_parts = count_parts(len(digits), self._part_size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> torch.Tensor:
        frames = torch.from_numpy(self._draw(index))
        return frames[:, None].expand(-1, 3, -1, -1).clone()

    def positions(self, index: int) -> np.ndarray:
        """Where the digit of a clip is, in every frame.

        Args:
            index: Of the clip.

        Returns:
            Rows and columns of the upper left corner of its 16x16 square (T, 2), int64, in sixteenths of a pixel.
        """
        digit, clip = divmod(range(len(self))[index], self._clips.clips_per_video)
        # numpy promises the raw stream of a bit generator for good, and not what its distributions make of it.
        row, column, number = np.random.PCG64((_KEY, digit, clip)).random_raw(3).tolist()
        start = np.array([row % (_ROOM + 1), column % (_ROOM + 1)])
        velocity = _VELOCITIES[number % len(_VELOCITIES)]
        times = np.arange(self._clips.frames)[:, None] * self._clips.frame_stride
        travelled = (start + times * velocity) % (2 * _ROOM)  # there and back
        return np.minimum(travelled, 2 * _ROOM - travelled)

    def items(self, part: int) -> Iterator[Item]:
        """Yield the digits of one part with their clips, in scikit-learn's order."""
        count = self._clips.clips_per_video
        for digit in range(len(self._digits))[part * self._part_size : (part + 1) * self._part_size]:
            clips = range(digit * count, (digit + 1) * count)
            yield Item(f"moving_digits[{digit}]", self.labels[clips[0]], partial(self._read, clips), count)

    def _read(self, clips: range) -> list[list[Image.Image]]:
        return [[Image.fromarray(frame).convert("RGB") for frame in self._draw(index)] for index in clips]

    def _draw(self, index: int) -> np.ndarray:
        """The frames (T, 32, 32) of a clip, grey, uint8."""
        digit = self._digits[index // self._clips.clips_per_video].astype(np.int64)
        # With room for the interpolation at the lower and right borders, where its weight is 0.
        frames = np.zeros((self._clips.frames, FRAME_SIZE + 1, FRAME_SIZE + 1), dtype=np.int64)
        for frame, position in zip(frames, self.positions(index), strict=True):
            (row, column), (down, right) = position // _SUB, position % _SUB
            for i, vertical in enumerate((_SUB - down, down)):
                for j, horizontal in enumerate((_SUB - right, right)):
                    there = frame[row + i : row + i + DIGIT_SIZE, column + j : column + j + DIGIT_SIZE]
                    there += vertical * horizontal * digit
        return ((frames[:, :FRAME_SIZE, :FRAME_SIZE] + _SUB**2 // 2) // _SUB**2).astype(np.uint8)
