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
        ValueError: If there is no pipeline there.
    """
    path = Path(path_or_id)
    folder = next((p for p in (path / "pipeline", path) if (p / "model_index.json").is_file()), None)
    wrong = ValueError(
        "expected a run folder (with pipeline/model_index.json), a pipeline folder (with model_index.json) or a "
        f"reachable Hub id such as 'user/name', got {str(path_or_id)!r}"
    )
    if folder is None and (path.exists() or str(path_or_id).count("/") != 1):
        raise wrong
    try:
        return IwinDiTPipeline.from_pretrained(folder or path_or_id, dtype=dtype).to(device)
    except OSError as error:  # what the Hub client raises for an unknown id or a missing network
        if folder is not None:
            raise
        raise wrong from error
