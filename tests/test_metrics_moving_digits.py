"""Moving digits: what is cut out of a frame, displacements in closed form, blank frames, and what real clips score."""

import numpy as np
import pytest
import torch
from torch import Tensor

from iwin_dit.data.moving_digits import DIGIT_SIZE, FRAME_SIZE, MovingDigits
from iwin_dit.metrics.digits import IMAGE_SIZE, DigitsFeatures
from iwin_dit.metrics.moving_digits import BACKGROUND, BLANK, MovingDigitsFeatures, crop_digits, summarise


def network(frames: int = 4) -> MovingDigitsFeatures:
    """The features by a classifier of random weights."""
    torch.manual_seed(0)
    return MovingDigitsFeatures(DigitsFeatures(), DIGIT_SIZE, frames).eval()


def squares(corners: list[tuple[int, int]], side: int = 6) -> Tensor:
    """Frames (T, 3, 32, 32) with a bright square at each of the corners (top, left)."""
    frames = torch.zeros(len(corners), 3, FRAME_SIZE, FRAME_SIZE, dtype=torch.uint8)
    for frame, (top, left) in zip(frames, corners, strict=True):
        frame[:, top : top + side, left : left + side] = 255
    return frames


def real_clips(count: int) -> tuple[Tensor, MovingDigits]:
    source = MovingDigits()
    return torch.stack([source[i] for i in range(count)]), source


# --- the crop


def bilinear(image: np.ndarray, y: float, x: float) -> float:
    """Value between the centres of pixels, which are at halves; black beyond the frame."""
    top, left = int(np.floor(y - 0.5)), int(np.floor(x - 0.5))
    value = 0.0
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = top + i, left + j
        weight = (1 - abs(y - 0.5 - row)) * (1 - abs(x - 0.5 - column))
        if 0 <= row < len(image) and 0 <= column < len(image[0]):
            value += weight * image[row, column]
    return value


def test_the_crop_is_a_window_around_the_centre_of_mass() -> None:
    clips, _ = real_clips(3)
    frames = clips[:, 5]
    digits, centres, blank = crop_digits(frames, DIGIT_SIZE)
    assert digits.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert digits.dtype == torch.uint8
    assert not blank.any()
    for frame, digit, centre in zip(frames[:, 0].numpy().astype(float), digits, centres.tolist(), strict=True):
        light = np.maximum(frame - BACKGROUND, 0)
        y, x = (float((light.sum(axis) * (np.arange(32) + 0.5)).sum() / light.sum()) for axis in (1, 0))
        assert centre == pytest.approx([y, x], abs=1e-4)
        step, edge = DIGIT_SIZE / IMAGE_SIZE, DIGIT_SIZE / 2
        places = [(i + 0.5) * step - edge for i in range(IMAGE_SIZE)]
        expected = np.array([[bilinear(frame, y + dy, x + dx) for dx in places] for dy in places])
        assert np.abs(digit.numpy() - expected).max() <= 0.51  # rounded


def test_a_digit_is_cut_out_the_same_wherever_it_is() -> None:
    frames = squares([(13, 13), (0, 0), (26, 26), (3, 20)])
    digits, centres, _ = crop_digits(frames, DIGIT_SIZE)
    assert all(torch.equal(digit, digits[0]) for digit in digits)
    assert centres.tolist() == [[16, 16], [3, 3], [29, 29], [6, 23]]


