"""Loading weights that must be exactly a model's: nothing missing, left over or misshapen."""

import torch
from torch import nn


def load_strictly(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load weights that must be exactly the model's.

    Args:
        model: Receives the weights.
        tensors: Weights by name.
        source: Where they are from, for the error.

    Raises:
        ValueError: If tensors are missing, left over or of another shape; all are listed.
    """
    expected = model.state_dict()
    problems = [f"missing: {name} {tuple(expected[name].shape)}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected: {name} {tuple(tensors[name].shape)}" for name in tensors.keys() - expected.keys()]
    problems += [
        f"shape of {name}: expected {tuple(expected[name].shape)}, got {tuple(tensors[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if expected[name].shape != tensors[name].shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    model.load_state_dict(tensors)
