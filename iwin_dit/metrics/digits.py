"""A small classifier of handwritten digits whose penultimate layer measures the built-in data set.

Inception means nothing for 32 x 32 digits, and its weights need a download. Distances in these features are called
`frechet_digits`, never FID. Must not know where the digits come from.

Letters: B batch, H W image axes, N images of a set.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..files import sha256, write_json
from .inputs import exact_float32, expect_images
from .network import FeatureNetwork

IMAGE_SIZE = 32
NUM_CLASSES = 10
NUM_FEATURES = 64
_WEIGHTS, _RECORD = "model.safetensors", "classifier.json"


class DigitsFeatures(FeatureNetwork):
    """Convolutional classifier of 32 x 32 digits; its 64 features are what the last linear layer sees.

    Two distances compare only under the same weights: training gives other ones on another machine, so the hash of the
    weights goes into every result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.widths = {"digits": NUM_FEATURES}
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),  # 16 x 16
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),  # 8 x 8
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),  # 4 x 4
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            images: `(B, 3, 32, 32)` uint8.

        Returns:
            `(B, 64)` float32, named `digits`.

        Raises:
            ValueError: If the batch is not of that kind.
        """
        expect_images(images)
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(
                f"digits features expect 32 x 32 images, got {size}: they measure the built-in data set alone; for "
                "other images give --reference (a folder, a .zip or an .npz) and metrics such as fid"
            )
        with exact_float32(images.device):
            return {"digits": self._penultimate(images)}

    def class_logits(self, images: Tensor) -> Tensor:
        """Scores of the classes, with gradients.

        Args:
            images: `(B, 3, 32, 32)` uint8.

        Returns:
            `(B, 10)` float32.
        """
        return self.head(self._penultimate(images))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of images that are recognised as their class.

        Args:
            images: `(N, 3, 32, 32)` uint8.
            labels: `(N,)` int64.

        Returns:
            A number in [0, 1].
        """
        return (self.class_logits(images).argmax(dim=1) == labels).double().mean().item()

    def describe(self) -> dict[str, Any]:
        """Everything about the features that a number depends on, ready for JSON."""
        return {
            "name": "digits",
            "protocol": "digits",
            "weights_sha256": hashlib.sha256(self._serialized()).hexdigest(),
            "resize": None,
            "normalisation": "x / 127.5 - 1",
            "dtype": "float32",
        }

    def save(self, folder: Path, record: dict[str, Any]) -> None:
        """Write the weights and, last, the record that `load` checks them against.

        Args:
            folder: Where to write; it is created.
            record: Facts about the training to keep beside the hash of the weights.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _WEIGHTS).write_bytes(self._serialized())
        write_json(folder / _RECORD, {"weights_sha256": sha256(folder / _WEIGHTS), **record})

    @staticmethod
    def is_saved(folder: Path) -> bool:
        """Whether `save` has finished in this folder."""
        return (folder / _RECORD).is_file()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Args:
            folder: The folder given to `save`.

        Returns:
            The network, frozen.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the weights are not those of the record.
        """
        expected = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["weights_sha256"]
        got = sha256(folder / _WEIGHTS)
        if got != expected:
            raise ValueError(f"expected {folder / _WEIGHTS} with sha256 {expected}, got {got}: delete {folder}")
        with torch.random.fork_rng(devices=[]):  # what a new network draws must not be missing from a training run
            features = cls()
        features.load_state_dict(load_file(folder / _WEIGHTS))
        return features.requires_grad_(False).eval()

    def _penultimate(self, images: Tensor) -> Tensor:
        return self.trunk(images.float() / 127.5 - 1)

    def _serialized(self) -> bytes:
        """The weights as the content of a safetensors file, the same bytes for the same weights."""
        return save({name: tensor.cpu() for name, tensor in self.state_dict().items()})


def train_digits_features(images: Tensor, labels: Tensor, seed: int, epochs: int = 15) -> DigitsFeatures:
    """Train the classifier from scratch, in seconds; a machine gives the same weights for the same seed.

    Args:
        images: `(N, 3, 32, 32)` uint8, the training split.
        labels: `(N,)` int64 in 0..9.
        seed: Of initialisation, order and augmentation; the global random state is left as it was.
        epochs: Passes over the images.

    Returns:
        The network, frozen, on the CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # no slower for so small a network, and the weights don't depend on the number of cores
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            features = DigitsFeatures()
            _fit(features, images, labels, epochs)
    finally:
        torch.set_num_threads(threads)
    return features.requires_grad_(False).eval()


def _fit(features: DigitsFeatures, images: Tensor, labels: Tensor, epochs: int, batch_size: int = 64) -> None:
    """Minimise the cross-entropy of randomly shifted images, drawing from the global generator."""
    shift = 2
    padded = F.pad(images, (shift, shift, shift, shift))  # with the black of the background
    optimizer = torch.optim.AdamW(features.parameters(), weight_decay=1e-2)
    steps = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            top, left = torch.randint(0, 2 * shift + 1, (2,)).tolist()
            shifted = padded[rows, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
            loss = F.cross_entropy(features.class_logits(shifted), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
