"""Clips cut from videos: which frames at which rate, what is refused, and folders of them as a source."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from iwin_dit.data.clips import ClipFolder, ClipSettings, cut_video, read_clips
from iwin_dit.data.images import BrokenImageError, BrokenSampleError
from iwin_dit.data.manifest import Manifest
from iwin_dit.data.videos import BrokenVideoError, ClipFacts, decode_frames, probe_clip
from tests.latent_folders import contents, extraction, small_codec
from tests.test_data_sources import open_like_a_config

H, W = 24, 32
CODECS = {
    "mp4": ("libx264", "yuv420p", {"bf": "3"}),
    "mov": ("mpeg4", "yuv420p", {}),
    "mkv": ("ffv1", "bgr0", {}),
    "webm": ("libvpx-vp9", "yuv420p", {}),
    "avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "gif": ("gif", "rgb8", {}),
}
NTSC = Fraction(30000, 1001)


def greys(count: int, step: int = 6) -> np.ndarray:
    """Frames (T, H, W, 3) that tell their number by their brightness."""
    return np.full((count, H, W, 3), np.arange(count, dtype=np.uint8)[:, None, None, None] * step)


def numbers(frames: list[Image.Image], step: int = 6) -> list[int]:
    """What `greys` the frames are."""
    return [round(float(np.asarray(frame).mean()) / step) for frame in frames]


def write_video(
    path: Path,
    count: int,
    rate: Fraction | int = 8,
    stamps: list[int] | None = None,
    tick: Fraction = Fraction(1, 1000),
) -> Path:
    """A video of `greys`; `stamps` are the ticks (in seconds) at which they are shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, pixels, options = CODECS[path.suffix[1:]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = H, W, pixels
        if stamps:
            stream.codec_context.time_base = tick
        for i, pixel in enumerate(greys(count)):
            frame = av.VideoFrame.from_ndarray(pixel, format="rgb24").reformat(format=pixels)
            if stamps:
                frame.pts, frame.time_base = stamps[i], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(greys(count)):
        Image.fromarray(frame).save(folder / f"{i}.png")
    return folder


# --- which frames


def nearest_frames(count: int, rate: Fraction, wanted: Fraction) -> list[int]:
    """A video seen at another rate, from the definition: the frame nearest in time, while there is one."""
    seen = []
    for k in range(10**6):
        distances = [abs(i / rate - k / wanted) for i in range(count + 1)]
        nearest = max(i for i, distance in enumerate(distances) if distance == min(distances))  # the later of two
        if nearest == count:  # which the video no longer has
            return seen
        seen.append(nearest)
    raise AssertionError


@pytest.mark.parametrize("rate", [Fraction(9), Fraction(12), Fraction(20), Fraction(97, 10), NTSC])
def test_frames_are_the_nearest_in_time(rate: Fraction) -> None:
    for count in (17, 30):
        seen = nearest_frames(count, rate, Fraction(8))
        facts = ClipFacts(count, H, W, rate)
        assert cut_video(Path("a"), facts, ClipSettings(len(seen), 8)) == [seen]
        every_other = ClipSettings(len(seen[::2]), 8, frame_stride=2)
        assert cut_video(Path("a"), facts, every_other) == [seen[(len(seen) + 1) % 2 // 2 :: 2]]
        with pytest.raises(BrokenVideoError, match=rf"at least {len(seen) + 1} frames .* got {len(seen)}$"):
            cut_video(Path("a"), facts, ClipSettings(len(seen) + 1, 8))


@pytest.mark.parametrize("rate", [None, Fraction(24), Fraction(24000, 1001), Fraction("24.2"), Fraction("23.77")])
def test_of_nearly_the_right_rate_every_frame_is_taken(rate: Fraction | None) -> None:
    assert cut_video(Path("a"), ClipFacts(300, H, W, rate), ClipSettings(300, 24)) == [list(range(300))]


def test_without_a_rate_every_frame_is_taken_whatever_the_videos() -> None:
    for facts in (ClipFacts(9, H, W, None), ClipFacts(9, H, W, Fraction(3)), ClipFacts(9, H, W, Fraction(50), False)):
        assert cut_video(Path("a"), facts, ClipSettings(3, frame_stride=3)) == [[1, 4, 7]]
    with pytest.raises(BrokenVideoError, match="at least 10 frames for 4 frames at stride 3, got 9"):
        cut_video(Path("a"), ClipFacts(9, H, W, Fraction(3)), ClipSettings(4, frame_stride=3))


def test_several_clips_are_in_the_middles_of_equal_shares() -> None:
    def starts(frames: int, clips: int) -> list[int]:
        cut = cut_video(Path("a"), ClipFacts(frames, H, W, None), ClipSettings(4, 8, 3, clips))
        assert all(np.diff(indices).tolist() == [3, 3, 3] for indices in cut)
        return [indices[0] for indices in cut]

    assert starts(10, 1) == [0]
    assert starts(10, 3) == [0, 0, 0]
    assert starts(21, 1) == [5]
    for clips in (2, 3, 7):
        assert starts(110, clips) == [math.floor(100 * (j + 0.5) / clips) for j in range(clips)]


def test_what_no_clip_can_be_cut_from_is_named() -> None:
    clips = ClipSettings(4, 10, frame_stride=3)
    for facts, message in (
        (
            ClipFacts(9, H, W, None),
            r"a is too short: expected at least 10 frames for 4 frames at stride 3 of 10 a second, got 9",
        ),
        (ClipFacts(0, H, W, Fraction(10)), "got 0"),
        (ClipFacts(99, H, W, Fraction("9.89")), r"a has 9.89 frames per second, expected a rate of at least 10"),
        (ClipFacts(99, H, W, Fraction(10), constant_rate=False), "a has a variable frame rate"),
    ):
        with pytest.raises(BrokenVideoError, match=message):
            cut_video(Path("a"), facts, clips)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"frame_stride": 0}, "frame_stride must be at least 1, got 0"),
        ({"clips_per_video": -1}, "clips_per_video must be at least 1, got -1"),
        ({"frame_rate": 0.0}, "frame_rate must be above 0 .*, got 0.0"),
        ({"frame_rate": float("nan")}, "got nan"),
        ({"frame_rate": float("inf")}, "got inf"),
    ],
)
def test_settings_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipSettings(**{"frames": 2, "frame_rate": 8, **change})


