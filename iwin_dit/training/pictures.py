"""What a run shows and hands over: previews of the trained and the averaged weights, and the pipeline folder."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data.codec import LatentCodec
from ..models.transformer import IwinDiTCore
from ..pipelines.base import IwinDiTPipelineBase
from ..pipelines.image import IwinDiTPipeline
from ..pipelines.loading import EXPORT_RECORD
from ..pipelines.pictures import GIF_MAX_FPS, clip_grid, image_grid, save_gif, side_by_side
from ..pipelines.video import IwinDiTVideoPipeline
from .config import Config

PREVIEW_SIDE = 128  # pixels, at most, of a frame's longer side: a preview of clips is many frames in one file


def model_from(config: Config, tensors: Mapping[str, torch.Tensor]) -> IwinDiTCore:
    """Build the model around weights that are there already, which it shares.

    Args:
        config: Says what the model is.
        tensors: All its weights by name.

    Returns:
        The model, in evaluation mode.
    """
    with torch.device("meta"):  # no second set of weights, no random numbers
        model = config.build_model()
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def build_pipeline(
    config: Config, model: IwinDiTCore, codec: LatentCodec, class_names: tuple[str, ...]
) -> IwinDiTPipelineBase:
    """Put a model, the VAE, the objective's sampler and the class names together.

    Args:
        config: Names modality, objective, and how clips are cut.
        model: Trained or averaged.
        codec: Holds the VAE, and statistics of the data where these normalise the latents.
        class_names: By label.

    Returns:
        The pipeline, without a progress bar.
    """
    parts = {
        "transformer": model,
        "vae": codec.vae,
        "scheduler": config.build_objective().scheduler(),
        "id2label": dict(enumerate(class_names)),
        "latents_mean": codec.given_statistics.get("latents_mean"),
        "latents_std": codec.given_statistics.get("latents_std"),
    }
    if config.fps is None:
        pipeline: IwinDiTPipelineBase = IwinDiTPipeline(**parts)
    else:
        pipeline = IwinDiTVideoPipeline(**parts, fps=config.fps, frame_stride=config.data.frame_stride)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def preview(
    config: Config,
    models: Mapping[str, IwinDiTCore],
    codec: LatentCodec,
    class_names: tuple[str, ...],
    path: Path,
    stopping: Callable[[], bool],
) -> Path | None:
    """Save grids of samples side by side, a row per class; the same seeds every time and on every side.

    Args:
        config: Says which classes, how many samples and steps.
        models: By the title of their side; on the VAE's device one at a time.
        codec: Holds the VAE.
        class_names: By label.
        path: File to write, without its suffix: PNG of images, a GIF of clips, which moves.
        stopping: Asked after every sampler step; true ends the preview, and nothing is written.

    Returns:
        The file; None where the preview was ended.
    """
    grids = []  # a list of frames for every model, one frame of images
    for model in models.values():
        grid = _sample_grid(config, build_pipeline(config, model.to(codec.vae.device), codec, class_names), stopping)
        model.to("cpu")
        if grid is None:
            return None
        grids.append(grid)
    pages = [side_by_side(frames, list(models)) for frames in zip(*grids, strict=True)]
    path.parent.mkdir(exist_ok=True)
    if config.fps is None:
        path = path.with_suffix(".png")
        pages[0].save(path)
    else:
        path = path.with_suffix(".gif")
        save_gif(pages, path, min(config.fps, GIF_MAX_FPS))
    return path


def _sample_grid(
    config: Config, pipeline: IwinDiTPipelineBase, stopping: Callable[[], bool]
) -> list[Image.Image] | None:
    """Sample a grid, the frames of one where the pipeline makes clips; None where that was ended."""

    def interrupt(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
        pipe._interrupt = stopping()
        return tensors

    log = config.log
    classes = log.preview_classes or list(range(min(10, config.model["num_classes"])))
    rows = []
    for label in classes:
        generators = [torch.Generator().manual_seed(seed) for seed in range(log.preview_columns)]
        (samples,) = pipeline(
            [label] * log.preview_columns,
            num_inference_steps=log.preview_steps,
            guidance_scale=log.preview_guidance_scale,
            generator=generators,
            callback_on_step_end=interrupt,
            return_dict=False,
        )
        if pipeline.interrupt:
            return None
        if config.fps is not None:
            for frame in itertools.chain.from_iterable(samples):
                frame.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))  # in place, and never up
        rows.append(samples)
    labels = [pipeline.id2label[label].split(",")[0] for label in classes]
    return [image_grid(rows, labels)] if config.fps is None else clip_grid(rows, labels)


def export(pipeline: IwinDiTPipelineBase, folder: Path, step: int) -> None:
    """Write the pipeline folder, replacing the last one only when complete.

    Args:
        pipeline: What to write.
        folder: Where; its parent exists.
        step: Optimizer steps that the weights have seen, recorded beside them.
    """
    staging = folder.with_name(".pipeline.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging)
    (staging / EXPORT_RECORD).write_text(json.dumps({"step": step}))
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def exported_step(folder: Path) -> int | None:
    """Tell the step whose weights a pipeline folder holds, the inverse of `export`; None where there is none."""
    record = folder / EXPORT_RECORD
    return json.loads(record.read_text())["step"] if record.is_file() else None
