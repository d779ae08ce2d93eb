"""Videos to frames, and back: video files through PyAV, and folders of frame images; the one decoder of all users.

The only file that imports PyAV (extra `video`). Frames come as they are meant to be seen, RGB and upright; no crop, no
resize, no change of frame rate. Knows nothing of data sets, labels or tensors. Everything here may be called from
several threads at once, and a call decodes in its own thread alone: decode several videos at a time.

Letters: T frames, H W image axes.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from ..files import list_files
from .images import EXTENSIONS, MAX_PIXELS, BrokenSampleError, read_image

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
_DEMUXERS = "mov,matroska,avi,gif"  # FFmpeg's names for those; others may fetch what a file names
_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
_JITTER = Fraction(1, 10)  # share of the time between two frames that a time stamp may be off
_SQUARE = Fraction(1, 50)  # from which a pixel's aspect may be off: a scaled size is rounded to whole, even sides
_CRF = "18"  # of what is written: H.264's constant rate factor, 0 (lossless) to 51


class BrokenVideoError(BrokenSampleError):
    """A video that cannot be decoded, or not as it is wanted: too short, of a wrong frame rate, of oblong pixels."""


@dataclass(frozen=True)
class ClipFacts:
    """What a clip is, found without decoding it.

    Attributes:
        frames: Number of frames.
        height: Of every frame, upright.
        width: Of every frame, upright.
        rate: Mean frames per second, by the time stamps; None of a folder of frames, which does not say.
        constant_rate: The frames are evenly spaced in time, as far as container and encoder can say it: a time stamp
            may be off by less than a tenth of the time between two frames, or, where that time is more than two ticks
            of the container's clock, one tick (milliseconds in mkv and webm, hundredths of a second in gif). An avi
            ticks once per frame, and its missing frames show. True of a folder of frames.
    """

    frames: int
    height: int
    width: int
    rate: Fraction | None
    constant_rate: bool = True


def clip_files(folder: Path) -> tuple[dict[Path, list[Path]], list[Path]]:
    """Find the clips below a folder: its video files, and the subfolders that directly hold frame images.

    Args:
        folder: Searched with its subfolders; what is hidden is left alone, links are followed.

    Returns:
        The files of every clip, the clips in the order of their paths (a video file is its own only one), and the files
        that are named neither as videos nor as images.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If images lie in `folder` itself, or beside video files: what would be their clip?
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of clips, got {folder}, which is none")
    videos: dict[Path, list[Path]] = {}
    with_frames: dict[Path, list[Path]] = {}
    others = []
    for path in map(Path, list_files(folder)):
        if path.name.lower().endswith(VIDEO_EXTENSIONS):
            videos[path] = [path]
        elif path.name.lower().endswith(EXTENSIONS):
            with_frames.setdefault(path.parent, []).append(path)
        else:
            others.append(path)
    if folder in with_frames:
        raise ValueError(f"expected clips in {folder}, got images: put the frames of every clip into its own folder")
    if mixed := sorted(with_frames.keys() & {video.parent for video in videos}):
        raise ValueError(f"expected video files or the frames of one clip in {mixed[0]}, got both: sort them apart")
    return dict(sorted((videos | with_frames).items())), sorted(others)


def probe_clip(path: Path) -> ClipFacts:
    """Find out what a clip is.

    A video file is read whole, and its frames are counted by their packets, since the count in a header may be missing
    or wrong. Only the first frame is decoded, which says how it is turned; so it is of a folder of frames. A file that
    was cut off is an error where the container has an index (mp4, mov, mostly avi); webm, mkv and gif just have fewer
    frames.

    Args:
        path: A video file (one of `VIDEO_EXTENSIONS`) or a folder of frame images.

    Returns:
        Number, size and timing of the frames.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If it is no clip (`BrokenVideoError` or `BrokenImageError` where it is damaged).
        ImportError: If it is a video file and PyAV is not installed.
    """
    if path.is_dir():
        paths = frame_paths(path)
        first = read_image(paths[0], str(paths[0]))
        return ClipFacts(len(paths), first.height, first.width, None)
    with _open_video(path) as (container, stream):
        shown: list[int | None] = []
        first_frame: Any = None
        # An avi says when a frame is decoded, of which FFmpeg guesses when it is shown, the last a tick too early; in
        # order, the steps are the same.
        says_decoded = container.format.name == "avi"
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:  # packets of no size end the file; an edit list discards some
                shown.append(packet.dts if says_decoded or packet.pts is None else packet.pts)
            first_frame = first_frame or next(iter(packet.decode()), None)
        height, width = stream.codec_context.height, stream.codec_context.width
        if first_frame is not None and _orientation(path, first_frame)[0]:
            height, width = width, height
        return ClipFacts(len(shown), height, width, *_frame_rate(shown, stream))


