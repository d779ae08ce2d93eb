"""Moving digits: where they are, that they move smoothly and stay inside, and the VAE of their frames."""

import hashlib

import numpy as np
import pytest
import torch

from iwin_dit.data.clips import ClipSettings
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.digits import MIN_PSNR, load_digits, train_digits_vae
from iwin_dit.data.moving_digits import DIGIT_SIZE, FRAME_SIZE, MovingDigits
from iwin_dit.data.sources import split_indices
from tests.test_data_sources import open_like_a_config


@pytest.fixture(scope="module")
def clips() -> MovingDigits:
    return MovingDigits()


@pytest.fixture(scope="module")
def positions(clips: MovingDigits) -> np.ndarray:
    """Of all clips (N, T, 2), in pixels."""
    return np.stack([clips.positions(i) for i in range(len(clips))]) / 16


def test_a_clip_is_its_digit_at_its_positions(clips: MovingDigits, positions: np.ndarray) -> None:
    assert len(clips) == len(clips.labels) == 1797
    digits, labels = load_digits(DIGIT_SIZE)
    assert clips.labels == labels
    weights = torch.arange(FRAME_SIZE, dtype=torch.float64)
    for index in (0, 1, 500, 1796):
        frames = clips[index]
        assert (frames.shape, frames.dtype) == ((16, 3, 32, 32), torch.uint8)
        assert torch.equal(frames[:, 0], frames[:, 2])
        grey, digit = frames[:, 0].double(), digits[index].double()
        # Interpolation keeps brightness and centre of mass; rounding to whole values is all that is lost.
        torch.testing.assert_close(grey.sum((1, 2)), digit.sum().expand(16), rtol=5e-3, atol=0)
        for axis in (0, 1):
            centre = (grey.sum(2 - axis) * weights).sum(1) / grey.sum((1, 2))
            own = (digit.sum(1 - axis) * weights[:16]).sum() / digit.sum()
            expected = torch.from_numpy(positions[index, :, axis]) + own
            torch.testing.assert_close(centre, expected, rtol=0, atol=0.05)


def test_where_a_position_is_whole_the_digit_is_exact(clips: MovingDigits, positions: np.ndarray) -> None:
    digits, _ = load_digits(DIGIT_SIZE)
    whole = np.argwhere((positions % 1 == 0).all(-1))
    assert len(whole) > 50
    for index, time in whole[:20].tolist():
        row, column = positions[index, time].astype(int)
        expected = torch.zeros(32, 32, dtype=torch.uint8)
        expected[row : row + 16, column : column + 16] = digits[index]
        assert torch.equal(clips[index][time, 0], expected)


def test_digits_move_straight_on_and_bounce(positions: np.ndarray) -> None:
    assert (positions.min(), positions.max()) == (0, FRAME_SIZE - DIGIT_SIZE)
    steps = np.diff(positions, axis=1)
    speeds = np.hypot(*np.moveaxis(steps, -1, 0))
    assert 1.4 < np.median(speeds) < 1.6
    assert speeds.max() <= 2
    for axis in (0, 1):
        along, before = steps[:, 1:, axis], steps[:, :-1, axis]
        straight = along == before
        at_border = (positions[:, 1:-1, axis] + before < 0) | (positions[:, 1:-1, axis] + before > 16)
        at_border |= (positions[:, :-2, axis] - along < 0) | (positions[:, :-2, axis] - along > 16)
        assert (straight | at_border).all()
        assert (~straight).any(1).mean() > 0.4  # of the clips bounce
    first = steps[:, 0]
    angles = np.arctan2(first[:, 0], first[:, 1])
    assert np.histogram(angles, bins=8, range=(-np.pi, np.pi))[0].min() > 1797 / 8 * 0.7  # in all directions


def test_clips_stay_what_they_were(clips: MovingDigits) -> None:
    """Latents, VAE and reference of another day rest on them."""
    digest = hashlib.sha256(b"".join(clips[i].numpy().tobytes() for i in range(0, 1797, 100))).hexdigest()
    assert clips.positions(3)[:3].tolist() == [[50, 35], [55, 5], [60, 25]]
    assert digest == "822aaa78d158d65ce9f1e1661fb0b95ec99790d757fe9d2d7c7365bd84cb0cb6"


def test_the_clips_as_a_source(clips: MovingDigits) -> None:
    settings = ClipSettings(5, 4, frame_stride=3, clips_per_video=2)
    source = open_like_a_config("moving_digits", num_classes=10, part_size=1000, clips=settings)
    assert (source.description, source.num_parts, source.class_names) == ("moving_digits", 4, tuple("0123456789"))
    items = list(source.items(3))
    assert [item.key for item in items[:3]] == [f"moving_digits[{i}]" for i in range(1500, 1503)]
    several = MovingDigits(clips=settings)
    assert [item.label for item in items] == several.labels[3000::2]
    assert {item.count for item in items} == {2}
    for clip, frames in enumerate(items[0].read(), start=3000):
        assert np.array_equal([np.asarray(frame) for frame in frames], several[clip].permute(0, 2, 3, 1))
    assert np.array_equal(several.positions(3000), clips.positions(1500)[::3][:5])  # the first clip of digit 1500
    assert not np.array_equal(several.positions(3001), several.positions(3000))
    assert next(clips.items(0)).key == "moving_digits[0]"


def test_no_digit_is_on_both_sides_of_a_split() -> None:
    labels = MovingDigits(clips=ClipSettings(2, 8, clips_per_video=3)).labels
    for holdout, digits in ((300, 100), (0.1, 180)):
        train, held_out = split_indices(labels, holdout, 0, group=3)
        assert len(held_out) == 3 * digits
        assert not set(train // 3) & set(held_out // 3)
        alone = split_indices(labels[::3], digits, 0)[1]
        assert sorted(set(held_out // 3)) == alone.tolist()
        assert set(alone) <= set(split_indices(labels[::3], 300, 0)[1])  # of a VAE that holds out as many digits


@pytest.mark.slow
def test_the_vae_of_the_frames(clips: MovingDigits, positions: np.ndarray) -> None:
    codec = LatentCodec(train_digits_vae(clips, 300, seed=0, steps=250))  # half of those that it gets in earnest
    held_out = split_indices(clips.labels, 300, seed=0)[1][:60]
    pixels = torch.cat([clips[i] for i in held_out.tolist()]) / 127.5 - 1
    error = (codec.decode(codec.normalize(codec.encode(pixels))).clamp(-1, 1) - pixels).square().mean(1)
    assert (10 * (4 / error.mean((1, 2))).log10()).mean() > MIN_PSNR
    corners = positions[held_out].reshape(-1, 2).astype(int).tolist()
    boxes = [error[i, r : r + 17, c : c + 17].mean() for i, (r, c) in enumerate(corners)]
    assert (10 * (4 / torch.stack(boxes)).log10()).mean() > 23  # where the digit is
