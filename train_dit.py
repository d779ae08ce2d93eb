"""Train an Iwin DiT on latents: the whole loop, in the order in which it runs.

accelerate launch train_dit.py                                        # the digits: configs/digits.yaml
accelerate launch train_dit.py --config configs/imagenet256_xl.yaml   # the same command again resumes
"""

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer2DModel
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.latents import LatentDataset, check_fits
from iwin_dit.data.prepare import prepare_latents
from iwin_dit.diffusion import Denoiser, Objective
from iwin_dit.pipelines.pictures import image_grid
from iwin_dit.training.batches import Batch, MicroBatches, validation_batch
from iwin_dit.training.checkpoint import TrainState, list_checkpoints, open_run
from iwin_dit.training.config import Config, parse_config
from iwin_dit.training.ema import EMA
from iwin_dit.training.log import MetricsLog
from iwin_dit.training.runtime import make_accelerator, micro_batch_size
from iwin_dit.training.summary import describe

logger = logging.getLogger("train_dit")


def main() -> None:
    """Read the configuration and train; a mistake of the user's is one line, without a traceback."""
    config = parse_config(default_config=str(Path(__file__).parent / "configs" / "digits.yaml"))
    try:
        run_training(config)
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"train_dit.py: error: {error}") from error


def run_training(config: Config) -> None:
    """Open everything that training needs, in the order in which mistakes are cheapest, and train."""
    accelerator = make_accelerator(config)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    micro_batch = micro_batch_size(
        config.train.batch_size, accelerator.num_processes, accelerator.gradient_accumulation_steps
    )
    if config.dry_run:
        logger.info("%s\n%s", yaml.safe_dump(config.to_dict(), sort_keys=False), describe(config, micro_batch))
        return

    set_seed(config.train.seed)
    model, objective = config.build_model(), config.build_objective()
    with accelerator.main_process_first():  # the others find the run folder, VAE and latents made
        run = open_run(config) if accelerator.is_main_process else Path(config.run)
        codec, train_data, held_out = open_data(config, model, accelerator.device)
    logger.info("%s", describe(config, micro_batch))
    logger.info(
        "training     %d latents and %d held out, %d process(es) on %s, %d CPU thread(s) each, precision %s",
        *(len(train_data), len(held_out), accelerator.num_processes, accelerator.device),
        *(torch.get_num_threads(), accelerator.mixed_precision),
    )

    state, trained = open_state(config, accelerator, model, run)
    if state.step >= config.train.steps:
        logger.info("%s is done: %d of %d steps", run, state.step, config.train.steps)
        return
    micro_batches = MicroBatches(
        train_data, codec, config.train.seed, micro_batch, accelerator.num_processes, accelerator.process_index
    )
    train(config, accelerator, run, state, trained, objective, micro_batches, held_out)


def open_data(
    config: Config, model: IwinDiTTransformer2DModel, device: torch.device
) -> tuple[LatentCodec, LatentDataset, LatentDataset]:
    """Open VAE, training latents and held-out latents, and check that they fit the model."""
    data = config.data
    codec, train_data, held_out = prepare_latents(
        data.source,
        data.vae,
        data.latents,
        resolution=data.resolution,
        holdout=data.holdout,
        seed=data.split_seed,
        batch_size=data.encode_batch_size,
        max_broken=data.max_broken_images,
        device=device,
    )
    check_fits(
        train_data.manifest,
        vae_sha256=codec.fingerprint(),
        latent_channels=model.config.in_channels,
        sample_size=tuple(n * p for n, p in zip(model.base_grid, model.patch_size, strict=True)),
        num_classes=model.config.num_classes,
    )
    return codec, train_data, held_out


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