def _frame_rate(shown: Sequence[int | None], stream: Any) -> tuple[Fraction | None, bool]:
    """Mean rate of a stream's frames by their time stamps, and whether they are evenly spaced.

    The stream's own word serves for a single frame alone: it counts the time that the last frame stands, too.
    """
    stamps = sorted(stamp for stamp in shown if stamp is not None)
    if len(shown) < 2:
        return stream.average_rate, True
    if len(stamps) < len(shown) or stamps[0] == stamps[-1]:
        return stream.average_rate, False
    step = Fraction(stamps[-1] - stamps[0], len(stamps) - 1)  # in ticks of the stream's clock
    # Even times are less than a tick off when rounded to ticks; a frame that is missing has others half a step off.
    tolerance = max(Fraction(step > 2), _JITTER * step)
    even = all(abs(stamp - stamps[0] - i * step) < tolerance for i, stamp in enumerate(stamps))
    return 1 / (step * stream.time_base), even


def _orientation(path: Path, frame: Any) -> tuple[bool, int, int]:
    """How a frame comes upright, by its display matrix: height and width swapped, then steps 1 or -1 along both."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 1, 1
    # Columns x and y go to a x + c y and b x + d y, all in 1 / 65536.
    a, b, _, c, d = (np.frombuffer(bytes(matrix), np.int32)[:5] / 2**16).tolist()
    swapped = abs(b) > abs(a)
    x, y, zeros = (c, b, (a, d)) if swapped else (a, d, (b, c))
    if not np.allclose((abs(x), abs(y), *zeros), (1, 1, 0, 0), atol=1e-3):
        raise BrokenVideoError(f"{path} is turned by {frame.rotation} degrees or scaled, expected quarter turns")
    return swapped, round(y), round(x)


def _upright(path: Path, frame: Any) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of a frame, as it is meant to be seen."""
    swapped, down, right = _orientation(path, frame)
    pixels = frame.to_ndarray(format="rgb24")
    pixels = pixels.swapaxes(0, 1) if swapped else pixels
    return np.ascontiguousarray(pixels[::down, ::right])


def read_frames(path: Path, indices: Sequence[int]) -> list[np.ndarray]:
    """Decode frames of a clip that must all be there.

    Args:
        path: A video file (one of `VIDEO_EXTENSIONS`) or a folder of frame images.
        indices: Numbers of frames from 0, ascending.

    Returns:
        `(H, W, 3)` uint8, RGB, one per index.

    Raises:
        BrokenVideoError: If the clip ends before; another ValueError, FileNotFoundError or ImportError as by
            `decode_frames`.
    """
    frames = list(decode_frames(path, indices))
    if len(frames) < len(indices):
        raise BrokenVideoError(f"{path} ends before its frame {indices[len(frames)]} could be decoded")
    return frames


def decode_frames(path: Path, indices: Iterable[int]) -> Iterator[np.ndarray]:
    """Decode the frames of a clip that are asked for, one after the other.

    A video file is decoded from its beginning, which finds a frame exactly in every container, at the cost of decoding
    what is skipped.

    Args:
        path: A video file (one of `VIDEO_EXTENSIONS`) or a folder of frame images.
        indices: Numbers of frames from 0, ascending; without end for all that follow.

    Yields:
        `(H, W, 3)` uint8, RGB: of those frames, the ones that there are. Where the clip ends before, they are fewer.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If it is no clip, or its frames have several sizes (`BrokenVideoError` or `BrokenImageError` where
            it is damaged).
        ImportError: If it is a video file and PyAV is not installed.
    """
    shape = None
    for pixels in (_folder_frames if path.is_dir() else _video_frames)(path, iter(indices)):
        if pixels.shape != (shape := shape or pixels.shape):
            raise BrokenVideoError(f"expected frames of one size in {path}, got {shape[:2]} and {pixels.shape[:2]}")
        yield pixels


