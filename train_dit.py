"""Train an Iwin DiT on latents: the whole loop, in the order in which it runs.

accelerate launch train_dit.py                                        # the digits: configs/digits.yaml
accelerate launch train_dit.py --config configs/imagenet256_xl.yaml   # the same command again resumes
"""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer2DModel
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.latents import MANIFEST, LatentDataset
from iwin_dit.diffusion import Denoiser, Objective
from iwin_dit.metrics.result import sha256
from iwin_dit.pipelines.pictures import image_grid
from iwin_dit.training.batches import Batch, MicroBatches, validation_batch
from iwin_dit.training.checkpoint import TrainState, check_run, list_checkpoints, open_run
from iwin_dit.training.config import Config, parse_config
from iwin_dit.training.data import open_data
from iwin_dit.training.ema import EMA
from iwin_dit.training.log import MetricsLog
from iwin_dit.training.runtime import make_accelerator, micro_batch_size
from iwin_dit.training.summary import describe

logger = logging.getLogger("train_dit")

MIN_SCALE = 2**-10  # of float16's gradient scaler: below it, smaller scales no longer help


@dataclass(frozen=True)
class Training:
    """Everything that the loop works with, opened and checked.

    Attributes:
        config: The configuration.
        accelerator: Processes, precision, accumulation.
        run: Run folder.
        objective: Gives the loss.
        codec: The VAE; normalises latents and decodes previews.
        micro_batches: Training latents and random numbers, by step.
        held_out: Held-out latents.
        state: Weights, average, optimizer and step: what a checkpoint holds.
        model: The state's model as Accelerate wrapped it.
        metrics: Where the numbers go.
    """

    config: Config
    accelerator: Accelerator
    run: Path
    objective: Objective
    codec: LatentCodec
    micro_batches: MicroBatches
    held_out: LatentDataset
    state: TrainState
    model: torch.nn.Module
    metrics: MetricsLog


def main(arguments: list[str] | None = None) -> None:
    """Read the configuration and train; a mistake of the user's is one line, without a traceback."""
    config = parse_config(arguments, default_config=str(Path(__file__).parent / "configs" / "digits.yaml"))
    with one_line(ValueError, ImportError):
        accelerator = make_accelerator(config)
    try:
        with one_line(ValueError, ImportError):
            training = open_training(config, accelerator)
        if training is not None:
            with one_line(FloatingPointError):
                train(training)
    finally:
        accelerator.end_training()


