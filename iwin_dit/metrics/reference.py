"""Reference files: the statistics of a data set as ADM's evaluator keeps them, with where they come from.

An .npz with mean and covariance per kind of features (`mu`, `sigma`, ...), maybe images (`arr_0`), and, in files of
ours, `provenance`. Must not know networks or how statistics are made.

Letters: D features, N H W images and their axes.
"""

import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import write_durably
from .images import ARRAY_KEY, ImageArray
from .moments import Gaussian
from .npz import array_names, explain_damage, open_archive, read_array

# Names of mean and covariance by features. Those of "pool" and "spatial" are ADM's.
REFERENCE_KEYS = {
    "pool": ("mu", "sigma"),
    "spatial": ("mu_s", "sigma_s"),
    "dinov2": ("mu_dinov2", "sigma_dinov2"),
    "digits": ("mu_digits", "sigma_digits"),
}
PROVENANCE_KEY = "provenance"
_MAX_PROVENANCE = 2**24  # bytes
_MAX_FLOAT = sys.float_info.max  # below infinity, and below integers that are no float
_ROUNDING = 1e-6  # of the largest entry: what float32 and another library's sums may leave of symmetry
_COMPARED = ("name", "protocol", "weights_sha256")  # what of a network's description decides its features


@dataclass(frozen=True)
class Reference:
    """What was asked of a reference file.

    Attributes:
        path: The file.
        gaussians: Mean and covariance by features, those that were asked for.
        provenance: Where they come from; None where the file does not say, as ADM's and pytorch-fid's do not.
        images: The images in the file, or None.
    """

    path: Path
    gaussians: dict[str, Gaussian]
    provenance: dict[str, Any] | None
    images: ImageArray | None

    def check(self, name: str, description: Mapping[str, Any]) -> None:
        """Refuse statistics that another network made; a file without provenance passes, as nothing is known of it.

        Args:
            name: Of the network, as in `provenance["features"]`.
            description: `FeatureNetwork.describe()` of the one that is used now.

        Raises:
            ValueError: If network, protocol or weights differ, with every difference; or the file does not name it.
        """
        if self.provenance is None:
            return
        made_with = self.provenance["features"]
        if name not in made_with:
            raise ValueError(f"{self.path} was made with the networks {sorted(made_with)}, without {name!r}")
        there = made_with[name]
        differences = [
            f"{key}: {there.get(key)!r} there, {description.get(key)!r} here"
            for key in _COMPARED
            if there.get(key) != description.get(key)
        ]
        if differences:
            raise ValueError(f"{self.path} was made with another {name} network:\n  " + "\n  ".join(differences))


def load_reference(path: Path, widths: Mapping[str, int]) -> Reference:
    """Read a reference file of ours, of ADM's evaluator or of pytorch-fid.

    Only what is asked for is read. Nothing is unpickled, and nothing is allocated before shape and dtype are checked.

    Args:
        path: The .npz file.
        widths: The features whose statistics are wanted, keys of `REFERENCE_KEYS`, and D of each.

    Returns:
        Statistics in float64 on the CPU, covariances made exactly symmetric; provenance; and the images, of which only
        the header has been read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such archive; or an array is missing, of another shape or dtype, not finite, or (what
            should be a covariance) not symmetric to 1e-6 of its largest entry, or of variances that its covariances
            exceed; or the provenance is not what `save_reference` is to be given.
    """
    with open_archive(path) as archive, explain_damage(f"{path} is not a usable reference"):
        names = array_names(archive)
        gaussians = {features: _read_gaussian(archive, features, width) for features, width in widths.items()}
        provenance = _read_provenance(archive) if PROVENANCE_KEY in names else None
    return Reference(path, gaussians, provenance, ImageArray(path) if ARRAY_KEY in names else None)


