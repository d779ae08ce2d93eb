"""Suite `train`: training steps of `train_dit.py` against what they are at least, and against diffusers' DiT.

The whole step is `train_dit.optimizer_step` on latents read from files, with the loop's learning rate and a line of its
log each time; progress bar, requests to stop and looking for what is due are not in it. The bare step is forward pass,
loss, backward pass and AdamW on a batch in memory, with nothing read, clipped, averaged or logged.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train_dit
from benchmarks.data import write_synthetic
from benchmarks.goals import Result, as_dicts, markdown, setting_of
from benchmarks.measure import Step, by_operator, quartiles, ratio, time_interleaved
from benchmarks.modes import options_of
from benchmarks.options import DTYPES, MODES, add_modes, add_sizes, batch_of
from benchmarks.sides import (
    LATENT_CHANNELS,
    TOLERANCE,
    Shape,
    draw_modulation,
    largest_error,
    require_agreement,
    windows_for,
)
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.latents import LatentDataset, LatentStore
from iwin_dit.models.compilation import onednn_mm, onednn_multiplies_faster
from iwin_dit.training.batches import Batch, MicroBatches
from iwin_dit.training.config import Config, parse_config
from iwin_dit.training.log import Meter, MetricsLog
from iwin_dit.training.setup import Training, open_state, open_writer

GRID, KERNEL = (16, 16), (3, 3)
CLASSES = 1000
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is taken for the peak
NO_CLIPPING = 1e9  # a norm that no gradient has: clipping does all its work and changes nothing, so that steps compare


def add_options(parser: argparse.ArgumentParser, suite: str, device: str) -> None:  # noqa: ARG001  (those of a Suite)
    """Add the suite's options; the defaults are those of the goals."""
    add_sizes(parser, device)
    add_modes(parser, device)
    parser.set_defaults(repeats=15)


