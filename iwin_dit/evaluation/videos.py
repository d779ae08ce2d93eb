"""A folder of clips as a set that a metric can read, for the Frechet video distance.

Owns which frames of a clip count: the first ones, at a stride. Must not know how clips are decoded or what is measured.

Letters: B batch, T frames, H W image axes.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.videos import frame_paths, list_clips, probe_clip, read_frames
from ..files import sha256
from ..metrics.images import count_duplicates

THREADS = 4  # each decodes a clip of its own
_LISTED = 5  # clips that a message names


class VideoFiles:
    """The clips of a folder and its subfolders, in the order of their paths, all of one size: an `ImageSet` of clips.

    Clips are video files, and folders of frame images. The first `frames` frames of each count, `stride` apart,
    whatever its rate. Hidden files and folders are left alone, links are followed. Frames are counted and sizes
    compared at construction, pixels decoded when asked for.

    Args:
        folder: Where to look.
        frames: T.
        stride: Distance between frames that are taken; 1 takes every one.

    Attributes:
        paths: The clips.
        size: Height and width.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds fewer than two clips, or clips that are broken, too short or of several sizes.
        ImportError: If there are video files and PyAV is not installed.
    """

    prefetch = True

    def __init__(self, folder: Path, frames: int = 16, stride: int = 1) -> None:
        if frames < 1 or stride < 1:
            raise ValueError(f"expected at least 1 frame and a stride of at least 1, got {frames} and {stride}")
        self.name, self.folder, self.frames, self.stride = str(folder), folder, frames, stride
        self.paths = list_clips(folder)
        if len(self.paths) < 2:
            found = len(self.paths)
            raise ValueError(f"expected at least 2 clips (video files or folders of frames) in {folder}, got {found}")
        self._pool = ThreadPoolExecutor(THREADS)
        facts = list(self._pool.map(probe_clip, self.paths))
        needed = (frames - 1) * stride + 1
        if short := [f"{p}: {f.frames}" for p, f in zip(self.paths, facts, strict=True) if f.frames < needed]:
            raise ValueError(
                f"expected at least {needed} frames ({frames} at stride {stride}) in every clip, but {len(short)} of "
                f"{len(facts)} have fewer:\n  " + "\n  ".join(short[:_LISTED] + ["..."] * (len(short) > _LISTED))
            )
        sizes = Counter((clip.height, clip.width) for clip in facts)
        if len(sizes) > 1:
            counts = ", ".join(f"{n} of {h} x {w}" for (h, w), n in sizes.most_common(_LISTED))
            raise ValueError(f"expected clips of one size in {folder}, got {counts}: crop them as for training")
        self.size = next(iter(sizes))
        self._record: dict[str, Any] | None = None
        self._rates = [float(clip.rate) for clip in facts if clip.rate is not None]

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

    def _identify(self) -> dict[str, Any]:
        digests = list(self._pool.map(_clip_sha256, self.paths))
        names = [path.relative_to(self.folder).as_posix() for path in self.paths]
        listing = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
        kinds = Counter("frames" if path.is_dir() else path.suffix.lower() for path in self.paths)
        return {
            "path": str(self.folder),
            "n": len(self),
            "frames": self.frames,
            "stride": self.stride,
            "frames_per_second": [min(self._rates), max(self._rates)] if self._rates else None,  # of those that say
            "image_size": list(self.size),
            "stored_as": dict(sorted(kinds.items())),  # compression artefacts change a distance
            "sha256": hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
            "duplicates": count_duplicates([digest.encode() for digest in digests], self.name),
        }

    def _decode(self, index: int, clip: np.ndarray) -> None:
        """Decode one clip into its place in the batch, `(T, H, W, 3)`."""
        frames = read_frames(self.paths[index], 0, self.frames, self.stride)
        if frames.shape != clip.shape:
            raise ValueError(f"expected frames {clip.shape[1:]} in {self.paths[index]}, got {frames.shape[1:]}")
        clip[...] = frames


def _clip_sha256(path: Path) -> str:
    """Hash of a video file, or of the names and contents of a folder's frames."""
    if path.is_file():
        return sha256(path)
    listing = "".join(f"{sha256(frame)}  {frame.name}\n" for frame in frame_paths(path))
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