def save_reference(
    path: Path,
    gaussians: Mapping[str, Gaussian],
    provenance: Mapping[str, Any],
    images: np.ndarray | None = None,
) -> None:
    """Write a reference file, whole or not at all; what was there is replaced.

    Args:
        path: The .npz file, in a folder that exists.
        gaussians: Mean and covariance by features, keys of `REFERENCE_KEYS`.
        provenance: JSON: `features` (`FeatureNetwork.describe()` by name of the network); where known, `n` images,
            their `image_size` [H, W] and `floor` (by features, `value` of `n` images `against` others); and more.
        images: `(N, H, W, 3)` uint8 to keep beside them; written piece by piece, so it may be a memory map.

    Raises:
        ValueError: If `path` is not named .npz, or the provenance is no JSON.
    """
    if path.suffix != ".npz":
        raise ValueError(f"expected a reference file to be named .npz, got {path}")
    arrays = {} if images is None else {ARRAY_KEY: images}
    for features, gaussian in gaussians.items():
        mean_key, covariance_key = REFERENCE_KEYS[features]
        arrays[mean_key] = gaussian.mean.double().cpu().numpy()
        arrays[covariance_key] = gaussian.covariance.double().cpu().numpy()
    arrays[PROVENANCE_KEY] = np.array(json.dumps(provenance, allow_nan=False))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, savez would append .npz to it
            np.savez(file, allow_pickle=False, **arrays)

    write_durably(path, write)


def _read_gaussian(archive: zipfile.ZipFile, features: str, width: int) -> Gaussian:
    """Read and check mean `(D,)` and covariance `(D, D)` of one kind of features."""
    mean_key, covariance_key = REFERENCE_KEYS[features]
    names = array_names(archive)
    if missing := [key for key in (mean_key, covariance_key) if key not in names]:
        raise ValueError(
            f"it has no {' and '.join(map(repr, missing))}, the statistics of the {features!r} features, but "
            f"{names}: give images instead, or make a file that has them by `evaluate_fid.py reference`"
        )
    mean = read_array(archive, mean_key, (width,), "f").astype(np.float64)
    covariance = read_array(archive, covariance_key, (width, width), "f").astype(np.float64)
    for key, array in ((mean_key, mean), (covariance_key, covariance)):
        if not np.isfinite(array).all():
            raise ValueError(f"'{key}' holds NaN or infinity")
    rounding = _ROUNDING * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > rounding:
        raise ValueError(f"'{covariance_key}' is not symmetric")
    covariance = (covariance + covariance.T) / 2  # an eigendecomposition reads one triangle alone
    variances = covariance.diagonal()
    deviations = np.sqrt(np.maximum(variances, 0))
    # Cauchy-Schwarz, which every covariance meets and which costs no eigenvalues.
    excess = np.abs(covariance)
    excess -= (1 + 1e-3) * np.outer(deviations, deviations)
    if variances.min() < -rounding or excess.max() > rounding:
        raise ValueError(f"'{covariance_key}' is no covariance: variances are negative or smaller than covariances")
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))


def _read_provenance(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Read the JSON in the archive."""
    if archive.getinfo(f"{PROVENANCE_KEY}.npy").file_size > _MAX_PROVENANCE:
        raise ValueError(f"'{PROVENANCE_KEY}' has more than {_MAX_PROVENANCE} bytes")
    try:
        provenance = json.loads(read_array(archive, PROVENANCE_KEY, (), "U").item())
    except RecursionError as error:
        raise ValueError(f"'{PROVENANCE_KEY}' is nested too deeply") from error
    if not isinstance(provenance, dict) or not _is_map_of_objects(provenance.get("features")):
        raise ValueError(f"expected '{PROVENANCE_KEY}' to be a JSON object with 'features' by network, got another")
    n, size, floors = (provenance.get(key) for key in ("n", "image_size", "floor"))
    if not (n is None or _is_count(n)):
        raise ValueError(f"expected 'n' of '{PROVENANCE_KEY}' to be a number of images, got {n!r:.100}")
    if not (size is None or (isinstance(size, list) and len(size) == 2 and all(map(_is_count, size)))):
        raise ValueError(f"expected 'image_size' of '{PROVENANCE_KEY}' to be [height, width], got {size!r:.100}")
    if not (floors is None or (_is_map_of_objects(floors) and all(map(_is_floor, floors.values())))):
        wanted = "{'value': number, 'n': number of images, 'against': number of images} by features"
        raise ValueError(f"expected 'floor' of '{PROVENANCE_KEY}' to be {wanted}, got {floors!r:.100}")
    return provenance


def _is_map_of_objects(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0  # True is an int, too


def _is_floor(value: dict[str, Any]) -> bool:
    number = value.get("value")
    is_number = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= _MAX_FLOAT
    return is_number and _is_count(value.get("n")) and _is_count(value.get("against"))