def _folder_frames(path: Path, indices: Iterator[int]) -> Iterator[np.ndarray]:
    paths = frame_paths(path)
    for index in itertools.takewhile(lambda index: index < len(paths), indices):
        yield np.asarray(read_image(paths[index], str(paths[index])))


def _video_frames(path: Path, indices: Iterator[int]) -> Iterator[np.ndarray]:
    with _open_video(path) as (container, stream):
        index = next(indices, None)
        for i, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:  # parts of it are the decoder's guess, and parts of the next ones rest on it
                raise BrokenVideoError(f"{path} is damaged in frame {i}")
            if i == index:
                yield _upright(path, frame)
                index = next(indices, None)
            if index is None:
                return


def frame_paths(folder: Path) -> list[Path]:
    """The frame images that a folder directly holds, by number where their names have one: `2.png` before `10.png`.

    Args:
        folder: The folder of one clip.

    Returns:
        Their paths.

    Raises:
        ValueError: If there are none.
    """
    paths = [p for p in folder.iterdir() if p.name.lower().endswith(EXTENSIONS) and not p.name.startswith(".")]
    if not paths:
        raise ValueError(f"expected frame images ({', '.join(EXTENSIONS)}) in {folder}, found none")
    return sorted(paths, key=_by_number)


def _by_number(path: Path) -> tuple[list[str | int], str]:
    """Sort key of a name: text and whole numbers by turns, and the name itself where `1.png` stands beside `01.png`."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


@contextlib.contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video file: PyAV's container and its first video stream. FFmpeg's errors name the file."""
    av = _pyav()
    if not path.is_file():
        raise FileNotFoundError(f"expected a video file or a folder of frames, got {path}, which is neither")
    if not path.name.lower().endswith(VIDEO_EXTENSIONS):
        raise ValueError(f"expected a video file ({', '.join(VIDEO_EXTENSIONS)}), got {path}")
    try:
        with av.open(f"file:{path}", container_options=_OPTIONS) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise BrokenVideoError(f"{path} has no video stream that can be decoded")
            width, height = stream.codec_context.width, stream.codec_context.height
            if not 0 < width * height <= MAX_PIXELS:
                raise BrokenVideoError(f"{path}: {width} x {height} pixels a frame, expected 1 to {MAX_PIXELS:,}")
            aspect = stream.sample_aspect_ratio or 1  # where it is not said, they are square
            if abs(aspect - 1) > _SQUARE:
                raise BrokenVideoError(f"{path} has pixels of aspect {aspect}, expected square ones; scale it to those")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        if isinstance(error, OSError | MemoryError):  # a failing disk is no reason to skip videos
            raise
        raise BrokenVideoError(f"{path} cannot be decoded: {error.strerror}") from error


def check_mp4(size: tuple[int, int], rate: float) -> None:
    """Refuse what no MP4 file can be written of, or not here.

    Args:
        size: Width and height of a frame, in pixels.
        rate: Frames per second.

    Raises:
        ValueError: A side is odd, or the rate is none.
        ImportError: PyAV is not installed.
    """
    if any(side % 2 for side in size):
        raise ValueError(f"MP4 files have even sides, got {size[0]} x {size[1]} pixels")
    if not math.isfinite(rate) or Fraction(rate).limit_denominator(1001) <= 0:
        raise ValueError(f"MP4 files have a rate above 0 frames per second, got {rate}")
    _pyav()


def write_video(frames: Sequence[Image.Image], path: Path, rate: float) -> None:
    """Write frames as an MP4 file: H.264 in yuv420p, which every player knows, with little loss.

    Args:
        frames: T images of one size, RGB, with even sides.
        path: The file to write, .mp4.
        rate: Frames per second; what is written is the nearest fraction of a denominator up to 1001.

    Raises:
        ValueError: There are no frames, they are of several sizes, or `check_mp4` refuses size or rate.
        ImportError: PyAV is not installed.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"expected frames of one size for {path}, got {sorted(sizes) or 'none'}")
    check_mp4(frames[0].size, rate)
    fraction, av = Fraction(rate).limit_denominator(1001), _pyav()
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fraction, options={"crf": _CRF})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def _pyav() -> ModuleType:
    """PyAV, or an ImportError that names the extra."""
    try:
        import av
    except ImportError as error:
        raise ImportError('video files need PyAV: pip install "iwin-dit[video]"') from error
    return av
