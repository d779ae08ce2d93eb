"""Frames of clips, and folders of clips as a set: what is read, what is refused, what the record says."""

import hashlib
import logging
import resource
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from iwin_dit.data.clips import ClipSettings, read_clips
from iwin_dit.data.images import BrokenImageError, centre_crop
from iwin_dit.data.videos import BrokenVideoError, ClipFacts, clip_files, frame_paths, probe_clip, read_frames
from iwin_dit.data.videos import write_video as write_mp4
from iwin_dit.evaluation.videos import Cut, VideoFiles
from iwin_dit.files import sha256
from tests.corpus import png_chunk, png_start
from tests.tools import all_frames

H, W, RATE = 32, 48, 8
# Container, codec, pixel format, options, and the largest error of a pixel.
CODECS = {
    "mp4": ("libx264", "yuv420p", {"bf": "3"}, 8),
    "m4v": ("libx264", "yuv420p", {}, 8),
    "mov": ("mpeg4", "yuv420p", {}, 24),
    "mkv": ("ffv1", "bgr0", {}, 0),
    "webm": ("libvpx-vp9", "yuv420p", {}, 8),
    "avi": ("mpeg4", "yuv420p", {"bf": "2"}, 24),
    "gif": ("gif", "rgb8", {}, 80),
}


def ramp(frames: int, seed: int = 0) -> np.ndarray:
    """Frames (T, H, W, 3) of one colour each, which lossy codecs keep and which tells them apart."""
    steps = np.arange(frames) * 10
    colours = np.stack([steps, 250 - steps, np.full(frames, 100 + seed)], axis=1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (frames, H, W, 3)).copy()


def write_video(
    path: Path, frames: np.ndarray, rate: int = RATE, prepare: Callable[[av.VideoStream], None] = lambda stream: None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, pixels, options, _ = CODECS[path.suffix[1:].lower()]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        prepare(stream)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: np.ndarray, name: str = "{}.png") -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


# --- one clip


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_of_every_container(tmp_path: Path, suffix: str) -> None:
    path, frames = tmp_path / f"clip.{suffix}", ramp(20)
    write_video(path, frames)
    rate = Fraction(RATE) if suffix != "gif" else Fraction(19, 2) / Fraction("1.19")  # whose clock ticks in 0.01 s
    assert probe_clip(path) == ClipFacts(20, H, W, rate)
    decoded = all_frames(path)
    assert decoded.shape == (20, H, W, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - frames).max() <= CODECS[suffix][3]
    assert np.array_equal(read_frames(path, [3, 5, 7, 19]), decoded[[3, 5, 7, 19]])


def test_lossless_frames_are_exact(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, H, W, 3), dtype=np.uint8)
    assert np.array_equal(all_frames(write_video(tmp_path / "a.mkv", frames)), frames)
    assert np.array_equal(all_frames(write_frames(tmp_path / "a", frames)), frames)


def test_frames_of_a_folder_come_by_number(tmp_path: Path) -> None:
    frames = ramp(12)
    folder = write_frames(tmp_path / "clip", frames, "frame_{}.png")
    (folder / "notes.txt").write_text("no frame")
    (folder / "._frame_0.png").write_text("what macOS leaves behind")
    assert [path.name for path in frame_paths(folder)] == [f"frame_{i}.png" for i in range(12)]
    assert probe_clip(folder) == ClipFacts(12, H, W, None)
    assert np.array_equal(read_frames(folder, [1, 4, 7, 10]), frames[1:11:3])


