"""The networks that metrics need, opened from files or the cache; the digits classifier is trained where missing.

Must not know the images that are measured.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import is_offline_mode

from ..data.digits import Digits
from ..data.sources import split_indices
from ..metrics.digits import DigitsFeatures, train_digits_features
from ..metrics.dinov2 import DINOv2Features
from ..metrics.i3d import I3DFeatures
from ..metrics.inception import InceptionFeatures, find_inception_weights
from ..metrics.network import FeatureNetwork
from .suite import METRICS, check_metrics

CLASSIFIER = Path("data/digits/classifier")
HOLDOUT, SPLIT_SEED, MIN_ACCURACY = 300, 0, 0.98  # of the digits classifier


def open_networks(
    metrics: Sequence[str],
    *,
    protocol: str,
    inception_weights: Path | None,
    dinov2: str | None,
    i3d: Path | None,
    device: torch.device | str,
) -> dict[str, FeatureNetwork]:
    """Open every network that a metric needs.

    Args:
        metrics: Keys of `METRICS`.
        protocol: Of the Inception network.
        inception_weights: Their file, where it is not in torch's cache.
        dinov2: Folder or Hub id of DINOv2, where it is not the usual one.
        i3d: The TorchScript file of I3D, which fvd needs.
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
    accuracy = features.accuracy(images[held_out], labels[held_out])
    if accuracy < MIN_ACCURACY:
        raise ValueError(
            f"the digits classifier recognises {accuracy:.1%} of held-out digits, under {MIN_ACCURACY:.0%}"
        )
    features.save(folder, {"held_out_accuracy": accuracy, "holdout": HOLDOUT, "seed": SPLIT_SEED})