def test_noise_of_the_background_moves_nothing() -> None:
    frames = squares([(4, 20)])
    noise = torch.randint(0, BACKGROUND + 1, frames.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    _, centres, _ = crop_digits(torch.maximum(frames, noise), DIGIT_SIZE)
    assert centres.tolist() == [[7, 23]]


# --- rows of features


def test_displacements_are_those_of_the_digit() -> None:
    rows = network()(squares([(0, 0), (3, 4), (3, 4), (15, 9)])[None])["motion"]
    assert rows.shape == (1, 14)
    assert network().widths == {"motion": 14}
    assert rows[0, 10:13].tolist() == pytest.approx([5, 0, 13], abs=1e-5)


def test_real_digits_move_by_what_their_positions_say() -> None:
    clips, source = real_clips(20)
    steps = network(16)(clips)["motion"][:, 10:-1]
    positions = np.stack([source.positions(i) for i in range(20)]) / 16
    expected = np.linalg.norm(np.diff(positions, axis=1), axis=2)
    assert np.abs(steps.numpy() - expected).max() < 0.25  # the background is cut off, and interpolated pixels with it
    assert np.abs(np.median(steps.numpy()) - np.median(expected)) < 0.02


def test_frames_are_recognised_one_by_one() -> None:
    clips, _ = real_clips(5)
    features = network(16)
    rows = features(clips)["motion"]
    for clip, row in zip(clips, rows, strict=True):
        classes = [features.classifier.class_logits(crop_digits(frame[None], DIGIT_SIZE)[0]).argmax() for frame in clip]
        assert row[:10].tolist() == [classes.count(digit) / 16 for digit in range(10)]
    assert torch.allclose(features(clips[2:3])["motion"], rows[2:3], atol=1e-5)


def test_blank_frames_show_and_move_nothing() -> None:
    clip = squares([(0, 0), (3, 4), (0, 0), (0, 0)])
    clip[2], clip[3] = BACKGROUND, 0
    clip[3, :, 10:13, 10:13] = 255  # 9 pixels
    assert 3 * 3 < BLANK < 6 * 6
    row = network()(clip[None])["motion"][0]
    assert row[:10].sum() == 0.5
    assert row[10:].tolist() == pytest.approx([5, -1, -1, 0.5])
    clips, _ = real_clips(100)
    assert not crop_digits(clips.flatten(0, 1), DIGIT_SIZE)[2].any()


@pytest.mark.parametrize("shape", [(2, 5, 3, 32, 32), (2, 4, 3, 32, 30), (2, 4, 3, 16, 16)])
def test_other_clips_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expects clips \(4, 3, 32, 32\), got .*: it measures the built-in moving"):
        network()(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected uint8 clips \(B, T, 3, H, W\)"):
        network()(torch.zeros(shape))


def test_what_decides_the_features_is_described() -> None:
    features = network()
    described = features.describe()
    assert (described["name"], described["frames"]) == ("moving_digits", 4)
    assert described["weights_sha256"] == features.classifier.describe()["weights_sha256"]
    assert described["crop"].startswith("16 x 16 pixels around the centre of mass of max(grey - 32, 0)")
    assert described["blank"] == "max(grey - 32, 0) / 223 adds up to less than 10 pixels"


# --- of many clips


def test_the_summary_by_hand() -> None:
    rows = torch.zeros(3, 14)
    rows[0, 7], rows[0, 1] = 0.75, 0.25  # a 7 that looks like a 1 in one frame of four
    rows[1, 2], rows[1, 13] = 0.5, 0.5  # a 2, of which two frames are blank
    rows[2, 3] = 1.0  # a 3 in place of a 7
    rows[:, 10:13] = torch.tensor([[1.0, 2.0, 9.0], [-1.0, 3.0, -1.0], [4.0, 5.0, 6.0]])
    motion = summarise(rows, [7, 2, 7])
    assert motion.recognition == pytest.approx((0.75 + 0.5 + 0) / 3)
    assert motion.by_class == (None, None, 0.5, None, None, None, None, 0.375, None, None)
    assert motion.displacement == 4.0  # of 1 2 3 4 5 6 9
    assert motion.blank == pytest.approx(0.5 / 3)


def test_where_all_is_blank_nothing_moves() -> None:
    rows = network()(torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8))["motion"]
    motion = summarise(rows, [0, 1])
    assert (motion.recognition, motion.displacement, motion.blank) == (0, 0, 1)


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 10], [0, -1, 1], []])
def test_labels_that_fit_no_digit_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="expected a label from 0 to 9 for each of 3 clips, got"):
        summarise(torch.zeros(3, 14), labels)