def prepare(arguments: argparse.Namespace) -> None:
    """Check what was asked for.

    Args:
        arguments: Parsed.

    Raises:
        ValueError: If the batch does not hold whole samples.
    """
    if arguments.batch_tokens % math.prod(GRID):
        raise ValueError(f"--batch-tokens must be a multiple of {math.prod(GRID)}, got {arguments.batch_tokens}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all steps in turn.

    Args:
        arguments: As prepared.

    Returns:
        `results` for the goals, `rows` by step, `profile` of a whole step by operator.
    """
    device = torch.device(arguments.device)
    shape = Shape(GRID, arguments.width, arguments.heads, KERNEL)
    batch_size = batch_of(shape, arguments.batch_tokens)
    torch.compiler.reset()
    with contextlib.ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        write_synthetic(folder, items=4096, shape=(LATENT_CHANNELS, *GRID))
        steps: dict[str, Step] = {}
        for mode in arguments.modes:
            training = open_steps(arguments, batch_size, folder, mode, resources)
            check_steps(training)
            batch = training.micro_batches[0].to(device)
            steps[f"bare, {mode}"] = functools.partial(bare_step, training, batch)
            steps[f"whole, {mode}"] = functools.partial(next, whole_steps(training))
        for mode in dict.fromkeys(["eager", *arguments.modes]):
            steps[f"DiT, {mode}"] = dit_step(training, shape, arguments.layers, batch, mode)
        products = matrix_products(arguments)
        steps |= products
        seconds = time_interleaved(steps, device, arguments.repeats)
        profile = by_operator({mode: steps[f"whole, {mode}"] for mode in arguments.modes}, device)
        flops = 3 * forward_flops(training) * batch_size
    fastest = min(products, key=lambda name: quartiles(seconds[name])[1])
    peak = [2 * PEAK_SIDE[arguments.device] ** 3 / s for s in seconds[fastest]]
    return {
        "results": as_dicts(results_of(seconds, arguments.modes, flops, peak, shape)),
        "rows": [
            {"step": name, "milliseconds": [1e3 * q for q in quartiles(values)], "batch": batch_size}
            for name, values in seconds.items()
        ],
        "peak": {"step": fastest, "gflops": [q / 1e9 for q in quartiles(peak)]},
        "step_gflop": flops / 1e9,
        "profile": profile,
    }


def results_of(
    seconds: Mapping[str, list[float]], modes: list[str], flops: float, peak: list[float], shape: Shape
) -> list[Result]:
    """Ratios of what was timed, in the goals' words.

    Args:
        seconds: By step.
        modes: Of our steps.
        flops: Of a step: three times those of the forward pass.
        peak: FLOPs per second of the matrix product, by round.
        shape: Of the model.

    Returns:
        The results.
    """
    setting, found = setting_of(shape.grid, windows_for(shape)[0], shape.kernel), []
    for mode in modes:
        whole, bare = seconds[f"whole, {mode}"], seconds[f"bare, {mode}"]
        found.append(Result("whole step / bare step", mode, ratio(whole, bare), setting))
        speed = [flops / s for s in whole]
        found.append(Result("model FLOPs / matrix product peak", mode, ratio(speed, peak), setting))
        for other in dict.fromkeys(["eager", mode]):
            theirs, ours = (name.partition("-")[0] for name in (other, mode))  # "compiled", whatever the options
            what = f"diffusers' DiT, {theirs} / ours, {ours}"
            found.append(Result(what, mode, ratio(seconds[f"DiT, {other}"], bare), setting))
    return found


def open_steps(
    arguments: argparse.Namespace, batch_size: int, folder: Path, mode: str, resources: contextlib.ExitStack
) -> Training:
    """Open what `train_dit.py` trains with, but for VAE and evaluation, which no step uses.

    Args:
        arguments: As prepared.
        batch_size: Samples per step.
        folder: Of the latents.
        mode: A key of `MODES`.
        resources: Is given the run folder.

    Returns:
        The training, at step 0.
    """
    run = Path(resources.enter_context(tempfile.TemporaryDirectory()))
    config = step_config(arguments, batch_size, run, mode)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the mode before
    precision = "no" if arguments.dtype == "float32" else arguments.dtype
    accelerator = Accelerator(cpu=arguments.device == "cpu", mixed_precision=precision)
    torch.manual_seed(0)
    model = draw_modulation(config.build_model())  # or check_steps would see the gradient of the output layer alone
    state, wrapped = open_state(config, accelerator, model, run)
    data = LatentDataset(LatentStore(folder, verify=False), np.arange(4096))
    wrapped.train()
    return Training(
        config=config,
        accelerator=accelerator,
        run=run,
        objective=config.build_objective(),
        codec=tiny_codec(),
        micro_batches=MicroBatches(data, config.train.seed, batch_size, num_processes=1, rank=0),
        held_out=data,
        state=state,
        model=wrapped,
        metrics=MetricsLog(config, accelerator, run, step=0),
        writer=open_writer(config, accelerator, run, step=0),
        evaluator=None,
    )


def step_config(arguments: argparse.Namespace, batch_size: int, run: Path, mode: str) -> Config:
    """The configuration of a run of the size asked for."""
    values = {
        "run": run,
        "model.sample_size": list(GRID),
        "model.patch_size": 1,
        "model.in_channels": LATENT_CHANNELS,
        "model.num_layers": arguments.layers,
        "model.num_attention_heads": arguments.heads,
        "model.attention_head_dim": arguments.width // arguments.heads,
        "model.num_classes": CLASSES,
        "model.window_size": 8,
        "train.batch_size": batch_size,
        "train.compile": str(mode != "eager").lower(),
        "train.compile_options": json.dumps(MODES[mode] or {}),
        "optim.max_grad_norm": NO_CLIPPING,
        "log.every": 1,
    }
    return parse_config([f"--{name}={value}" for name, value in values.items()], prog="python -m benchmarks.run")


def tiny_codec() -> LatentCodec:
    """A codec with the statistics that a step needs, and a VAE that it does not."""
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=LATENT_CHANNELS)
    return LatentCodec(vae, [0.0] * LATENT_CHANNELS, [1.0] * LATENT_CHANNELS)


def bare_step(training: Training, batch: Batch) -> None:
    """Forward pass, loss, backward pass, AdamW."""
    losses, _ = train_dit.batch_losses(training, training.model, batch)
    losses.mean().backward()
    training.state.optimizer.step()
    training.state.optimizer.zero_grad()


def whole_steps(training: Training) -> Iterator[None]:
    """Steps of `train_dit.optimizer_step`, with the learning rate of `train_dit.train` and its log at each one."""
    config, state = training.config, training.state
    batch_size, total = config.train.batch_size, config.train.images
    meter = Meter(training.accelerator, batch_size, state.step, config.train.steps)
    loader = train_dit.open_loader(training)
    while True:
        lr = config.optim.learning_rate(state.step * batch_size, batch_size, total)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        result = train_dit.optimizer_step(training, loader)
        state.step += 1
        meter.add(result.sums)
        training.metrics.write(state.step, **meter.read(state.step), lr=lr, grad_norm=result.grad_norm)
        yield


def check_steps(training: Training) -> None:
    """Check that a whole and a bare step find the same gradients and move the weights as far.

    Gradients are read from Adam's first moments, since its first step is much the same at any scale of theirs; of the
    weights' change the length is compared, as the sign of a gradient that is mere noise may turn on a GPU. Weights,
    optimizer, average, counts and log are left as they were.

    Raises:
        RuntimeError: If they do not, or one of the two leaves a parameter out.
    """
    batch = training.micro_batches[0].to(training.accelerator.device)
    whole = effect_of(functools.partial(next, whole_steps(training)), training)
    bare = effect_of(functools.partial(bare_step, training, batch), training)
    trained = {name for name, parameter in training.state.model.named_parameters() if parameter.requires_grad}
    for what, effect in (("whole", whole), ("bare", bare)):
        missed = sorted(name for name in trained if name not in effect or not effect[name][1] > 0)
        if missed:
            raise RuntimeError(f"a {what} training step must train every parameter, it left out {', '.join(missed)}")
    low_precision = training.accelerator.mixed_precision == "bf16"
    tolerance = 4 * torch.finfo(torch.bfloat16).eps if low_precision else TOLERANCE
    for name in sorted(trained):
        error = largest_error(whole[name], bare[name])
        require_agreement(f"a whole and a bare training step, of '{name}',", error, tolerance)


def effect_of(step: Step, training: Training) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Take a first step, and back.

    Args:
        step: A training step.
        training: Where it works, at step 0.

    Returns:
        By parameter, Adam's first moment, a fixed multiple of its gradient, and how far it went.
    """
    state = training.state
    models = (state.model, state.ema.model)
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    step()
    effect = {
        name: (moments["exp_avg"], (parameter.detach() - before[0][name]).norm())
        for name, parameter in state.model.named_parameters()
        if (moments := state.optimizer.state.get(parameter))
    }
    for model, weights in zip(models, before, strict=True):
        model.load_state_dict(weights)
    state.optimizer.state.clear()
    state.step, state.skipped = 0, 0
    MetricsLog(training.config, training.accelerator, training.run, step=0)  # drops the lines of later steps
    return effect


def dit_step(training: Training, shape: Shape, layers: int, batch: Batch, mode: str) -> Step:
    """The bare step of diffusers' DiT of the same size, patch, loss and optimizer.

    Args:
        training: Lends codec, objective, precision and the settings of AdamW.
        shape: Of the model.
        layers: Blocks.
        batch: In memory.
        mode: A key of `MODES`: "eager", as diffusers ships it, or compiled as a whole, its products those of our mode
            and everything else left to torch, since our other options are for our blocks.

    Returns:
        The step.
    """
    torch.manual_seed(0)
    dit: nn.Module = DiTTransformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width // shape.heads,
        in_channels=LATENT_CHANNELS,
        num_layers=layers,
        sample_size=shape.grid[0],
        patch_size=1,
        num_embeds_ada_norm=CLASSES,
    )
    dit.to(training.accelerator.device).train()
    if mode != "eager":
        products = options_of(mode, training.accelerator.device).get("post_grad_custom_post_pass")
        dit.compile(dynamic=False, options={"post_grad_custom_post_pass": products})
    optim = training.config.optim
    optimizer = torch.optim.AdamW(
        dit.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )

    def step() -> None:
        with training.accelerator.autocast():
            losses, _ = train_dit.batch_losses(training, dit, batch)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_products(arguments: argparse.Namespace) -> dict[str, Step]:
    """The product of two large square matrices in the precision of the step, by torch and, where faster, oneDNN.

    The faster of them is the peak, whatever the step multiplies by.
    """
    side, dtype = PEAK_SIDE[arguments.device], DTYPES[arguments.dtype]
    a, b = (torch.randn(side, side, device=arguments.device, dtype=dtype) for _ in range(2))
    steps: dict[str, Step] = {"matrix product": functools.partial(torch.mm, a, b)}
    if arguments.device == "cpu" and dtype == torch.float32 and onednn_multiplies_faster():
        steps["matrix product, oneDNN"] = functools.partial(onednn_mm, a, b)
    return steps


def forward_flops(training: Training) -> int:
    """Count the FLOPs of a forward pass of one sample."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = training.config.build_model()
        model(torch.zeros(1, LATENT_CHANNELS, *GRID), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def tables(record: dict[str, Any]) -> str:
    """Format a record, as written to JSON, for the terminal and for Markdown."""
    rows = []
    for row in record["rows"]:
        low, median, high = row["milliseconds"]
        rows.append([("step", row["step"]), ("ms (quartiles)", f"{median:.1f} ({low:.1f} to {high:.1f})")])
    return "\n\n".join([markdown(rows, left=("step",)), profile_table(record["profile"])])


def profile_table(profile: Mapping[str, Mapping[str, float]]) -> str:
    """Set what a step spends by kind of operator side by side, one column per mode."""
    kinds = list(dict.fromkeys(itertools.chain(*profile.values())))
    return markdown(
        [
            [
                ("ms by kind of operator", kind),
                *((mode, f"{spent.get(kind, 0):.1f}") for mode, spent in profile.items()),
            ]
            for kind in kinds
        ],
        left=("ms by kind of operator",),
    )
