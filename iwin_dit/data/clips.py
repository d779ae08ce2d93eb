"""Folders of videos as a source of clips: which frames of a video make a clip, and the folder of class folders.

Knows nothing of containers and decoders (`videos`), of sizes, latents or models.
Letters: T frames of a clip, J clips of a video.
"""

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

from PIL import Image

from .images import EXTENSIONS
from .sources import Item, check_class_folders, choose_class_names, class_folders, count_parts, files_fingerprint
from .videos import VIDEO_EXTENSIONS, BrokenVideoError, ClipFacts, clip_files, probe_clip, read_frames

RATE_TOLERANCE = Fraction(1, 100)  # 23.976 is 24 frames a second, and 29.97 is 30


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """How clips are cut from a video.

    The video is first seen at `frame_rate`: its frame k there is the one nearest to k / `frame_rate` seconds after the
    first, the later one of two that are as near. Of a video within 1 % of that rate every frame is taken, and so it is
    of a folder of frames, which has no rate; a video of a lower rate is refused, and one whose rate varies. Without a
    `frame_rate` all frames of a video are taken, whatever its rate. A clip is then `frames` of those frames,
    `frame_stride` apart.

    Where (frames - 1) * frame_stride + 1 frames leave s more, clip j of J starts at frame floor(s (2j + 1) / 2J): the
    only one in the middle of the video, several in the middles of as many equal shares. In a video hardly longer than a
    clip they overlap, or are even the same.

    Attributes:
        frames: T, of a clip.
        frame_rate: Frames per second before the stride; a clip plays at `frame_rate / frame_stride`. None takes every
            video as it is, as an evaluation may; training must name a rate.
        frame_stride: Distance between the frames that are taken; 1 takes every one.
        clips_per_video: J.

    Raises:
        ValueError: A value is out of range.
    """

    frames: int
    frame_rate: float | None = None
    frame_stride: int = 1
    clips_per_video: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "frame_stride", "clips_per_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.frame_rate is not None:
            if not 0 < self.frame_rate < math.inf:
                raise ValueError(f"frame_rate must be above 0 frames per second, got {self.frame_rate}")
            object.__setattr__(self, "frame_rate", float(self.frame_rate))  # 8 and 8.0 are one setting, in JSON too

    def __str__(self) -> str:
        rate = "" if self.frame_rate is None else f" of {self.frame_rate:g} a second"
        return f"{self.frames} frames at stride {self.frame_stride}{rate}"

    @property
    def fps(self) -> float | None:
        """Frames per second at which a clip plays; None where that is the video's own affair."""
        return None if self.frame_rate is None else self.frame_rate / self.frame_stride

    @property
    def span(self) -> int:
        """Frames, as they are seen, from the first of a clip to its last."""
        return (self.frames - 1) * self.frame_stride + 1

    def videos_per_part(self, part_size: int) -> int:
        """Videos whose clips make a part of `part_size` samples at most; at least one, as none is divided."""
        return max(1, part_size // self.clips_per_video)


class ClipFolder:
    """A folder of class folders of videos: `root/<class name>/**/clip.mp4` or `.../clip/*.png`, as an `ImageSource`.

    A video is a video file or a folder that directly holds frame images. Labels number the class folders in sorted
    order. Hidden files and folders are left alone, and links are followed. Files that are named neither as videos nor
    as images are left alone, too, and counted in a warning. The fingerprint is of the paths below `root` of all videos
    and frames, and of their sizes; no file is opened before a sample is read.

    A video is one item with `clips.clips_per_video` samples, and broken as a whole: the others stay where a split that
    keeps the clips of a video together expects them.

    Args:
        root: The folder that holds the class folders.
        part_size: Clips per part, in whole videos; the last part holds the rest.
        clips: How they are cut.
        class_names: Names by label; by default those of the folders.

    Raises:
        ValueError: The folder is missing, has no class folders or more or fewer than `class_names`, or a class folder
            has no videos, or frame images that belong to no clip.
    """

    def __init__(
        self, root: Path, part_size: int, clips: ClipSettings, class_names: tuple[str, ...] | None = None
    ) -> None:
        names = class_folders(root)
        listings = [clip_files(root / name) for name in names]
        self._videos = [(path, label) for label, (found, _) in enumerate(listings) for path in found]
        counts = [len(found) for found, _ in listings]
        ignored = [path for _, others in listings for path in map(str, others)]
        extensions = ", ".join((*VIDEO_EXTENSIONS, *EXTENSIONS))
        check_class_folders(root, names, counts, ignored, f"videos or folders of frames ({extensions})")
        self.num_ignored = len(ignored)
        self.description = str(root)
        self.fingerprint = files_fingerprint(
            (path.relative_to(root).as_posix(), path.stat().st_size)
            for found, _ in listings
            for files in found.values()
            for path in files
        )
        self.class_names = choose_class_names(class_names, tuple(names), self.description)
        self._clips, self._part_size = clips, clips.videos_per_part(part_size)
        self.num_parts = count_parts(len(self._videos), self._part_size)

    def items(self, part: int) -> Iterator[Item]:
        """Yield the videos of one part, in the order of class and path, their clips in that of time."""
        for path, label in self._videos[part * self._part_size : (part + 1) * self._part_size]:
            yield Item(str(path), label, partial(read_clips, path, self._clips), self._clips.clips_per_video)


def read_clips(path: Path, clips: ClipSettings) -> list[list[Image.Image]]:
    """Decode the clips of a video.

    Args:
        path: A video file or a folder of frame images.
        clips: How clips are cut.

    Returns:
        J lists of T frames, RGB, as large as the video's; where clips overlap, of the same images.

    Raises:
        BrokenSampleError: The video cannot be decoded (in any of its clips), or no clip can be cut from it.
        ImportError: It is a video file and PyAV is not installed.
    """
    cut = cut_video(path, probe_clip(path), clips)
    needed = sorted({index for indices in cut for index in indices})
    frames = dict(zip(needed, map(Image.fromarray, read_frames(path, needed)), strict=True))
    return [[frames[index] for index in indices] for indices in cut]


def cut_video(path: Path, facts: ClipFacts, clips: ClipSettings) -> list[list[int]]:
    """Choose the frames of every clip of a video, as `ClipSettings` says.

    Args:
        path: Names the video in messages.
        facts: What the video is.
        clips: How clips are cut.

    Returns:
        J lists of T ascending frame numbers.

    Raises:
        BrokenVideoError: The video's rate varies or is too low, or it is too short.
    """
    step = Fraction(1) if clips.frame_rate is None else _frames_per_frame(path, facts, Fraction(clips.frame_rate))
    frames = math.ceil((facts.frames - Fraction(1, 2)) / step)  # all k with floor(k step + 1/2) < facts.frames
    if frames < clips.span:
        raise BrokenVideoError(f"{path} is too short: expected at least {clips.span} frames for {clips}, got {frames}")
    shares = 2 * clips.clips_per_video
    starts = [(frames - clips.span) * (2 * j + 1) // shares for j in range(clips.clips_per_video)]
    return [
        [math.floor(k * step + Fraction(1, 2)) for k in range(start, start + clips.span, clips.frame_stride)]
        for start in starts
    ]


def _frames_per_frame(path: Path, facts: ClipFacts, wanted: Fraction) -> Fraction:
    """Frames of the file per frame of the video as it is seen at the wanted rate."""
    rate = wanted if facts.rate is None else facts.rate
    if not facts.constant_rate:
        raise BrokenVideoError(f"{path} has a variable frame rate: expected evenly spaced frames; convert it to one")
    if rate < wanted * (1 - RATE_TOLERANCE):
        raise BrokenVideoError(
            f"{path} has {float(rate):.5g} frames per second, expected a rate of at least {float(wanted):g}"
        )
    return rate / wanted if rate > wanted * (1 + RATE_TOLERANCE) else Fraction(1)
