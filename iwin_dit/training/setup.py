"""From a configuration to everything that the loop works with, opened and checked before anything is written."""

import contextlib
import functools
import logging
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from ..data.codec import LatentCodec
from ..data.latents import LatentDataset
from ..data.manifest import MANIFEST
from ..diffusion import Objective
from ..evaluation.evaluator import Evaluator
from ..files import sha256, write_json
from ..models.transformer import IwinDiTCore
from .batches import MicroBatches
from .best import drop_evaluations_after, restore_best
from .checkpoint import (
    CheckpointWriter,
    abandon_after,
    find_checkpoint,
    list_checkpoints,
    standing_checkpoints,
)
from .config import Config
from .data import image_steps, open_data
from .ema import EMA
from .evaluation import open_evaluator
from .initial import load_initial, report_initial
from .log import MetricsLog
from .ranks import main_first
from .run import INITIAL, check_run, open_run
from .state import TrainState
from .summary import describe

logger = logging.getLogger("train_dit")

CHECKPOINT_BYTES = 16  # per parameter, in float32: weight, average and the two moments of Adam


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
        writer: Where the checkpoints go.
        evaluator: Measures samples; None where evaluation is turned off.
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
    writer: CheckpointWriter
    evaluator: Evaluator | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label."""
        return self.held_out.manifest.class_names


def open_training(config: Config, accelerator: Accelerator, resources: contextlib.ExitStack) -> Training | None:
    """Open everything that training needs, in the order in which mistakes are cheapest.

    Args:
        config: The configuration.
        accelerator: Of this process.
        resources: Is given what must be closed at the end: the lock on the run folder.

    Returns:
        It all; None where there is nothing to train, with `dry_run`, for which weights to start from are checked, too.

    Raises:
        ValueError: For every mistake of the user's.
    """
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    world, rank = accelerator.num_processes, accelerator.process_index
    micro_batch = config.train.batch_size // (world * accelerator.gradient_accumulation_steps)
    run = Path(config.run)
    standing = list_checkpoints(run / "checkpoints")
    goes_on = bool(standing) and not config.overwrite
    if config.dry_run:
        logger.info("%s\n%s", yaml.safe_dump(config.to_dict(), sort_keys=False), describe(config, micro_batch))
        if config.init_from is not None and not goes_on:
            main_first(accelerator, lambda: load_initial(config, config.build_model()))
            logger.info("initial      the weights of %s fit", config.init_from)
        return None
    check_run(config)

    set_seed(config.train.seed)
    model = config.build_model()
    initial = None if goes_on else main_first(accelerator, lambda: load_initial(config, model))
    codec, train_data, held_out = main_first(accelerator, lambda: open_data(config, model, accelerator))
    manifest = same_manifest(config, accelerator)
    if not len(held_out) and config.log.validate_every:
        raise ValueError(
            f"no held-out latents lie in this process's share of {config.data.shares}, data.holdout is "
            f"{config.data.holdout}: raise it, lower data.shares, or set log.validate_every to 0"
        )
    evaluator = open_evaluator(config, accelerator, model, codec, held_out.manifest.class_names)
    resolved = {"mixed_precision": accelerator.mixed_precision, "latents_manifest_sha256": manifest}
    kept = config.log.keep_last + (evaluator is not None)  # the best one
    coming = max(1, kept + 1 - len(standing))
    bytes_needed = coming * CHECKPOINT_BYTES * model.num_parameters()

    def take_run_folder() -> None:
        if accelerator.is_main_process:
            resources.enter_context(open_run(config, resolved, bytes_needed))
            if initial is not None:
                write_json(run / INITIAL, initial)

    main_first(accelerator, take_run_folder)
    logger.info("%s", describe(config, micro_batch))
    if initial is not None:
        report_initial(initial, codec, held_out.manifest.class_names)
    logger.info("data         %d latents to train on, %d held out", len(train_data), len(held_out))
    logger.info(
        "batch        %d = %d process(es) x %d micro-batch(es) x %d, on %s, %d CPU thread(s) each, precision %s",
        *(config.train.batch_size, world, accelerator.gradient_accumulation_steps, micro_batch),
        *(accelerator.device, torch.get_num_threads(), accelerator.mixed_precision),
    )

    state, wrapped = open_state(config, accelerator, model, run)
    writer = open_writer(config, accelerator, run, state.step)
    resources.callback(writer.join)  # before the lock goes
    micro_batches = MicroBatches(
        *(train_data, config.train.seed, micro_batch, world, rank),
        shares=config.data.shares,
        flips=config.data.flips,
        posterior=config.data.posterior == "mean_std",
        image_steps=image_steps(config, codec),
    )
    return Training(
        config=config,
        accelerator=accelerator,
        run=run,
        objective=config.build_objective(),
        codec=codec,
        micro_batches=micro_batches,
        held_out=held_out,
        state=state,
        model=wrapped,
        metrics=MetricsLog(config, accelerator, run, state.step),
        writer=writer,
        evaluator=evaluator,
    )


def open_writer(config: Config, accelerator: Accelerator, run: Path, step: int) -> CheckpointWriter:
    """Build what writes checkpoints, with the best one of the run's past, and forget evaluations of another future.

    Args:
        config: Says what is kept.
        accelerator: The main process alone writes, and knows the best.
        run: Run folder.
        step: Step that the run goes on from.

    Returns:
        The writer.
    """
    root, best = run / "checkpoints", None
    if accelerator.is_main_process:
        drop_evaluations_after(run, step)
        best = restore_best(run, standing_checkpoints(root, step))
    log = config.log
    return CheckpointWriter(root, log.keep_last, log.keep_every, asynchronous=log.asynchronous, best=best)


def same_manifest(config: Config, accelerator: Accelerator) -> str:
    """Return the sha256 of the latents' manifest, which must be the same on every machine.

    Args:
        config: Names the latents.
        accelerator: The processes.

    Returns:
        The hash, in hex.

    Raises:
        ValueError: If this process sees another manifest than the main process.
    """
    digest = sha256(Path(config.data.latents) / MANIFEST)
    [expected] = broadcast_object_list([digest])
    if digest != expected:
        raise ValueError(
            f"process {accelerator.process_index} on {platform.node()} sees other latents in {config.data.latents} "
            f"than the main process: manifest {digest}, expected {expected}. Copy the same folder to every machine"
        )
    return digest


def open_state(
    config: Config, accelerator: Accelerator, model: IwinDiTCore, run: Path
) -> tuple[TrainState, torch.nn.Module]:
    """Build optimizer and average, hand model and optimizer to Accelerate, and resume from a checkpoint.

    Args:
        config: The configuration.
        accelerator: Shards or wraps the model.
        model: With the weights that a new run starts from.
        run: Run folder.

    Returns:
        The state, which holds the bare modules, and the model as Accelerate wrapped it.
    """
    optim = config.optim
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.to(accelerator.device)
    ema = EMA(model, config.train.ema_halflife_images)
    if config.train.compile:
        model.compile_repeated_blocks(fullgraph=True, options=config.train.compile_options)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    trained, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        ema.shard(model)
    state = TrainState(model, ema, optimizer, accelerator.scaler)
    root = run / "checkpoints"
    find = functools.partial(find_checkpoint, root, config.resume)
    found = main_first(accelerator, lambda: find() if accelerator.is_main_process else None)
    [checkpoint] = broadcast_object_list([found])
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise ValueError(f"{platform.node()} has no {checkpoint}: the run folder must be seen by every machine")
        state.load(checkpoint)
        logger.info("resumed from %s", checkpoint)
        if accelerator.is_main_process and config.resume != "latest":
            abandon_after(root, state.step)
    return state, trained
