"""What latents were made from, against what is wanted now: one comparison for extraction and training.

Knows the names that the user gives to the fields of a manifest or a plan, and which latents serve for more than they
were made for. Knows neither configuration nor files.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .clips import ClipSettings
from .manifest import differences

# Fields that the user calls otherwise than "data." and the field's name.
_NAMES = {
    "source_fingerprint": "content of data.source",
    "num_parts": "parts of data.source",
    "dtype": "data.latents_dtype",
    "batch_size": "data.encode_batch_size",
    "vae_id": "data.vae",
    "vae_sha256": "weights of data.vae",
    "vae_config_sha256": "config of data.vae",
    "latent_shape": "shape of the latents",
    "packages": "versions of packages",
}


def check_made_from(folder: Path, made: Mapping[str, Any], wanted: Mapping[str, Any], finished: bool = True) -> None:
    """Check that a folder of latents was made from what is wanted now.

    Finished latents serve for less, too: mean and deviation where the mean is wanted, mirror images where none are.

    Args:
        folder: The folder, for the message.
        made: Fields of its manifest, or of the plan that it was begun with.
        wanted: Values of some of them.
        finished: Nothing is to be added to the folder.

    Raises:
        ValueError: They differ; every difference is listed by the user's name for it.
    """
    there, here = _by_setting(made), _by_setting(wanted)
    if finished:
        if (there["data.posterior"], here["data.posterior"]) == ("mean_std", "mean"):
            here["data.posterior"] = "mean_std"
        here["data.flips"] = here["data.flips"] or there["data.flips"]
    differing = differences(there, here)
    if differing:
        raise ValueError(
            f"the latents in {folder} were {'made' if finished else 'begun'} with other settings:\n  "
            + "\n  ".join(differing)
            + "\nUse those again, give another --data.latents, or delete that folder to have them made again"
        )


def _by_setting(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by the user's names, None for those of clips where there are images; `photos` and `photos/` are one."""
    flat = {**fields, **fields["source_settings"], "source": str(Path(fields["source"]))}
    del flat["source_settings"]
    if "clips" in flat:
        clips = flat.pop("clips") or {}
        flat |= {field.name: clips.get(field.name) for field in dataclasses.fields(ClipSettings)}
    return {_NAMES.get(name, f"data.{name}"): value for name, value in flat.items()}
