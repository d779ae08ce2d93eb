"""Inception weights drawn from a seed: a file of the real network, for tests and benchmarks without the real one."""

import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
import torchvision
from torch import nn

from iwin_dit.files import sha256, write_durably
from iwin_dit.metrics.inception import InceptionFeatures

NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
BATCH_NORM = {  # uniform between
    "weight": (0.8, 1.2),
    "bias": (-0.1, 0.1),
    "running_mean": (-0.1, 0.1),
    "running_var": (0.8, 1.2),
    "num_batches_tracked": (0, 0),
}


def write_seeded_weights(path: Path, seed: int = 0) -> Path:
    """Write weights that pytorch-fid, torch-fidelity and torchmetrics read (96 MB), unless the file is there.

    The FID Inception has the parameters of torchvision's, by name and shape, and other poolings. Convolutions are
    He-normal and batch norms near the identity, so that deep features don't vanish, as they do under torch's defaults.

    Args:
        path: File to write; its folder is created.
        seed: Of all tensors; the global random state plays no part. The same seed gives the same bytes.

    Returns:
        `path`.
    """
    if path.exists():
        return path
    with torch.device("meta"):
        network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            for name, tensor in module.state_dict().items():
                low, high = BATCH_NORM[name]
                tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            nn.init.uniform_(module.bias, -0.1, 0.1, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch.save writes its name into the file
            torch.save(network.state_dict(), file)

    write_durably(path, save)
    return path


def open_inception(weights: Path | None, features: Collection[str]) -> InceptionFeatures:
    """Open the Inception of a benchmark under protocol `adm`.

    Args:
        weights: The real ones; None draws them from seed 0.
        features: Which to give.

    Returns:
        The network.
    """
    if weights is not None:
        return InceptionFeatures(weights, features=features)
    with tempfile.TemporaryDirectory() as folder:
        seeded = write_seeded_weights(Path(folder) / "seeded.pth")
        return InceptionFeatures(seeded, features=features, sha256_prefix=sha256(seeded))


def write_torch_home(folder: Path, seed: int = 0) -> Path:
    """Lay out a folder for `TORCH_HOME` in which every library finds the seeded weights under its own name.

    Args:
        folder: The folder.
        seed: See `write_seeded_weights`.

    Returns:
        The weights file.
    """
    first, second = (folder / "hub" / "checkpoints" / name for name in NAMES)
    write_seeded_weights(first, seed)
    if not second.exists():
        second.hardlink_to(first)
    return first
