"""Suite `sample`: what a guidance interval saves where the unconditional half is not computed outside it."""

import argparse
import functools
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from benchmarks.goals import Result, as_dicts, markdown, setting_of
from benchmarks.measure import Step, quartiles, ratio, time_interleaved
from benchmarks.modes import compiled
from benchmarks.options import DTYPES, add_modes, add_sizes, positive
from benchmarks.sides import TOLERANCE, Shape, iwin_model, largest_error, require_agreement, windows_for
from iwin_dit import IwinDiTPipeline, IwinDiTTransformer2DModel

GRID, KERNEL = (16, 16), (3, 3)
GUIDANCE_SCALE = 4.0
# 2 / (1 + share of guided steps) is the most to gain: 1.41 in 50 steps, 1.38 in 20; 1.3 asks for at most 54 %.
INTERVAL = (0.2, 0.6)
WIDE_INTERVAL = (0.0, 0.89)  # FlashDiT's
IMAGES, STEPS = {"cpu": 4, "cuda": 32}, {"cpu": 20, "cuda": 50}


class BothHalves(IwinDiTPipeline):
    """The pipeline with both halves run in every step, and the unconditional one thrown away outside the interval."""

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,  # noqa: ARG002  (the base's signature)
    ) -> torch.Tensor:
        """Predict as the base does, and guide all channels."""
        low, high = guidance_interval
        null = torch.full_like(class_labels, self.transformer.null_class)
        model_input = torch.cat([latents.to(self.transformer.dtype)] * 2)
        output = self.transformer(model_input, timestep, torch.cat([class_labels, null]), return_dict=False)[0].float()
        cond, uncond = output.chunk(2)
        scale = guidance_scale if low <= float(timestep) / 1000.0 <= high else 1.0
        return uncond + scale * (cond - uncond)


# Pipeline and interval by side; what "both" computes, and so its time, does not depend on the interval.
SIDES: dict[str, tuple[type[IwinDiTPipeline], tuple[float, float]]] = {
    "interval": (IwinDiTPipeline, INTERVAL),
    "interval (0, 0.89)": (IwinDiTPipeline, WIDE_INTERVAL),
    "both": (BothHalves, INTERVAL),
}


def add_options(parser: argparse.ArgumentParser, suite: str, device: str) -> None:  # noqa: ARG001  (those of a Suite)
    """Add the suite's options; the defaults are those of the goals."""
    add_sizes(parser, device, batch=False)
    parser.add_argument("--images", type=positive, default=IMAGES[device], help="in a batch")
    parser.add_argument("--steps", type=positive, default=STEPS[device], help="of the sampler")
    add_modes(parser, device)
    parser.set_defaults(repeats=7)


def prepare(arguments: argparse.Namespace) -> None:
    """Check nothing: every combination of the options works."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample on all sides, in turn, in every mode.

    Args:
        arguments: As prepared.

    Returns:
        `results` for the goals, `rows` by mode.
    """
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    shape = Shape(GRID, arguments.width, arguments.heads, KERNEL)
    window = windows_for(shape)[0]
    torch.manual_seed(0)
    torch.compiler.reset()
    transformer = iwin_model(shape, arguments.layers, window).eval().requires_grad_(False).to(device)
    exact = check_halves(transformer, arguments)
    transformer.to(dtype)
    models = {mode: transformer if mode == "eager" else compiled(transformer, mode) for mode in arguments.modes}
    for mode, model in models.items():
        if model is not transformer:
            check_compiled(mode, model, transformer, exact, arguments)
    steps: dict[tuple[str, str], Step] = {
        (mode, name): functools.partial(draw, *side, model, arguments)
        for mode, model in models.items()
        for name, side in SIDES.items()
    }
    seconds = time_interleaved(steps, device, arguments.repeats)
    setting = setting_of(GRID, window, KERNEL)
    results = [
        Result(
            f"both halves always / guidance {name}", mode, ratio(seconds[mode, "both"], seconds[mode, name]), setting
        )
        for mode in arguments.modes
        for name in ("interval", "interval (0, 0.89)")
    ]
    rows = [
        {"mode": mode, "side": name, "images_per_second": quartiles([arguments.images / s for s in values])}
        for (mode, name), values in seconds.items()
    ]
    return {"results": as_dicts(results), "interval": INTERVAL, "rows": rows}


def check_halves(transformer: IwinDiTTransformer2DModel, arguments: argparse.Namespace) -> torch.Tensor:
    """Check that both pipelines give the same latents, with either interval.

    Args:
        transformer: In float32.
        arguments: As prepared.

    Returns:
        The latents of side "interval".

    Raises:
        RuntimeError: If they do not.
    """
    for interval in (WIDE_INTERVAL, INTERVAL):
        ours, theirs = (draw(kind, interval, transformer, arguments) for kind in (IwinDiTPipeline, BothHalves))
        require_agreement(f"one half and both outside {interval}", largest_error([ours], [theirs]))
    return ours


def check_compiled(
    mode: str,
    model: IwinDiTTransformer2DModel,
    eager: IwinDiTTransformer2DModel,
    exact: torch.Tensor,
    arguments: argparse.Namespace,
) -> None:
    """Compare the latents of the compiled and of the eager model with those in float32, as `check_modes` does.

    Args:
        mode: Of the compiled model.
        model: Compiled.
        eager: The same, not compiled.
        exact: Latents (B, C, h, w) of side "interval" in float32.
        arguments: As prepared.

    Raises:
        RuntimeError: If the compiled model is off by more than `TOLERANCE` and more than twice what the eager one is.
    """
    ours, theirs = (largest_error([draw(*SIDES["interval"], m, arguments)], [exact]) for m in (model, eager))
    require_agreement(f"latents of the {mode} and the eager model", ours, max(TOLERANCE, 2 * theirs))


@torch.no_grad()
def draw(
    kind: type[IwinDiTPipeline],
    interval: tuple[float, float],
    transformer: IwinDiTTransformer2DModel,
    arguments: argparse.Namespace,
) -> torch.Tensor:
    """Sample latents (B, C, h, w) with a pipeline and a guidance interval, always the same."""
    pipeline = kind(transformer, None, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        list(range(arguments.images)),
        num_inference_steps=arguments.steps,
        guidance_scale=GUIDANCE_SCALE,
        guidance_interval=interval,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
    )
    return output[0]


def tables(record: dict[str, Any]) -> str:
    """Format a record, as written to JSON, for the terminal and for Markdown."""
    rows = []
    for row in record["rows"]:
        low, median, high = row["images_per_second"]
        speed = f"{median:.2f} ({low:.2f} to {high:.2f})"
        rows.append([("mode", row["mode"]), ("side", row["side"]), ("images/s (quartiles)", speed)])
    return markdown(rows, left=("mode", "side"))
