"""A folder of clips as a set that a metric can read, for the Frechet video distance.

Owns which files count. Must not know how they are cut and decoded, or what is measured.

Letters: B batch, T frames, H W image axes.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.clips import RATE_TOLERANCE, ClipSettings, cut_video
from ..data.images import BrokenSampleError, centre_crop
from ..data.videos import ClipFacts, clip_files, frame_paths, probe_clip, read_frames
from ..files import sha256
from ..metrics.images import count_duplicates
from ..metrics.processes import rank

logger = logging.getLogger(__name__)

THREADS = 4  # each decodes a clip of its own
_LISTED = 5  # clips that a message names


@dataclass(frozen=True)
class Cut:
    """What counts of a video.

    Attributes:
        clips: How a clip is cut out of it, by the rule of training: one, from the middle.
        resolution: Side R of ADM's centre crop, as training makes it; None leaves the frames as they are.

    Raises:
        ValueError: A number is out of range, or there are several clips of a video.
    """

    clips: ClipSettings = field(default_factory=lambda: ClipSettings(frames=16))
    resolution: int | None = None

    def __post_init__(self) -> None:
        if self.clips.clips_per_video != 1 or (self.resolution is not None and self.resolution < 1):
            raise ValueError(
                "expected one clip of a video, and a resolution of at least 1, got "
                f"{self.clips.clips_per_video} and {self.resolution}"
            )

    def __str__(self) -> str:
        return f"{self.clips}{'' if self.resolution is None else f', cropped to {self.resolution} x {self.resolution}'}"

    @classmethod
    def of_real(cls, metrics: Sequence[str], clips: ClipSettings | None, resolution: int | None) -> "Cut":
        """How real clips are cut: as those of a model, its training's, in so far as a metric's real clips have it.

        Args:
            metrics: Keys of `suite.METRICS`.
            clips: Of the training, or of files; None of images.
            resolution: Side of their frames.

        Returns:
            For fvd all of it, one clip of a video; for moving_digits, which are drawn, frames and stride alone.
        """
        if clips is None or tuple(metrics) not in (("fvd",), ("moving_digits",)):
            return cls()
        if tuple(metrics) == ("fvd",):
            return cls(replace(clips, clips_per_video=1), resolution)
        return cls(ClipSettings(clips.frames, frame_stride=clips.frame_stride))


class VideoFiles:
    """The clips of a folder and its subfolders, in the order of their paths, all of one size: an `ImageSet` of clips.

    Clips are video files, and folders of frame images. Hidden files and folders are left alone, links are followed.
    Frames are counted and sizes compared at construction, pixels decoded when asked for.

    Args:
        folder: Where to look.
        cut: Which frames count, and which part of them.
        max_broken: How many clips may be left out, named in a warning and in the record, since they are broken or
            cannot be cut so. Where some may be, all are decoded at construction, once more than they are read.

    Attributes:
        paths: The clips, without those that are left out.
        broken: Paths in the folder of those that are.
        cut: As given.
        frames: T.
        size: Height and width, after the crop.
        image_size: The same, as the sets of images have it.
        fps: Frames per second of the clips; None where files differ or do not say.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds fewer than two clips that can be cut so, more others than may be left out, one clip in
            several formats, or, where they are not cropped, clips of several sizes.
        ImportError: If there are video files and PyAV is not installed.
    """

    prefetch = True

    def __init__(self, folder: Path, cut: Cut | None = None, max_broken: int = 0) -> None:
        self.name, self.folder, self.cut = str(folder), folder, cut or Cut()
        self.frames = self.cut.clips.frames
        files, others = clip_files(folder)
        found = list(files)
        _check_formats(found)
        self._ignored = sum(path.suffix != ".json" for path in others)  # which `sample.py` writes beside its clips
        if self._ignored:
            kinds = ", ".join(sorted({path.suffix or path.name for path in others}))
            logger.warning(
                "%d files in %s are no clips, by their names, and left out (%s)", self._ignored, folder, kinds
            )
        self._pool = ThreadPoolExecutor(THREADS)
        self.paths, facts, self._chosen = self._choose(found, max_broken)
        used = set(self.paths)
        self.broken = [path.relative_to(folder).as_posix() for path in found if path not in used]
        if len(self.paths) < 2:
            skipped = f", {len(self.broken)} left out" if self.broken else ""
            raise ValueError(
                f"expected at least 2 clips (video files or folders of frames) in {folder}, got {len(self.paths)}"
                f"{skipped}"
            )
        self.size = self._common_size(facts)
        self.image_size = list(self.size)
        self._rates = [float(clip.rate) for clip in facts if clip.rate is not None]
        self.fps = self._common_rate()
        self._record: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode some of the clips, several at a time.

        Args:
            indices: Which ones, B of them.

        Returns:
            `(B, T, 3, H, W)` uint8.

        Raises:
            ValueError: If a clip is broken.
        """
        clips = np.empty((len(indices), self.frames, *self.size, 3), np.uint8)
        for _ in self._pool.map(self._decode, indices, clips):
            pass
        return torch.from_numpy(clips).permute(0, 1, 4, 2, 3)  # (B, T, H, W, 3) -> (B, T, 3, H, W)

    def record(self) -> dict[str, Any]:
        """What identifies the set and how it was read; all files are hashed at the first call."""
        if self._record is None:
            self._record = self._identify()
        return self._record

    def _choose(self, found: Sequence[Path], max_broken: int) -> tuple[list[Path], list[ClipFacts], list[list[int]]]:
        """Path, facts and frames of every clip that can be cut; those that cannot are named."""

        def choose(path: Path) -> tuple[Path, ClipFacts, list[int]] | str:
            try:
                facts = probe_clip(path)
                (chosen,) = cut_video(path, facts, self.cut.clips)
                if max_broken:  # else damage that only decoding shows ends an evaluation when much of it is done
                    read_frames(path, chosen)
                return path, facts, chosen
            except BrokenSampleError as error:
                return str(error)

        looked = self._pool.map(choose, found)
        results = list(tqdm(looked, "looking at clips", len(found), unit="clip", disable=rank() > 0, leave=False))
        wrong = [result for result in results if isinstance(result, str)]
        if wrong:
            listed = "\n  ".join(wrong[:_LISTED] + ["..."] * (len(wrong) > _LISTED))
            of_all = f"{len(wrong)} of {len(found)} cannot be used so:\n  {listed}"
            if len(wrong) > max_broken:
                raise ValueError(
                    f"expected {self.cut} in every clip of {self.folder} (at most {max_broken} may be left out), but "
                    f"{of_all}"
                )
            logger.warning("%d clips are left out of %s: of %s, %s", len(wrong), self.folder, self.cut, of_all)
        cuts = [result for result in results if not isinstance(result, str)]
        return [path for path, _, _ in cuts], [facts for _, facts, _ in cuts], [chosen for _, _, chosen in cuts]

    def _common_size(self, facts: Sequence[ClipFacts]) -> tuple[int, int]:
        if self.cut.resolution is not None:
            return self.cut.resolution, self.cut.resolution
        sizes = Counter((clip.height, clip.width) for clip in facts)
        if len(sizes) > 1:
            counts = ", ".join(f"{n} of {h} x {w}" for (h, w), n in sizes.most_common(_LISTED))
            raise ValueError(
                f"expected clips of one size in {self.folder}, got {counts}: crop them as for training, or give a "
                "resolution to crop them to"
            )
        return next(iter(sizes))

    def _common_rate(self) -> float | None:
        if self.cut.clips.fps is not None:
            return self.cut.clips.fps
        if len(self._rates) < len(self.paths) or not same_rate(min(self._rates), max(self._rates)):
            return None
        return self._rates[0] / self.cut.clips.frame_stride

    def _identify(self) -> dict[str, Any]:
        digests = list(self._pool.map(_clip_sha256, self.paths))
        names = [path.relative_to(self.folder).as_posix() for path in self.paths]
        listing = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
        kinds = Counter("frames" if path.is_dir() else path.suffix.lower() for path in self.paths)
        return {
            "path": str(self.folder),
            "n": len(self),
            "frames": self.frames,
            "frame_stride": self.cut.clips.frame_stride,
            "frame_rate": self.cut.clips.frame_rate,
            "resolution": self.cut.resolution,
            "cut": f"{self.cut}, from the middle",  # all of the above, in words
            "fps": self.fps,
            "frames_per_second": [min(self._rates), max(self._rates)] if self._rates else None,  # of those that say
            "image_size": list(self.size),
            "stored_as": dict(sorted(kinds.items())),  # compression artefacts change a distance
            "sha256": hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
            "duplicates": count_duplicates([digest.encode() for digest in digests], self.name),
            "ignored_files": self._ignored,
            "broken": self.broken,  # of which none is counted in what stands above
        }

    def _decode(self, index: int, clip: np.ndarray) -> None:
        """Decode one clip into its place in the batch, `(T, H, W, 3)`."""
        path = self.paths[index]
        decoded = read_frames(path, self._chosen[index])
        if self.cut.resolution is not None:
            decoded = [np.asarray(centre_crop(Image.fromarray(frame), self.cut.resolution)) for frame in decoded]
        if decoded[0].shape != clip.shape[1:]:
            raise ValueError(f"expected frames {clip.shape[1:]} in {path}, got {decoded[0].shape}")
        clip[...] = decoded


def _check_formats(paths: Sequence[Path]) -> None:
    """Raise a ValueError for clips of one name in several formats, as `sample.py` leaves them: each would count twice.

    A folder of frames `a` beside `a.mp4` is one of the formats.
    """
    counts = Counter(path if path.is_dir() else path.with_suffix("") for path in paths)
    if twice := [path for path, count in counts.items() if count > 1]:
        raise ValueError(
            f"expected each clip once, got {len(twice)} in several formats, as {twice[0]}: keep one format, and the "
            "grid of all clips elsewhere (sample.py --format frames --grid)"
        )


def same_rate(first: float, second: float) -> bool:
    """Whether two frame rates are one, but for how it is written."""
    return abs(first - second) <= RATE_TOLERANCE * max(first, second)


def _clip_sha256(path: Path) -> str:
    """Hash of a video file, or of the names and contents of a folder's frames."""
    if path.is_file():
        return sha256(path)
    listing = "".join(f"{sha256(frame)}  {frame.name}\n" for frame in frame_paths(path))
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
