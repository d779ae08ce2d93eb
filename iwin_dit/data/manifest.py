"""The format of a folder of latents: safetensors shards, all labels, and a manifest that lists and hashes them.

    00012-000.safetensors   part and number: `latents` (count, V, P, C, *s), stored latents, and `labels` (count,)
    labels.safetensors      `labels` (N,) of all shards in order, so that a node with a few shards knows every split
    manifest.json           written last: a folder without it is unfinished

V is 2 with flips (the sample, its mirror image), else 1; P is 2 for posterior "mean_std", else 1; labels are int64.
Knows neither writer nor reader. A sample is an image or a clip; C channels, s cells (h, w) or (t, h, w), N samples.

    python -m iwin_dit.data.manifest FOLDER [SHARE SHARES]   # lists the files, of one share, for rsync --files-from=-
"""

import argparse
import dataclasses
import heapq
import json
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from ..files import write_json

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
LABELS = "labels.safetensors"

Posterior = Literal["mean", "sample", "mean_std"]
# By name in the manifest: torch's dtype and safetensors' name of it.
DTYPES = {
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of latents.

    Attributes:
        file: Its name in the folder.
        count: Samples in it.
        sha256: Of the file, in hex.
    """

    file: str
    count: int
    sha256: str

    @staticmethod
    def name(part: int, number: int) -> str:
        """Name of the file of a part, by its number there."""
        return f"{part:05d}-{number:03d}.safetensors"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of latents holds and what made it.

    Attributes:
        format_version: Of the folder; 3, which had no clips, is read as 4, and others are refused.
        source: Where the samples came from, as `ImageSource.description` says it.
        source_fingerprint: `ImageSource.fingerprint`.
        source_settings: What of that source was read: split, keys of image and label and so on; None where it has none.
        class_names: Names by label.
        class_counts: Samples stored per class, by label.
        resolution: Side of the images or frames, in pixels.
        latent_shape: (C, h, w), or of clips (C, t, h, w).
        dtype: Of the latents on disk, a key of `DTYPES`.
        posterior: What of the VAE's posterior is stored: its mean, one sample, or mean and standard deviation.
        flips: The mirror images are stored too.
        shard_size: Samples per file, at most.
        vae_id: The folder or Hub id of the VAE.
        vae_sha256: `LatentCodec.stored_fingerprint` of the VAE.
        vae_config_sha256: `LatentCodec.config_fingerprint` of the VAE.
        latents_mean: C means of the stored latents, over all samples, views and cells.
        latents_std: C standard deviations of the same; for "mean_std" with the posterior's variance.
        shards: The files, in the order of the samples.
        labels_sha256: Of `labels.safetensors`.
        broken: Keys of the images or videos that were skipped; every count in the manifest is of what is stored.
        packages: Versions of what decoded and encoded.
        clips: The fields of the `ClipSettings` by which the clips were cut; None of images.
    """

    format_version: int
    source: str
    source_fingerprint: str
    source_settings: dict[str, str | None]
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    resolution: int
    latent_shape: tuple[int, ...]
    dtype: str
    posterior: Posterior
    flips: bool
    shard_size: int
    vae_id: str
    vae_sha256: str
    vae_config_sha256: str
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    shards: tuple[Shard, ...]
    labels_sha256: str
    broken: tuple[str, ...]
    packages: dict[str, str]
    clips: dict[str, int | float] | None = None

    @property
    def count(self) -> int:
        """Number of samples stored."""
        return sum(shard.count for shard in self.shards)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape (V, P, C, *s) of one sample on disk."""
        return stored_shape(self.latent_shape, self.posterior, self.flips)

    def share_of(self, share: int, shares: int) -> list[int]:
        """Numbers of the shards of one share: the largest first, each goes to the share with the fewest samples so far.

        Ties go by number, so that shards of one size are dealt in turn.

        Args:
            share: Which, from 0.
            shares: How many there are.

        Returns:
            Numbers into `shards`, ascending.

        Raises:
            ValueError: There is no such share, or more shares than shards.
        """
        if not 0 <= share < shares <= len(self.shards):
            raise ValueError(
                f"expected a share of 0 to shares - 1 and at most {len(self.shards)} shares, one per shard; got share "
                f"{share} of {shares}"
            )
        loads = [(0, number) for number in range(shares)]  # samples and number of each share, a heap
        mine = []
        for number in sorted(range(len(self.shards)), key=lambda i: (-self.shards[i].count, i)):
            samples, least = loads[0]
            heapq.heapreplace(loads, (samples + self.shards[number].count, least))
            if least == share:
                mine.append(number)
        return sorted(mine)

    def files(self, share: int = 0, shares: int = 1) -> list[str]:
        """List the files that a node needs to read one share.

        Args:
            share: Which, from 0.
            shares: How many there are.

        Returns:
            Names in the folder.

        Raises:
            ValueError: There is no such share.
        """
        return [MANIFEST, LABELS, *(self.shards[number].file for number in self.share_of(share, shares))]

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, whole or not at all."""
        write_json(folder / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `manifest.json` of `folder`.

        Args:
            folder: A folder of latents.

        Returns:
            The manifest.

        Raises:
            ValueError: The file is missing, not JSON, of another format version, has missing or unknown fields, or
                values that no writer of ours makes.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"expected a folder of latents, got {folder}, which has no {MANIFEST} (unfinished? then start the "
                "extraction again)"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
            if data["format_version"] == 3:  # of images alone, and else the same
                data |= {"format_version": FORMAT_VERSION, "clips": None}
            if data["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"expected format version {FORMAT_VERSION}, got {data['format_version']}: delete the folder and "
                    "extract again"
                )
            shards = tuple(Shard(**shard) for shard in data.pop("shards"))
            lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
            manifest = cls(**{**data, **lists, "shards": shards})
            manifest._check_values()
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a manifest of this version: {type(error).__name__}: {error}") from error
        return manifest

    def _check_values(self) -> None:
        """Raise a ValueError for what would be misread later, far from here."""
        hints = typing.get_type_hints(Manifest)
        of_other_types = [name for name, hint in hints.items() if not _is_of_type(getattr(self, name), hint)]
        if of_other_types:
            raise ValueError(f"unexpected types of {', '.join(of_other_types)}")
        channels, classes = self.latent_shape[0], len(self.class_names)
        checks = {
            "dtype": self.dtype in DTYPES,
            "latent_shape": len(self.latent_shape) == (3 if self.clips is None else 4) and min(self.latent_shape) > 0,
            "class_counts": len(self.class_counts) == classes and sum(self.class_counts) == self.count,
            "latents_mean and latents_std": len(self.latents_mean) == len(self.latents_std) == channels,
            "shards": bool(self.shards) and all(shard.count > 0 for shard in self.shards),
            "file names": all(re.fullmatch(r"\d{5,}-\d{3,}\.safetensors", shard.file) for shard in self.shards),
        }
        wrong = [name for name, holds in checks.items() if not holds]
        if wrong:
            raise ValueError(f"impossible values of {', '.join(wrong)}")


def _is_of_type(value: object, hint: Any) -> bool:
    """Whether a value is what a field's annotation says; unlike for `isinstance`, true and false are no integers."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is types.UnionType:
        return any(_is_of_type(value, argument) for argument in arguments)
    if isinstance(value, tuple) and origin is tuple:
        expected = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(expected) and all(map(_is_of_type, value, expected))
    if isinstance(value, dict) and origin is dict:
        return all(_is_of_type(k, arguments[0]) and _is_of_type(v, arguments[1]) for k, v in value.items())
    if dataclasses.is_dataclass(value) and type(value) is hint:
        return all(_is_of_type(getattr(value, name), field) for name, field in typing.get_type_hints(hint).items())
    return type(value) is hint


def stored_shape(latent_shape: tuple[int, ...], posterior: Posterior, flips: bool) -> tuple[int, ...]:
    """Shape (V, P, C, *s) of one sample on disk.

    Args:
        latent_shape: (C, *s).
        posterior: What is stored of it.
        flips: Whether the mirror image is stored.

    Returns:
        The shape.
    """
    return (2 if flips else 1, 2 if posterior == "mean_std" else 1, *latent_shape)


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List what is wanted and not there.

    Args:
        there: Values by name, as they were written or read.
        wanted: Values by name.

    Returns:
        A line for every name of `wanted` that has another value there, or none.
    """
    return [
        f"{name}: {textwrap.shorten(str(there.get(name)), 200)} there, {textwrap.shorten(str(value), 200)} wanted"
        for name, value in wanted.items()
        if json.dumps(there.get(name)) != json.dumps(value)  # which makes lists of tuples, as reading does
    ]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m iwin_dit.data.manifest", description="List files of latents.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("share", type=int, nargs="?", default=0, help="which share, from 0")
    parser.add_argument("shares", type=int, nargs="?", default=1, help="how many there are")
    arguments = parser.parse_args(argv)
    try:
        files = Manifest.load(arguments.folder).files(arguments.share, arguments.shares)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(files))


if __name__ == "__main__":
    main()