def test_the_colours_of_a_gif_with_transparent_frames(tmp_path: Path) -> None:
    """Frames that change a part of the picture are laid over what was there."""
    first, second = Image.new("RGB", (W, H), (255, 0, 0)), Image.new("RGB", (W, H), (255, 0, 0))
    second.paste((0, 0, 255), (0, 0, W // 2, H))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second], duration=125)
    decoded = all_frames(tmp_path / "a.gif")
    assert np.abs(decoded.astype(int) - np.stack([first, second])).max() <= 8


@pytest.mark.parametrize(
    "make", [lambda p: write_video(p / "a.mp4", ramp(5)), lambda p: write_frames(p / "a", ramp(5))]
)
def test_frames_that_are_not_there_are_named(tmp_path: Path, make) -> None:
    clip = make(tmp_path)
    assert len(read_frames(clip, [0, 2, 4])) == 3
    with pytest.raises(BrokenVideoError, match=r"a(\.mp4)? ends before its frame 5 could be decoded"):
        read_frames(clip, [1, 3, 5])


@pytest.mark.parametrize("suffix", ["mp4", "mov", "avi"])
def test_clips_that_were_cut_off_are_named(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip.{suffix}", ramp(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenVideoError, match=rf"clip\.{suffix} (cannot be decoded|has no video stream)"):
        all_frames(path)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mov"])
def test_damage_is_an_error_and_not_a_guess(tmp_path: Path, suffix: str) -> None:
    """H.264 and MPEG-4 streams tell, where they are damaged; the decoder fills the gap and says so."""
    frames = np.random.default_rng(0).integers(0, 256, (9, H, W, 3), dtype=np.uint8)
    path = write_video(tmp_path / f"clip.{suffix}", frames)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    position, size = places[4]
    content[position + 8 : position + size] = bytes(size - 8)  # all but a packet's first bytes
    path.write_bytes(content)
    with pytest.raises(BrokenVideoError, match=rf"clip\.{suffix} (is damaged in frame \d|cannot be decoded)"):
        all_frames(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no video",
        b"#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile secret.mp4\n",
    ],
)
def test_files_that_are_no_video_are_refused_and_lead_nowhere(tmp_path: Path, content: bytes) -> None:
    """A playlist under the name of a video would make FFmpeg open what it lists."""
    write_video(tmp_path / "secret.mp4", ramp(2))
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    for function in (all_frames, probe_clip):
        with pytest.raises(BrokenVideoError, match=r"clip\.mp4 cannot be decoded"):
            function(path)


def test_things_that_are_no_clip(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(FileNotFoundError, match="which is neither"):
        probe_clip(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match=r"expected a video file \(\.mp4"):
        all_frames(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="found none"):
        all_frames(tmp_path / "empty")
    folder = write_frames(tmp_path / "clip", ramp(2))
    (folder / "1.png").write_bytes(png_start(W, H) + png_chunk(b"IDAT", b""))
    with pytest.raises(BrokenImageError, match=r"1\.png"):
        all_frames(folder)
    Image.new("RGB", (W, H + 1)).save(folder / "1.png")
    with pytest.raises(ValueError, match="frames of one size"):
        all_frames(folder)


def test_without_pyav_folders_still_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, folder = write_video(tmp_path / "a.mp4", ramp(3)), write_frames(tmp_path / "a", ramp(3))
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(all_frames(folder)) == 3
    with pytest.raises(ImportError, match=r"iwin-dit\[video\]"):
        all_frames(video)


def quarters() -> np.ndarray:
    """Frames (T, H, W, 3) whose quarters have a brightness each, so that no turn or mirror image looks like another."""
    frame = np.kron(np.array([[20, 90], [160, 230]], np.uint8), np.ones((H // 2, W // 2), np.uint8))
    return np.repeat(frame[None, ..., None], 3, axis=0).repeat(3, axis=-1)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_clips_are_upright(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    """A phone stores the sensor's rows and how they are to be turned, counterclockwise, and then mirrored."""
    path = write_video(
        tmp_path / "a.mp4", quarters(), prepare=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored)
    )
    upright = np.rot90(quarters(), degrees // 90, axes=(1, 2))
    upright = upright[:, :, ::-1] if mirrored else upright
    assert probe_clip(path) == ClipFacts(3, *upright.shape[1:3], Fraction(RATE))
    assert np.abs(all_frames(path).astype(int) - upright).max() <= CODECS["mp4"][3]


def test_oblique_turns_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", quarters(), prepare=lambda stream: stream.set_display_rotation(45))
    for function in (probe_clip, all_frames):
        with pytest.raises(BrokenVideoError, match=r"a\.mp4 is turned by 45 degrees or scaled, expected quarter turns"):
            function(path)


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_pixels_that_are_not_square_are_refused(tmp_path: Path, suffix: str) -> None:
    def write(name: str, aspect: Fraction) -> Path:
        def prepare(stream: av.VideoStream) -> None:
            stream.codec_context.sample_aspect_ratio = aspect

        return write_video(tmp_path / f"{name}.{suffix}", ramp(3), prepare=prepare)

    assert probe_clip(write("square", Fraction(1))).width == W
    assert probe_clip(write("scaled", Fraction(100, 101))).width == W  # to even sides, which are rounded
    path = write("pal", Fraction(16, 15))
    for function in (probe_clip, all_frames):
        with pytest.raises(BrokenVideoError, match=r"pal\..* has pixels of aspect 16/15, expected square ones"):
            function(path)


@pytest.mark.parametrize("rate", [8, 12.5, 25 / 3, 30000 / 1001])
def test_what_is_written_is_read(tmp_path: Path, rate: float) -> None:
    frames = np.concatenate([ramp(8), np.repeat(quarters(), 3, axis=0)])
    path = tmp_path / "a b%d.mp4"
    write_mp4([Image.fromarray(frame) for frame in frames], path, rate)
    facts = probe_clip(path)
    assert facts == ClipFacts(17, H, W, Fraction(rate).limit_denominator(1001))
    assert np.abs(all_frames(path).astype(int) - frames).max() <= 8
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    even, odd, other = (Image.new("RGB", size) for size in ((16, 16), (16, 15), (16, 18)))
    for frames, rate, message in (
        ([], 8, "of one size for .*, got none"),
        ([odd, odd], 8, "MP4 files have even sides, got 16 x 15 pixels"),
        ([even, other], 8, r"of one size .*, got \[\(16, 16\), \(16, 18\)\]"),
        ([even], 0.0, "a rate above 0 frames per second, got 0.0"),
        ([even], float("inf"), "got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            write_mp4(frames, path, rate)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"iwin-dit\[video\]"):
        write_mp4([even], path, 8)
    assert not path.exists()


# --- folders of clips


def test_clips_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    clips = [ramp(9, seed) for seed in range(4)]
    paths = [
        write_frames(tmp_path / "a" / "2", clips[0]),
        write_video(tmp_path / "b" / "0.mkv", clips[1]),
        write_video(tmp_path / "b" / "1.MKV", clips[2]),
        write_video(tmp_path / "c.mkv", clips[3]),
    ]
    (tmp_path / "notes.txt").write_text("no clip")
    write_frames(tmp_path / ".cache", ramp(1))
    assert list(clip_files(tmp_path)[0]) == paths
    videos = VideoFiles(tmp_path, Cut(ClipSettings(4, frame_stride=2)))
    assert len(videos) == 4
    assert videos.size == (H, W)
    assert videos.fps is None  # as the folder does not say
    assert videos.name == str(tmp_path)
    assert videos.prefetch
    batch = videos.read([3, 0, 1, 2])
    assert batch.shape == (4, 4, 3, H, W)
    assert batch.dtype == torch.uint8
    for clip, index in zip(batch, (3, 0, 1, 2), strict=True):
        assert np.array_equal(clip.permute(0, 2, 3, 1).numpy(), clips[index][1:8:2])
    frame_hashes = "".join(f"{sha256(paths[0] / f'{i}.png')}  {i}.png\n" for i in range(9))
    hashes = [hashlib.sha256(frame_hashes.encode()).hexdigest(), *map(sha256, paths[1:])]
    names = ["a/2", "b/0.mkv", "b/1.MKV", "c.mkv"]
    listing = "".join(f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True))
    assert videos.record() == {
        "path": str(tmp_path),
        "n": 4,
        "frames": 4,
        "frame_stride": 2,
        "frame_rate": None,
        "resolution": None,
        "cut": "4 frames at stride 2, from the middle",
        "fps": None,
        "frames_per_second": [RATE, RATE],
        "image_size": [H, W],
        "stored_as": {".mkv": 3, "frames": 1},
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "duplicates": 0,
        "ignored_files": 1,
        "broken": [],
    }


def test_the_record_has_the_slowest_and_the_fastest_frame_rate(tmp_path: Path) -> None:
    for seed, (name, rate) in enumerate({"a/0.mkv": 8, "a/1.avi": 10, "b/0": 0, "b/1": 0, "c/0.avi": 8}.items()):
        if rate:
            write_video(tmp_path / name, ramp(3, seed), rate)
        else:
            write_frames(tmp_path / name, ramp(3, seed))
    write_video(tmp_path / "c" / "1.mkv", ramp(3), 8)
    for folder, rates, fps in (("", [8, 10], None), ("b", None, None), ("c", [8, 8], 4)):
        videos = VideoFiles(tmp_path / folder, Cut(ClipSettings(2, frame_stride=2)))
        assert videos.record()["frames_per_second"] == (rates and pytest.approx(rates, rel=1e-2))
        assert videos.fps == videos.record()["fps"] == (fps and pytest.approx(fps, rel=1e-2))


def test_links_are_followed_to_clips_and_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    write_frames(elsewhere / "0", ramp(3))
    write_video(elsewhere / "1.mkv", ramp(3, 1))
    write_frames(root / ".cache" / "2", ramp(3, 2))
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(root, target_is_directory=True)
    assert list(clip_files(root)[0]) == [root / "linked" / "0", root / "linked" / "1.mkv"]
    assert len(VideoFiles(root, Cut(ClipSettings(3)))) == 2


def test_copies_of_clips_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, seed in enumerate((0, 1, 0)):
        write_frames(tmp_path / str(i), ramp(3, seed))
    with caplog.at_level(logging.WARNING):
        assert VideoFiles(tmp_path, Cut(ClipSettings(3))).record()["duplicates"] == 1
    assert "1 of 3 images repeat another one" in caplog.text


def test_folders_of_clips_that_cannot_count_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing, which is none"):
        VideoFiles(tmp_path / "missing")
    write_video(tmp_path / "0.avi", ramp(9))
    with pytest.raises(ValueError, match=r"at least 2 clips .* got 1"):
        VideoFiles(tmp_path, Cut(ClipSettings(9)))
    write_frames(tmp_path / "1", ramp(7))
    assert len(VideoFiles(tmp_path, Cut(ClipSettings(7)))) == 2
    short = r"5 frames at stride 2 in every clip .* 1 of 2 cannot be used so:\n  .*1 is too short: .* 9 .*, got 7"
    with pytest.raises(ValueError, match=short):
        VideoFiles(tmp_path, Cut(ClipSettings(5, frame_stride=2)))
    write_frames(tmp_path / "2", ramp(9)[:, :16])
    with pytest.raises(ValueError, match=r"one size in .*, got 2 of 32 x 48, 1 of 16 x 48"):
        VideoFiles(tmp_path, Cut(ClipSettings(7)))
    write_video(tmp_path / "1" / "also.avi", ramp(9))
    with pytest.raises(ValueError, match=r"the frames of one clip in .*1, got both"):
        VideoFiles(tmp_path, Cut(ClipSettings(7)))
    with pytest.raises(ValueError, match=r"expected clips in .*2, got images"):
        VideoFiles(tmp_path / "2", Cut(ClipSettings(7)))


@pytest.mark.parametrize(("clips", "resolution"), [(ClipSettings(2, clips_per_video=2), None), (ClipSettings(2), 0)])
def test_cuts_out_of_range_are_refused(clips: ClipSettings, resolution: int | None) -> None:
    with pytest.raises(ValueError, match="expected one clip of a video, and a resolution of at least 1, got "):
        Cut(clips, resolution)


def test_with_a_frame_rate_clips_are_those_of_training(tmp_path: Path) -> None:
    """Every other frame of a video twice as fast, every frame of a folder; the middle; cropped; sizes may differ."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 13, H, W, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mkv", noise[0], rate=16)
    write_frames(tmp_path / "b", noise[1][:, :, :40])
    videos = VideoFiles(tmp_path, Cut(ClipSettings(3, 8, 2), 16))
    assert videos.size == (16, 16)
    assert videos.fps == videos.record()["fps"] == 4
    found = videos.read([0, 1]).permute(0, 1, 3, 4, 2).numpy()
    # Of 7 frames at 8 a second the clip takes 5, from the second; of 13 from the fifth.
    chosen = noise[0][2:11:4], noise[1][4:9:2, :, :40]
    for path, clip, frames in zip(videos.paths, found, chosen, strict=True):
        assert np.array_equal(clip, [np.asarray(centre_crop(Image.fromarray(frame), 16)) for frame in frames])
        trained = read_clips(path, ClipSettings(frames=3, frame_rate=8.0, frame_stride=2))[0]
        assert np.array_equal(frames, [np.asarray(frame) for frame in trained])
    with pytest.raises(ValueError, match=r"1 of 2 cannot be used so:\n  .*a.mkv has 16 frames per second, expected"):
        VideoFiles(tmp_path, Cut(ClipSettings(3, 20), 16))


def test_real_clips_that_cannot_be_used_are_left_out_up_to_a_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("a/0.mkv", "a/1.mkv", "b/2.mkv")):
        write_video(tmp_path / name, ramp(9, seed))
    good = VideoFiles(tmp_path, Cut(ClipSettings(4, 8)))
    write_video(tmp_path / "a" / "short.mkv", ramp(3))
    write_video(tmp_path / "b" / "slow.avi", ramp(9), 4)
    (tmp_path / "b" / "torn.mp4").write_bytes(b"no video")
    with pytest.raises(
        ValueError, match=r"\(at most 2 may be left out\), but 3 of 6 cannot be used so:\n  .*short\.mkv is"
    ):
        VideoFiles(tmp_path, Cut(ClipSettings(4, 8)), max_broken=2)
    with caplog.at_level(logging.WARNING):
        videos = VideoFiles(tmp_path, Cut(ClipSettings(4, 8)), max_broken=3)
    assert all(text in caplog.text for text in ("3 clips are left out of", "short.mkv", "slow.avi", "torn.mp4"))
    assert videos.record() == {**good.record(), "broken": ["a/short.mkv", "b/slow.avi", "b/torn.mp4"]}
    assert torch.equal(videos.read([0, 1, 2]), good.read([0, 1, 2]))
    with pytest.raises(ValueError, match=r"expected at least 2 clips .* got 0, 2 left out"):
        (tmp_path / "b" / "2.mkv").unlink()
        VideoFiles(tmp_path / "b", Cut(ClipSettings(4, 8)), max_broken=2)


def test_clips_that_break_in_the_middle_are_found_before_the_work_where_some_may_be_left_out(tmp_path: Path) -> None:
    for i in range(4):
        write_frames(tmp_path / str(i), ramp(6, i))
    (tmp_path / "2" / "3.png").write_bytes(b"torn")
    with pytest.raises(BrokenImageError, match=r"3\.png"):
        VideoFiles(tmp_path, Cut(ClipSettings(4))).read(range(4))
    videos = VideoFiles(tmp_path, Cut(ClipSettings(4)), max_broken=1)
    assert (len(videos), videos.broken) == (3, ["2"])
    assert videos.read(range(3)).shape == (3, 4, 3, H, W)


def test_a_file_that_cannot_be_read_is_no_broken_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of a failing disk, or one more than may be open."""
    path = write_video(tmp_path / "a.mkv", ramp(3))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            probe_clip(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("format_", ["gif", "MP4", "frames"])
def test_each_clip_counts_once(tmp_path: Path, format_: str) -> None:
    for i in range(2):
        write_video(tmp_path / f"{i}.5.mkv", ramp(4, i))
    assert len(VideoFiles(tmp_path, Cut(ClipSettings(4)))) == 2
    if format_ == "frames":
        write_frames(tmp_path / "1.5", ramp(4))
    else:
        write_video(tmp_path / f"1.5.{format_}", ramp(4))
    with pytest.raises(ValueError, match=r"got 1 in several formats, as .*1\.5: keep one format, and the grid"):
        VideoFiles(tmp_path, Cut(ClipSettings(4)))