# --- of real files


@pytest.mark.parametrize("suffix", CODECS)
def test_the_rate_of_every_container(tmp_path: Path, suffix: str) -> None:
    """Whose clocks tick in milliseconds (mkv, webm) or hundredths of a second (gif), which is no variable rate."""
    for rate in (8, 30, NTSC):
        facts = probe_clip(write_video(tmp_path / f"a.{suffix}", 25, rate))
        assert facts.rate is not None
        assert (facts.frames, facts.constant_rate) == (25, True)
        assert float(facts.rate) == pytest.approx(float(rate), rel=3e-3)
    dropped = [40 * i for i in range(26) if i != 20]
    facts = probe_clip(write_video(tmp_path / f"b.{suffix}", 25, 25, dropped))
    assert (facts.frames, facts.constant_rate) == (25, False)


def test_clips_of_files(tmp_path: Path) -> None:
    clips = ClipSettings(4, 8, frame_stride=2, clips_per_video=2)
    for path, rate in (
        (write_video(tmp_path / "a.mp4", 31, 16), 16),
        (write_video(tmp_path / "b.gif", 20, 8), 8),
        (write_video(tmp_path / "c.webm", 40, NTSC), NTSC),
        (write_frames(tmp_path / "d", 20), None),
    ):
        facts = probe_clip(path)
        cut = cut_video(path, ClipFacts(facts.frames, H, W, rate and Fraction(rate)), clips)
        read = read_clips(path, clips)
        assert {(frame.mode, frame.size) for frames in read for frame in frames} == {("RGB", (W, H))}
        assert [numbers(frames) for frames in read] == cut


@pytest.mark.parametrize("ticks", [1, 2])
def test_missing_frames_of_an_avi_show(tmp_path: Path, ticks: int) -> None:
    """Its clock ticks once per frame (here, or every other tick), so a tick more is no rounding."""

    def write(name: str, missing: set[int]) -> ClipFacts:
        stamps = [i * ticks for i in range(25) if i not in missing]
        rate = Fraction(25 * ticks)
        return probe_clip(write_video(tmp_path / f"{name}.avi", len(stamps), rate, stamps, 1 / rate))

    assert write("whole", set()) == ClipFacts(25, H, W, Fraction(25))
    for missing in ({12}, {1}, {6, 18}, {3, 9, 15, 21}):
        assert not write("gaps", missing).constant_rate


