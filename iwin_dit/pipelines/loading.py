"""Find and load a pipeline, and say which it is: what every script's `--model` accepts.

Owns the names of what training leaves for others: the two sets of weights of a checkpoint, its manifest, and the record
beside an exported pipeline. Must not know how training writes them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ..files import sha256
from ..models.loading import load_strictly
from .image import IwinDiTPipeline
from .video import IwinDiTVideoPipeline

Weights = Literal["ema", "raw"]

CHECKPOINT_WEIGHTS: dict[Weights, str] = {"ema": "ema.safetensors", "raw": "model.safetensors"}
CHECKPOINT_MANIFEST = "checkpoint.json"  # step, and size and sha256 of the checkpoint's files
EXPORT_RECORD = "training.json"  # step of a pipeline that training exported, always with the averaged weights
INDEX = "model_index.json"
PIPELINES = {cls.__name__: cls for cls in (IwinDiTPipeline, IwinDiTVideoPipeline)}


@dataclass(frozen=True)
class _Found:
    """A pipeline's folder; of a checkpoint, also the weights that replace its transformer's, and their step."""

    folder: Path
    weights: Path | None = None
    step: int | None = None
    revision: str | None = None  # commit of a Hub id


def load_pipeline(
    path_or_id: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: Weights = "ema",
) -> IwinDiTPipeline | IwinDiTVideoPipeline:
    """Load a pipeline from a run, one of its checkpoints, a pipeline folder or the Hub: for images or for videos.

    Args:
        path_or_id: `runs/<name>` (its `pipeline/` is taken), `runs/<name>/checkpoints/step-<number>` (the run's
            `pipeline/` with the transformer's weights of that step), a folder with a model_index.json, or a Hub id.
        device: Where to put it.
        dtype: Of its weights.
        weights: "ema" for the averaged weights; "raw" for those that were trained, which only a checkpoint has.

    Returns:
        The pipeline, ready to call.

    Raises:
        ValueError: If there is no pipeline there, none of ours, none with these weights, or a checkpoint's file is
            damaged.
    """
    found = _find(path_or_id, weights)
    name = json.loads((found.folder / INDEX).read_text()).get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"expected a pipeline of class {' or '.join(PIPELINES)} in {found.folder}, got {name}")
    pipe = PIPELINES[name].from_pretrained(found.folder, dtype=dtype)
    if found.weights is not None:
        load_strictly(pipe.transformer, load_file(found.weights), str(found.weights))
    return pipe.to(device)


def identify(path_or_id: str | Path, weights: Weights = "ema") -> dict[str, Any]:
    """Say which pipeline `load_pipeline` gives for the same arguments, for the record of a result.

    Args:
        path_or_id: As for `load_pipeline`.
        weights: Likewise.

    Returns:
        JSON: "path" as given; "weights": "ema", "raw", or "as stored" where training's record does not say;
        "weights_sha256" by file, of the transformer and of the VAE; "step", None where it is not known; "revision", the
        commit of a Hub id, else None.

    Raises:
        ValueError: As `load_pipeline`.
    """
    found = _find(path_or_id, weights)
    paths = sorted(path for path in found.folder.glob("*/*") if path.suffix in (".safetensors", ".bin"))
    files = {path.relative_to(found.folder).as_posix(): path for path in paths}
    step, record = found.step, found.folder / EXPORT_RECORD
    if found.weights is not None:
        files = {name: path for name, path in files.items() if not name.startswith("transformer/")}
        files[found.weights.name] = found.weights
    elif record.is_file():
        step = json.loads(record.read_text())["step"]
    return {
        "path": str(path_or_id),
        "weights": "as stored" if step is None else weights,
        "weights_sha256": {name: sha256(path) for name, path in files.items()},
        "step": step,
        "revision": found.revision,
    }


def _find(path_or_id: str | Path, weights: Weights) -> _Found:
    """Find the folder, and check what can be checked without loading it."""
    path = Path(path_or_id)
    if weights not in CHECKPOINT_WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(CHECKPOINT_WEIGHTS)}, got {weights!r}")
    if (path / CHECKPOINT_MANIFEST).is_file():
        return _find_checkpoint(path.resolve(), weights)
    if weights == "raw":
        raise ValueError(
            f"weights 'raw' are those of a checkpoint such as runs/<name>/checkpoints/step-00001000, and "
            f"{str(path_or_id)!r} is none: a pipeline has one set of weights, training's the averaged ones"
        )
    folder = next((p for p in (path / "pipeline", path) if (p / INDEX).is_file()), None)
    if folder is not None:
        return _Found(folder)
    wrong = ValueError(
        f"expected a run folder (with pipeline/{INDEX}), one of its checkpoints (with {CHECKPOINT_MANIFEST}), a "
        f"pipeline folder (with {INDEX}) or a reachable Hub id such as 'user/name', got {str(path_or_id)!r}"
    )
    if path.exists() or str(path_or_id).count("/") != 1:
        raise wrong
    try:
        snapshot = Path(DiffusionPipeline.download(str(path_or_id)))
    except OSError as error:  # what the Hub client raises for an unknown id or a missing network
        raise wrong from error
    return _Found(snapshot, revision=snapshot.name)


def _find_checkpoint(checkpoint: Path, weights: Weights) -> _Found:
    """Find a checkpoint's weights, which must be those of its manifest, and the pipeline of its run."""
    folder, path = checkpoint.parents[1] / "pipeline", checkpoint / CHECKPOINT_WEIGHTS[weights]
    try:
        manifest = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_text())
        step, expected = int(manifest["step"]), manifest["files"][path.name]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint / CHECKPOINT_MANIFEST} is damaged: expected step, and size and sha256 by file name, got "
            f"something else ({error!r})"
        ) from error
    if not path.is_file() or (digest := sha256(path)) != expected:
        got = f"sha256 {digest}" if path.is_file() else "no file"
        raise ValueError(f"checkpoint {checkpoint} is damaged: {path.name}: expected sha256 {expected}, got {got}")
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"checkpoint {checkpoint} has weights alone: expected the rest (model and scheduler configuration, VAE) in "
            f"{folder}, which is not there. Training writes it with each checkpoint, except when it is stopped: let "
            "the run go on to its next checkpoint, or keep the checkpoint in its run folder"
        )
    return _Found(folder, path, step)
