"""From a configuration to everything that the loop works with, opened and checked before anything is written."""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from ..data.codec import LatentCodec
from ..data.latents import LatentDataset
from ..data.manifest import MANIFEST, sha256
from ..diffusion import Objective
from ..models import IwinDiTTransformer2DModel
from .batches import MicroBatches
from .checkpoint import CheckpointWriter, TrainState, abandon_after, find_checkpoint, list_checkpoints
from .config import Config
from .data import open_data
from .ema import EMA
from .log import MetricsLog
from .run import check_run, open_run
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
        It all; None where there is nothing to train, with `dry_run`.

    Raises:
        ValueError: For every mistake of the user's.
    """
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    world, rank = accelerator.num_processes, accelerator.process_index
    micro_batch = config.train.batch_size // (world * accelerator.gradient_accumulation_steps)
    if config.dry_run:
        logger.info("%s\n%s", yaml.safe_dump(config.to_dict(), sort_keys=False), describe(config, micro_batch))
        return None
    check_run(config)

    set_seed(config.train.seed)
    model = config.build_model()
    run = Path(config.run)
    with accelerator.main_process_first():  # the others find the run folder made and locked
        codec, train_data, held_out = open_data(config, model, accelerator)
        if accelerator.is_main_process:
            manifest = sha256(Path(config.data.latents) / MANIFEST)
            resolved = {"mixed_precision": accelerator.mixed_precision, "latents_manifest_sha256": manifest}
            coming = max(1, config.log.keep_last + 1 - len(list_checkpoints(run / "checkpoints")))
            bytes_needed = coming * CHECKPOINT_BYTES * model.num_parameters()
            resources.enter_context(open_run(config, resolved, bytes_needed))
    if not len(held_out):
        raise ValueError(
            f"no held-out latents lie in this process's share of {config.data.shares}: raise data.holdout, "
            f"{config.data.holdout} now, or lower data.shares"
        )
    logger.info("%s", describe(config, micro_batch))
    logger.info(
        "training     %d latents and %d held out, %d process(es) on %s, %d CPU thread(s) each, precision %s, "
        "%d = %d processes x %d accumulation x %d",
        *(len(train_data), len(held_out), world, accelerator.device, torch.get_num_threads()),
        *(accelerator.mixed_precision, config.train.batch_size, world, accelerator.gradient_accumulation_steps),
        micro_batch,
    )

    state, wrapped = open_state(config, accelerator, model, run)
    micro_batches = MicroBatches(train_data, config.train.seed, micro_batch, world, rank, config.data.shares)
    writer = CheckpointWriter(
        run / "checkpoints", config.log.keep_last, config.log.keep_every, asynchronous=config.log.asynchronous
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
    )


def open_state(
    config: Config, accelerator: Accelerator, model: IwinDiTTransformer2DModel, run: Path
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
        model.compile_repeated_blocks(fullgraph=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    trained, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        ema.shard(model)
    state = TrainState(model, ema, optimizer, accelerator.scaler)
    root = run / "checkpoints"
    found = [find_checkpoint(root, config.resume) if accelerator.is_main_process else None]
    [checkpoint] = broadcast_object_list(found)
    if checkpoint is not None:
        state.load(checkpoint)
        logger.info("resumed from %s", checkpoint)
        if accelerator.is_main_process:
            abandon_after(root, state.step)
    return state, trained