def test_a_variable_rate_is_refused_and_jitter_is_not(tmp_path: Path) -> None:
    clips = ClipSettings(4, 8)
    jitter = [round(1000 * i / 25) + (-1) ** i for i in range(1, 26)]
    assert [*map(numbers, read_clips(write_video(tmp_path / "a.mp4", 25, 25, jitter), clips))] == [[6, 9, 13, 16]]
    slower = [40 * i + i * i for i in range(25)]
    for suffix in ("mp4", "mkv"):
        with pytest.raises(BrokenVideoError, match=rf"b\.{suffix} has a variable frame rate"):
            read_clips(write_video(tmp_path / f"b.{suffix}", 25, 25, slower), clips)
    with pytest.raises(BrokenVideoError, match=r"c\.mkv has 5 frames per second, expected a rate of at least 8"):
        read_clips(write_video(tmp_path / "c.mkv", 25, 5), clips)


def test_frames_are_decoded_as_they_are_asked_for(tmp_path: Path) -> None:
    for path in (write_video(tmp_path / "a.mkv", 9), write_frames(tmp_path / "a", 9)):
        found = [int(frame.mean()) // 6 for frame in decode_frames(path, [0, 3, 4, 8, 9, 20])]
        assert found == [0, 3, 4, 8]  # those that there are
        assert list(decode_frames(path, [])) == []


def test_a_damaged_video_is_broken_as_a_whole(tmp_path: Path) -> None:
    """Or else its other clips would take the places of the next video's, which a split must keep together."""
    folder = write_frames(tmp_path / "a", 12)
    clips = ClipSettings(3, 8, clips_per_video=4)
    assert [numbers(frames)[0] for frames in read_clips(folder, clips)] == [1, 3, 5, 7]
    (folder / "9.png").write_bytes(b"torn")
    with pytest.raises(BrokenImageError, match=r"9\.png"):
        read_clips(folder, clips)
    assert numbers(read_clips(folder, ClipSettings(3, 8))[0]) == [4, 5, 6]  # it is not read then

    Image.new("RGB", (W, H + 2)).save(folder / "9.png")
    with pytest.raises(BrokenVideoError, match="expected frames of one size in"):
        read_clips(folder, clips)


# --- folders as a source


def test_a_video_is_one_item_with_all_its_clips(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    path = write_frames(root / "run" / "0", 12)
    (item,) = ClipFolder(root, 100, ClipSettings(4, 8, clips_per_video=4)).items(0)
    assert (item.key, item.label, item.count) == (str(path), 0, 4)
    assert [item.sample_key(i) for i in range(4)] == [f"{path}#{i}" for i in range(4)]
    assert [numbers(clip) for clip in item.read()] == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [7, 8, 9, 10]]
    (item,) = ClipFolder(root, 100, ClipSettings(4, 8)).items(0)
    assert (item.count, item.sample_key(0)) == (1, str(path))


def test_no_video_is_divided_among_parts(folder: Path) -> None:
    for part_size, videos in ((3, [1, 1, 1]), (9, [2, 1]), (100, [3])):
        source = ClipFolder(folder, part_size, ClipSettings(3, 8, clips_per_video=4))
        assert [len(list(source.items(part))) for part in range(source.num_parts)] == videos


def test_a_damaged_video_is_one_broken_item(folder: Path) -> None:
    (folder / "run" / "1" / "9.png").write_bytes(b"torn")
    first, second, _ = ClipFolder(folder, 100, ClipSettings(3, 8, clips_per_video=4)).items(0)
    with pytest.raises(BrokenImageError, match=r"9\.png"):
        first.read()
    assert [numbers(clip) for clip in second.read()] == [[1, 2, 3], [3, 4, 5], [5, 6, 7], [7, 8, 9]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes run (a video a level deeper, a folder of frames) and walk (one video), of 12 frames at 8 a second."""
    root = tmp_path / "videos"
    write_video(root / "run" / "deeper" / "0.mp4", 12)
    write_frames(root / "run" / "1", 12)
    write_video(root / "walk" / "0.mkv", 12)
    (root / "run" / ".hidden.mp4").touch()
    return root


def test_videos_come_in_the_order_of_class_and_path(folder: Path) -> None:
    source = open_like_a_config(folder, clips=ClipSettings(4, 8, clips_per_video=2))
    assert source.description == str(folder)
    assert source.class_names == ("run", "walk")
    assert (source.num_parts, source.num_ignored) == (2, 0)
    parts = [list(source.items(part)) for part in range(2)]
    keys = [[str(folder / name) for name in names] for names in (("run/1", "run/deeper/0.mp4"), ("walk/0.mkv",))]
    assert [[item.key for item in part] for part in parts] == keys
    items = [item for part in parts for item in part]
    assert [(item.label, item.count) for item in items] == [(0, 2), (0, 2), (1, 2)]
    assert [[numbers(clip) for clip in item.read()] for item in items] == [[[2, 3, 4, 5], [6, 7, 8, 9]]] * 3


def test_a_source_opens_no_video_and_knows_when_it_is_another(folder: Path) -> None:
    clips = ClipSettings(4, 8)
    before = ClipFolder(folder, 4, clips).fingerprint
    moved = folder.rename(folder.with_name("moved"))
    (moved / "run" / "1" / "notes.txt").touch()
    assert ClipFolder(moved, 4, clips).fingerprint == before
    frame = moved / "run" / "1" / "3.png"
    content = frame.read_bytes()
    frame.write_bytes(content + b"?")
    assert ClipFolder(moved, 4, clips).fingerprint != before
    frame.write_bytes(content)
    (moved / "walk" / "1.mp4").write_bytes(b"no video")
    source = ClipFolder(moved, 4, clips)
    assert source.fingerprint != before
    with pytest.raises(BrokenSampleError, match=r"1\.mp4 cannot be decoded"):
        list(source.items(0))[3].read()


def test_folder_errors_come_before_work(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips = ClipSettings(4, 8)
    (folder / "walk" / "notes.txt").touch()
    assert ClipFolder(folder, 4, clips).num_ignored == 1
    assert "1 files in" in caplog.text
    assert "are not named as videos or folders of frames (.mp4, " in caplog.text
    (folder / "jump").mkdir()
    (folder / "jump" / "a.flv").touch()
    with pytest.raises(
        ValueError, match=r"no videos or folders of frames .* class folders of .*: jump; fill or remove"
    ):
        ClipFolder(folder, 4, clips)
    Image.new("RGB", (W, H)).save(folder / "jump" / "0.png")
    with pytest.raises(ValueError, match=r"expected clips in .*jump, got images: put the frames of every clip"):
        ClipFolder(folder, 4, clips)
    with pytest.raises(ValueError, match="which is not a folder"):
        ClipFolder(folder / "missing", 4, clips)


@pytest.mark.parametrize("source", ["digits", "hf:user/name", "clips-{00..09}.tar"])
def test_sources_of_images_are_refused_for_clips(source: str) -> None:
    with pytest.raises(ValueError, match=r"moving_digits or a folder for clips, got .*, a source of images"):
        open_like_a_config(source, clips=ClipSettings(4, 8))
    with pytest.raises(ValueError, match=r"got data\.source 'moving_digits', which is of clips"):
        open_like_a_config("moving_digits")
    with pytest.raises(ValueError, match=r"data\.image_key is for tars and Hugging Face"):
        open_like_a_config("moving_digits", clips=ClipSettings(4, 8), image_key="png")


def test_bad_videos_are_named_and_skipped_up_to_the_limit(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut_off = write_video(folder / "run" / "2.mp4", 30)
    cut_off.write_bytes(cut_off.read_bytes()[:600])
    write_video(folder / "walk" / "1.mkv", 3)
    write_video(folder / "walk" / "2.mkv", 12, 5)
    write_video(folder / "walk" / "3.mp4", 12, 25, [40 * i + i * i for i in range(12)])
    (folder / "walk" / "4.gif").write_bytes(b"no video")
    clips = ClipSettings(4, 8, clips_per_video=2)  # a broken video counts once
    settings = {"clips": clips, "resolution": 8, "posterior": "mean"}
    out = folder.with_name("latents")
    with pytest.raises(ValueError, match=r"5 broken videos, data.max_broken is 4; mend or remove them"):
        extraction(small_codec(), out, ClipFolder(folder, 5, clips), max_broken=4, **settings).run()
    extraction(small_codec(), out, ClipFolder(folder, 5, clips), max_broken=5, **settings).run()
    manifest = Manifest.load(out)
    names = ["run/2.mp4", "walk/1.mkv", "walk/2.mkv", "walk/3.mp4", "walk/4.gif"]
    assert manifest.broken == tuple(str(folder / name) for name in names)
    assert (manifest.count, manifest.class_counts) == (6, (4, 2))
    assert "skipped a broken video (5 so far)" in caplog.text
    assert set(manifest.files()) == set(contents(out))
