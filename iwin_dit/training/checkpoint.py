"""The run folder and its checkpoints. All state of a run is in `TrainState`; nothing else is saved or restored.

    runs/<name>/config.json  metrics.jsonl  previews/  pipeline/  checkpoints/step-00001000/
                                            {model,ema,optimizer}.safetensors, state.json

A checkpoint is written beside its place and renamed into it, so a folder of that name is complete; older ones go only
after that. No pickle.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..models import IwinDiTTransformer2DModel
from ..models.loading import load_strictly
from .config import Config
from .ema import EMA

# Keys that may differ when a run goes on: they decide what is shown, kept or run, not what is learned. The precision is
# compared as it was resolved with the launcher's; the steps are free only where no schedule ends at the last one.
FREE_KEYS = (
    *("overwrite", "dry_run", "prepare_only", "log.", "train.compile", "train.gradient_checkpointing"),
    *("train.mixed_precision", "data.num_workers", "data.encode_batch_size", "data.max_broken_images"),
)


@dataclass
class TrainState:
    """Everything that a run's future depends on besides its configuration.

    Attributes:
        model: The training model, unwrapped.
        ema: Its average.
        optimizer: The optimizer; in training, as Accelerate wrapped it.
        scaler: Gradient scaler of float16 training, else None.
        step: Optimizer steps done; data order and random numbers are functions of it.
    """

    model: IwinDiTTransformer2DModel
    ema: EMA[IwinDiTTransformer2DModel]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    step: int = 0

    def save(self, root: Path, keep: int) -> Path:
        """Write a checkpoint, then remove the oldest ones.

        Args:
            root: Folder of the checkpoints.
            keep: How many to keep, this one included.

        Returns:
            The folder written.
        """
        final = root / f"step-{self.step:08d}"
        staging = root / f".{final.name}.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_file(self.model.state_dict(), staging / "model.safetensors")
        save_file(self.ema.model.state_dict(), staging / "ema.safetensors")
        save_file(_optimizer_tensors(self.optimizer), staging / "optimizer.safetensors")
        scaler = None if self.scaler is None else self.scaler.state_dict()
        state = {"step": self.step, "ema_updates": self.ema.updates, "scaler": scaler}
        (staging / "state.json").write_text(json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        staging.replace(final)
        for old in list_checkpoints(root)[:-keep]:
            shutil.rmtree(old)
        return final

    def load(self, folder: Path) -> None:
        """Restore a checkpoint in place.

        Args:
            folder: As `save` returned it.

        Raises:
            ValueError: If the weights are not those of this model; every difference is listed.
        """
        state = json.loads((folder / "state.json").read_text())
        load_strictly(self.model, load_file(folder / "model.safetensors"), str(folder / "model.safetensors"))
        load_strictly(self.ema.model, load_file(folder / "ema.safetensors"), str(folder / "ema.safetensors"))
        _load_optimizer_tensors(self.optimizer, load_file(folder / "optimizer.safetensors"))
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.ema.updates = state["ema_updates"]
        self.step = state["step"]


def list_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in root.glob("step-????????") if (path / "state.json").is_file())


def check_run(config: Config, resolved: dict[str, str] | None = None) -> None:
    """Check, without touching anything, that the run folder can take this run or holds it already.

    Args:
        config: The configuration of this start.
        resolved: What decides the result besides, by name; None where it is not known yet and not compared.

    Raises:
        ValueError: If the folder holds something else, or a run whose configuration differs; the keys are listed.
    """
    run = Path(config.run)
    record = run / "config.json"
    if not record.is_file():
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ValueError(f"run folder {run} is not empty and holds no run (no config.json): give another --run")
        return
    if config.overwrite:
        return
    before, now = _flatten(json.loads(record.read_text())), _flatten(_record(config, resolved or {}))
    free = (*FREE_KEYS, "train.steps") if config.optim.schedule == "constant" else FREE_KEYS
    if resolved is None:
        free = (*free, "resolved.")
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not k.startswith(free))
    if changed:
        lines = "\n  ".join(f"{key}: {before.get(key)} before, {now.get(key)} now" for key in changed)
        cosine = (
            "The cosine schedule ends at the last step, so train.steps is fixed. " if "train.steps" in changed else ""
        )
        raise ValueError(
            f"run folder {run} holds a run of another configuration:\n  {lines}\n{cosine}Give another --run, or "
            "--overwrite to delete that run and start afresh"
        )


def open_run(config: Config, resolved: dict[str, str]) -> Path:
    """Create the run folder and write its record, once everything else has been found in order.

    Args:
        config: The configuration of this start.
        resolved: What decides the result besides, by name: the precision in use, the hash of the latents.

    Returns:
        The run folder.

    Raises:
        ValueError: As `check_run`.
    """
    check_run(config, resolved)
    run = Path(config.run)
    if config.overwrite and run.is_dir():
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    staging = run / ".config.tmp"
    staging.write_text(json.dumps(_record(config, resolved), indent=1))
    staging.replace(run / "config.json")
    return run


def _record(config: Config, resolved: dict[str, str]) -> dict[str, Any]:
    """The content of config.json, as JSON gives it back."""
    return json.loads(json.dumps({**config.to_dict(), "resolved": resolved}))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return an optimizer's state as tensors by "<parameter number>.<name>"; its settings are the configuration's."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Undo `_optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