def train(
    config: Config,
    accelerator: Accelerator,
    run: Path,
    state: TrainState,
    trained: torch.nn.Module,
    objective: Objective,
    micro_batches: MicroBatches,
    held_out: LatentDataset,
) -> None:
    """Run the loop from the state's step to the last."""
    steps, log, accumulation = config.train.steps, config.log, accelerator.gradient_accumulation_steps
    codec, class_names = micro_batches.codec, held_out.manifest.class_names
    loader = iter(
        micro_batches.loader(state.step * accumulation, steps * accumulation, num_workers=config.data.num_workers)
    )
    metrics = MetricsLog(config, accelerator, run, state.step)
    bar = tqdm(total=steps, initial=state.step, unit="step", disable=not accelerator.is_main_process)
    trained.train()
    clock, clock_step = time.perf_counter(), state.step
    losses: list[torch.Tensor] = []
    while state.step < steps:
        # 1. One optimizer step on the global batch
        lr = config.optim.learning_rate(state.step, steps)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm = optimizer_step(config, accelerator, state, trained, objective, loader)
        state.step += 1
        losses.append(loss)
        bar.update()

        # 2. What is due
        def due(every: int, step: int = state.step) -> bool:
            return every > 0 and (step % every == 0 or step == steps)

        if due(log.every):
            mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            speed = (state.step - clock_step) * config.train.batch_size / (time.perf_counter() - clock)
            metrics.write(state.step, loss=mean_loss, lr=lr, grad_norm=grad_norm, images_per_second=speed)
            bar.set_postfix(loss=f"{mean_loss:.4f}", images_per_second=f"{speed:.0f}", refresh=False)
            clock, clock_step, losses = time.perf_counter(), state.step, []
        if due(log.validate_every):
            paused = time.perf_counter()
            value = validate(config, accelerator, state.ema.model, objective, codec, held_out)
            metrics.write(state.step, validation_loss=value)
            clock += time.perf_counter() - paused
        if accelerator.is_main_process and (due(log.preview_every) or due(log.checkpoint_every)):
            paused = time.perf_counter()
            pipeline = build_pipeline(state.ema.model, codec, objective, class_names)
            if due(log.preview_every):
                preview(config, pipeline, run / "previews" / f"step-{state.step:08d}.png")
            if due(log.checkpoint_every):
                state.save(run / "checkpoints", keep=log.keep_checkpoints)
                export(pipeline, run / "pipeline")
            clock += time.perf_counter() - paused
    bar.close()
    accelerator.end_training()
    logger.info("%s is done: %d steps, %d images", run, steps, steps * config.train.batch_size)


def optimizer_step(
    config: Config,
    accelerator: Accelerator,
    state: TrainState,
    trained: torch.nn.Module,
    objective: Objective,
    loader: Any,
) -> tuple[torch.Tensor, float]:
    """Accumulate the gradients of one global batch, clip, step, and move the average.

    Returns:
        The mean loss of this process's share (a scalar tensor) and the gradient norm before clipping.
    """
    total = torch.zeros((), device=accelerator.device)
    for _ in range(accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(trained):
            loss = batch_loss(trained, state.model, objective, next(loader).to(accelerator.device)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(trained.parameters(), config.optim.max_grad_norm).item()
                # Float16 overflows now and then: its scaler skips such a step by itself.
                if not math.isfinite(grad_norm) and accelerator.scaler is None:
                    raise FloatingPointError(
                        f"step {state.step}: loss {loss.item()}, gradient norm {grad_norm}; the last checkpoint is "
                        "intact. Lower optim.lr, or train in float32"
                    )
            state.optimizer.step()
            state.optimizer.zero_grad()
            total += loss.detach() / accelerator.gradient_accumulation_steps
    if not accelerator.optimizer_step_was_skipped:
        state.ema.update(state.model)
    return total, grad_norm


def batch_loss(
    denoiser: Denoiser, model: IwinDiTTransformer2DModel, objective: Objective, batch: Batch
) -> torch.Tensor:
    """Loss (B,) of a batch, labels dropped; `denoiser` is the model itself or Accelerate's wrapping of it."""
    class_labels = model.drop_labels(batch.class_labels, batch.drops)
    return objective.loss(denoiser, batch.latents, class_labels, batch.noise, batch.times)


@torch.no_grad()
def validate(
    config: Config,
    accelerator: Accelerator,
    model: IwinDiTTransformer2DModel,
    objective: Objective,
    codec: LatentCodec,
    held_out: LatentDataset,
) -> float:
    """Mean loss of the averaged weights on held-out latents, at fixed noise and times, so that values compare."""
    indices = np.arange(min(len(held_out), config.log.validation_samples))
    mine = np.array_split(indices, accelerator.num_processes)[accelerator.process_index]
    sums = torch.zeros(2, device=accelerator.device)  # loss, samples
    for chunk in np.array_split(mine, max(1, math.ceil(len(mine) / config.train.batch_size))):
        batch = validation_batch(held_out, codec, config.train.seed, chunk).to(accelerator.device)
        with accelerator.autocast():
            sums[0] += batch_loss(model, model, objective, batch).sum()
        sums[1] += len(chunk)
    total, count = accelerator.reduce(sums, "sum").tolist()
    return total / count


def build_pipeline(
    model: IwinDiTTransformer2DModel, codec: LatentCodec, objective: Objective, class_names: tuple[str, ...]
) -> IwinDiTPipeline:
    """Put the averaged model, the VAE, the objective's sampler and the class names together."""
    pipeline = IwinDiTPipeline(model, codec.vae, objective.scheduler(), id2label=dict(enumerate(class_names)))
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
