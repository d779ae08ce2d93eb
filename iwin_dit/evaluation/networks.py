"""The networks that metrics need, opened from files or the cache; the classifiers of digits are trained where missing.

Must not know the images that are measured.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import is_offline_mode

from ..data.digits import Digits, load_digits
from ..data.moving_digits import DIGIT_SIZE, FRAME_SIZE, MovingDigits
from ..data.sources import split_indices
from ..metrics.digits import DigitsFeatures, train_digits_features
from ..metrics.dinov2 import DINOv2Features
from ..metrics.i3d import I3DFeatures
from ..metrics.inception import InceptionFeatures, find_inception_weights
from ..metrics.moving_digits import MovingDigitsFeatures, crop_digits
from ..metrics.network import FeatureNetwork
from .suite import METRICS, check_metrics

CLASSIFIER = Path("data/digits/classifier")
MOTION_CLASSIFIER = Path("data/moving_digits/classifier")
HOLDOUT, SPLIT_SEED, MIN_ACCURACY = 300, 0, 0.98  # of both classifiers


def open_networks(
    metrics: Sequence[str],
    *,
    protocol: str,
    inception_weights: Path | None,
    dinov2: str | None,
    i3d: Path | None,
    frames: int = 16,
    device: torch.device | str,
) -> dict[str, FeatureNetwork]:
    """Open every network that a metric needs.

    Args:
        metrics: Keys of `METRICS`.
        protocol: Of the Inception network.
        inception_weights: Their file, where it is not in torch's cache.
        dinov2: Folder or Hub id of DINOv2, where it is not the usual one.
        i3d: The TorchScript file of I3D, which fvd needs.
        frames: Of a clip, on which the features of moving_digits depend.
        device: Where to put them.

    Returns:
        The networks by name, frozen.

    Raises:
        ValueError: The metrics don't go together, something is given that none of them uses, fvd has no `i3d`, or a
            file is not what it should be.
        FileNotFoundError: Weights are missing; the text says where to put them.
        ImportError: A library is missing; the text names the extra.
    """
    check_metrics(metrics, protocol)
    needed = {METRICS[name].network for name in metrics}
    given = {"inception": inception_weights, "dinov2": dinov2, "i3d": i3d}
    for name, value in given.items():
        if value is not None and name not in needed:
            raise ValueError(f"{', '.join(metrics)} does not use {name}, but {value} was given for it")
    networks: dict[str, FeatureNetwork] = {}
    if "inception" in needed:
        features = sorted({METRICS[name].features for name in metrics if METRICS[name].network == "inception"})
        weights = find_inception_weights(inception_weights, download=not is_offline_mode())
        networks["inception"] = InceptionFeatures(weights, protocol, features)
    if "dinov2" in needed:
        chosen = () if dinov2 is None else (dinov2,)
        networks["dinov2"] = DINOv2Features(*chosen, download=not is_offline_mode())
    if "digits" in needed:
        if not DigitsFeatures.is_saved(CLASSIFIER):
            train_classifier(CLASSIFIER)
        networks["digits"] = DigitsFeatures.load(CLASSIFIER)
    if "motion" in needed:
        if not DigitsFeatures.is_saved(MOTION_CLASSIFIER):
            train_motion_classifier(MOTION_CLASSIFIER)
        networks["motion"] = MovingDigitsFeatures(DigitsFeatures.load(MOTION_CLASSIFIER), DIGIT_SIZE, frames)
    if "i3d" in needed:
        if i3d is None:
            raise ValueError("fvd needs the TorchScript file of I3D (usually i3d_torchscript.pt): give it with --i3d")
        networks["i3d"] = I3DFeatures(i3d)
    return {name: network.requires_grad_(False).eval().to(device) for name, network in networks.items()}


def train_classifier(folder: Path) -> None:
    """Train the digits classifier on the training split and save it.

    Args:
        folder: Where to save it.

    Raises:
        ValueError: If it recognises too few of the held-out digits for its features to mean anything.
    """
    digits = Digits()
    images, labels = torch.stack([digits[i] for i in range(len(digits))]), torch.tensor(digits.labels)
    train, held_out = (torch.from_numpy(rows) for rows in split_indices(digits.labels, HOLDOUT, SPLIT_SEED))
    features = train_digits_features(images[train], labels[train], seed=SPLIT_SEED)
    _save(features, features.accuracy(images[held_out], labels[held_out]), folder, "held-out digits")


def train_motion_classifier(folder: Path) -> None:
    """Train a classifier of what is cut out of frames, on the still digits of the training split, and save it.

    Args:
        folder: Where to save it.

    Raises:
        ValueError: If it recognises too few frames of the held-out digits' clips.
    """
    still, labels = load_digits(DIGIT_SIZE)
    margin = (FRAME_SIZE - DIGIT_SIZE) // 2
    frames = F.pad(still, (margin,) * 4)[:, None].expand(-1, 3, -1, -1)  # (1797, 3, 32, 32)
    digits, _, _ = crop_digits(frames, DIGIT_SIZE)
    train, held_out = split_indices(labels, HOLDOUT, SPLIT_SEED)
    features = train_digits_features(digits[train], torch.tensor(labels)[train], seed=SPLIT_SEED)
    clips = MovingDigits()
    moving = torch.stack([clips[i] for i in held_out.tolist()])  # (300, 16, 3, 32, 32)
    cut_out, _, _ = crop_digits(moving.flatten(0, 1), DIGIT_SIZE)
    wanted = torch.tensor(labels)[held_out].repeat_interleave(moving.shape[1])
    _save(features, features.accuracy(cut_out, wanted), folder, "frames of held-out digits")


def _save(features: DigitsFeatures, accuracy: float, folder: Path, what: str) -> None:
    """Save a classifier, unless it recognises too few."""
    if accuracy < MIN_ACCURACY:
        raise ValueError(f"the digits classifier recognises {accuracy:.1%} of {what}, under {MIN_ACCURACY:.0%}")
    features.save(folder, {"held_out_accuracy": accuracy, "holdout": HOLDOUT, "seed": SPLIT_SEED})