@contextlib.contextmanager
def one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Exit with the message alone where one of these errors is raised."""
    try:
        yield
    except kinds as error:
        raise SystemExit(f"train_dit.py: error: {error}") from error


def open_training(config: Config, accelerator: Accelerator) -> Training | None:
    """Open everything that training needs, in the order in which mistakes are cheapest; None where that was all."""
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    world = accelerator.num_processes
    micro_batch = micro_batch_size(config.train.batch_size, world, accelerator.gradient_accumulation_steps)
    if config.dry_run:
        logger.info("%s\n%s", yaml.safe_dump(config.to_dict(), sort_keys=False), describe(config, micro_batch))
        return None
    check_run(config)

    set_seed(config.train.seed)
    model = config.build_model()
    with accelerator.main_process_first():  # the others find the run folder made and the hashes checked
        codec, train_data, held_out = open_data(config, model, accelerator)
        if config.prepare_only:
            logger.info("%s and %s are there", config.data.vae, config.data.latents)
            return None
        manifest = sha256(Path(config.data.latents) / MANIFEST)
        resolved = {"mixed_precision": accelerator.mixed_precision, "latents_manifest_sha256": manifest}
        run = open_run(config, resolved) if accelerator.is_main_process else Path(config.run)
    logger.info("%s", describe(config, micro_batch))
    logger.info(
        "training     %d latents and %d held out, %d process(es) on %s, %d CPU thread(s) each, precision %s",
        *(len(train_data), len(held_out), world, accelerator.device),
        *(torch.get_num_threads(), accelerator.mixed_precision),
    )

    state, wrapped = open_state(config, accelerator, model, run)
    return Training(
        config=config,
        accelerator=accelerator,
        run=run,
        objective=config.build_objective(),
        codec=codec,
        micro_batches=MicroBatches(train_data, config.train.seed, micro_batch, world, accelerator.process_index),
        held_out=held_out,
        state=state,
        model=wrapped,
        metrics=MetricsLog(config, accelerator, run, state.step),
    )


def open_state(
    config: Config, accelerator: Accelerator, model: IwinDiTTransformer2DModel, run: Path
) -> tuple[TrainState, torch.nn.Module]:
    """Build optimizer and average, hand model and optimizer to Accelerate, and resume from the last checkpoint.

    Returns:
        The state, which holds the bare modules, and the model as Accelerate wrapped it.
    """
    optim = config.optim
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.to(accelerator.device)
    ema = EMA(model, config.train.ema_decay)
    if config.train.compile:
        model.compile_repeated_blocks(fullgraph=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    state = TrainState(model, ema, optimizer, accelerator.scaler)
    checkpoints = list_checkpoints(run / "checkpoints")
    if checkpoints:
        state.load(checkpoints[-1])
        logger.info("resumed from %s", checkpoints[-1])
    trained, state.optimizer = accelerator.prepare(model, optimizer)
    return state, trained


def train(training: Training) -> None:
    """Run the loop from the state's step to the last."""
    config, accelerator, state, run = training.config, training.accelerator, training.state, training.run
    log, steps, accumulation = config.log, config.train.steps, accelerator.gradient_accumulation_steps
    micro_batches, workers = training.micro_batches, config.data.num_workers
    loader = iter(micro_batches.loader(state.step * accumulation, steps * accumulation, num_workers=workers))
    bar = tqdm(total=steps, initial=state.step, unit="step", disable=not accelerator.is_main_process)
    training.model.train()
    clock, clock_step = time.perf_counter(), state.step
    losses: list[torch.Tensor] = []
    while state.step < steps:
        # 1. One optimizer step on the global batch
        lr = config.optim.learning_rate(state.step, steps)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm = optimizer_step(training, loader)
        state.step += 1
        losses.append(loss)
        bar.update()

        # 2. What is due
        logs, validates, previews, checkpoints = (
            every > 0 and (state.step % every == 0 or state.step == steps)
            for every in (log.every, log.validate_every, log.preview_every, log.checkpoint_every or steps)
        )
        if logs:
            mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            speed = (state.step - clock_step) * config.train.batch_size / (time.perf_counter() - clock)
            training.metrics.write(state.step, loss=mean_loss, lr=lr, grad_norm=grad_norm, images_per_second=speed)
            bar.set_postfix(loss=f"{mean_loss:.4f}", images_per_second=f"{speed:.0f}", refresh=False)
            clock, clock_step, losses = time.perf_counter(), state.step, []
        paused = time.perf_counter()
        if validates:
            training.metrics.write(state.step, validation_loss=validate(training))
        if checkpoints and accelerator.is_main_process:
            state.save(run / "checkpoints", keep=log.keep_checkpoints)
            export(build_pipeline(training), run / "pipeline")
        if previews and accelerator.is_main_process:
            preview(config, build_pipeline(training), run / "previews" / f"step-{state.step:08d}.png")
        clock += time.perf_counter() - paused
    bar.close()
    if accelerator.is_main_process and not (run / "pipeline").is_dir():  # killed between checkpoint and pipeline
        export(build_pipeline(training), run / "pipeline")
    logger.info("%s is done: %d of %d steps, %d images", run, state.step, steps, state.step * config.train.batch_size)


