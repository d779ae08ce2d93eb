"""Find and load a pipeline: what every script's `--model` accepts."""

from pathlib import Path

import torch

from .image import IwinDiTPipeline


def load_pipeline(
    path_or_id: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> IwinDiTPipeline:
    """Load a pipeline from a run folder, a pipeline folder or the Hub.

    Args:
        path_or_id: `runs/<name>` (its `pipeline/` is taken), a folder with a model_index.json, or a Hub id.
        device: Where to put it.
        dtype: Of its weights.

    Returns:
        The pipeline, ready to call.

    Raises:
        ValueError: If the path is an existing folder without a pipeline in it, or looks like a path and is none.
    """
    path = Path(path_or_id)
    folder = next((p for p in (path / "pipeline", path) if (p / "model_index.json").is_file()), None)
    looks_like_path = path.exists() or str(path_or_id).count("/") != 1
    if folder is None and looks_like_path:
        raise ValueError(
            f"expected a run folder (with pipeline/model_index.json), a pipeline folder (with model_index.json) or a "
            f"Hub id such as 'user/name', got {str(path_or_id)!r}"
        )
    return IwinDiTPipeline.from_pretrained(folder or path_or_id, dtype=dtype).to(device)
