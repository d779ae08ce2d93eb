"""The state of a run: what its future depends on besides its configuration, and its way back from files. No pickle.

Random numbers need no state: they are keyed by position (draws.py). Must not know the loop, or how files are kept safe.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..models.transformer import IwinDiTCore
from ..pipelines.loading import CHECKPOINT_WEIGHTS  # load_pipeline reads them
from .ema import EMA
from .sharding import gather, read_tensors, scatter

STATE = "state.json"
TENSORS = (CHECKPOINT_WEIGHTS["raw"], CHECKPOINT_WEIGHTS["ema"], "optimizer.safetensors")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, on the CPU and independent of the training that goes on; tensors on rank 0 alone.

    Attributes:
        model: Weights by name, whole, in the dtype they are trained in.
        ema: Averaged weights by name.
        optimizer: "<parameter name>.<exp_avg | exp_avg_sq | step>".
        state: Numbers: step, skipped, scaler.
    """

    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state["step"]

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(t.nbytes for part in (self.model, self.ema, self.optimizer) for t in part.values())


@dataclass
class TrainState:
    """Everything that a run's future depends on besides its configuration.

    Attributes:
        model: The training model, not wrapped; FSDP2 shards it in place.
        ema: Its average, sharded alike.
        optimizer: AdamW; in training, as Accelerate wrapped it.
        scaler: Gradient scaler of float16 training, else None.
        step: Steps done, skipped ones included; data order and random numbers are functions of it.
        skipped: Steps whose loss or gradient was not finite.
    """

    model: IwinDiTCore
    ema: EMA[IwinDiTCore]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    skipped: int = 0

    def snapshot(self) -> Snapshot:
        """Copy the state to the CPU; all processes must call it, as for `gather`."""
        moments = {
            f"{name}.{key}": value
            for name, parameter in self._parameters().items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return Snapshot(
            model=gather_weights(self.model),
            ema=gather_weights(self.ema.model),
            optimizer=gather(moments),
            state={"step": self.step, "skipped": self.skipped, "scaler": scaler},
        )

    def load(self, folder: Path) -> None:
        """Restore a checkpoint in place, after the model was sharded; every process reads the folder.

        Args:
            folder: As `find_checkpoint` returned it.

        Raises:
            ValueError: If a file is no safetensors file, or its tensors are not this state's; all differences listed.
        """
        model_path, ema_path, optimizer_path = (folder / name for name in TENSORS)
        scatter(read_tensors(model_path), self.model.state_dict(), model_path)
        scatter(read_tensors(ema_path), self.ema.model.state_dict(), ema_path)
        moments = read_tensors(optimizer_path)
        scatter(moments, self._empty_moments({name.rpartition(".")[0] for name in moments}), optimizer_path)
        state = json.loads((folder / STATE).read_text())
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = state["step"], state["skipped"]

    def _empty_moments(self, started: set[str]) -> dict[str, torch.Tensor]:
        """Give AdamW uninitialised moments for the parameters that have taken a step, and return them by name."""
        self.optimizer.state.clear()
        count_on_device = any(group["fused"] or group["capturable"] for group in self.optimizer.param_groups)
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters().items():
            if name in started:
                weights = parameter.detach()
                count = torch.empty((), device=weights.device if count_on_device else "cpu")
                values = dict(zip(MOMENTS, (torch.empty_like(weights), torch.empty_like(weights), count), strict=True))
                self.optimizer.state[parameter] = values
                moments |= {f"{name}.{key}": value for key, value in values.items()}
        return moments

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name, as the optimizer knows them: state_dict first takes FSDP2's modules to their shards."""
        tensors = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy a model's weights to the CPU, sharded or not; all processes must call it, rank 0 alone gets them."""
    return gather(model.state_dict())


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights whole on every process, on their device; all processes must call it.

    Args:
        model: Sharded or not.

    Returns:
        Tensors by name: copies of what is sharded, else the model's own.
    """
    tensors = model.state_dict()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