def optimizer_step(training: Training, loader: Iterator[Batch]) -> tuple[torch.Tensor, float]:
    """Accumulate the gradients of one global batch, clip, step, and move the average.

    Returns:
        The mean loss of this process's share (a scalar tensor) and the gradient norm before clipping.
    """
    accelerator, state = training.accelerator, training.state
    total = torch.zeros((), device=accelerator.device)
    for _ in range(accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(training.model):
            loss = batch_loss(training, training.model, next(loader).to(accelerator.device)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                max_norm = training.config.optim.max_grad_norm
                grad_norm = accelerator.clip_grad_norm_(training.model.parameters(), max_norm).item()
                scaler = accelerator.scaler  # float16's overflows now and then, until it has found its scale
                if not math.isfinite(grad_norm) and (scaler is None or scaler.get_scale() < MIN_SCALE):
                    raise FloatingPointError(
                        f"step {state.step}: loss {loss.item()}, gradient norm {grad_norm}. This step changed no "
                        "weights, and earlier checkpoints are intact. Lower optim.lr, or train in float32"
                    )
            state.optimizer.step()
            state.optimizer.zero_grad()
            total += loss.detach() / accelerator.gradient_accumulation_steps
    if math.isfinite(grad_norm):  # else float16's scaler skipped the step, which a fused optimizer doesn't tell
        state.ema.update(state.model)
    return total, grad_norm


def batch_loss(training: Training, denoiser: Denoiser, batch: Batch) -> torch.Tensor:
    """Loss (B,) of a batch, latents normalised and labels dropped; `denoiser` is the trained model or the average."""
    latents = training.codec.normalize(batch.latents)
    class_labels = training.state.model.drop_labels(batch.class_labels, batch.drops)
    return training.objective.loss(denoiser, latents, class_labels, batch.noise, batch.times)


@torch.no_grad()
def validate(training: Training) -> float:
    """Mean loss of the averaged weights on held-out latents, at fixed noise and times, so that values compare."""
    config, accelerator, size = training.config, training.accelerator, training.micro_batches.micro_batch
    indices = torch.arange(min(len(training.held_out), config.log.validation_samples))
    mine = indices.tensor_split(accelerator.num_processes)[accelerator.process_index]  # a rank's share can be empty
    sums = torch.zeros(2, device=accelerator.device)  # loss, samples
    for start in range(0, len(mine), size):
        chunk = mine[start : start + size].numpy()
        batch = validation_batch(training.held_out, config.train.seed, chunk).to(accelerator.device)
        with accelerator.autocast():
            sums[0] += batch_loss(training, training.state.ema.model, batch).sum()
        sums[1] += len(chunk)
    total, count = accelerator.reduce(sums, "sum").tolist()
    return total / count


def build_pipeline(training: Training) -> IwinDiTPipeline:
    """Put the averaged model, the VAE, the objective's sampler and the class names together."""
    names, scheduler = dict(enumerate(training.held_out.manifest.class_names)), training.objective.scheduler()
    pipeline = IwinDiTPipeline(training.state.ema.model, training.codec.vae, scheduler, id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def preview(config: Config, pipeline: IwinDiTPipeline, path: Path) -> None:
    """Save a grid of samples, a row per class; the same seeds every time."""
    log = config.log
    classes = log.preview_classes or list(range(min(10, pipeline.transformer.config.num_classes)))
    rows = []
    for label in classes:
        generators = [torch.Generator().manual_seed(seed) for seed in range(log.preview_columns)]
        (images,) = pipeline(
            [label] * log.preview_columns,
            num_inference_steps=log.preview_steps,
            guidance_scale=log.preview_guidance_scale,
            generator=generators,
            return_dict=False,
        )
        rows.append(images)
    path.parent.mkdir(exist_ok=True)
    image_grid(rows, [pipeline.id2label[label].split(",")[0] for label in classes]).save(path)


def export(pipeline: IwinDiTPipeline, folder: Path) -> None:
    """Write the pipeline folder, replacing the last one only when complete."""
    staging = folder.with_name(".pipeline.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


if __name__ == "__main__":
    main()
