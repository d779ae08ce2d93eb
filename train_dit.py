"""Train an Iwin DiT on latents: the whole loop, in the order in which it runs.

accelerate launch train_dit.py                                        # the digits: configs/digits.yaml
accelerate launch train_dit.py --config configs/imagenet256_xl.yaml   # the same command again resumes
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from iwin_dit.diffusion import Denoiser
from iwin_dit.training.batches import Batch
from iwin_dit.training.best import Score
from iwin_dit.training.checkpoint import CheckpointError
from iwin_dit.training.config import parse_config
from iwin_dit.training.evaluation import evaluate, evaluation_is_missing, logged, score, write_record
from iwin_dit.training.log import Meter
from iwin_dit.training.pictures import build_pipeline, export, exported_step, model_from, preview
from iwin_dit.training.ranks import DivergedError, largest, named_rank
from iwin_dit.training.runtime import make_accelerator
from iwin_dit.training.setup import Training, logger, open_training
from iwin_dit.training.state import Snapshot, gather_weights
from iwin_dit.training.stop import StopRequest, ignore_stop_signals
from iwin_dit.training.validation import TIME_BINS, by_time, loss_summary, validate


def main(arguments: list[str] | None = None) -> None:
    """Read the configuration and train; a mistake of the user's is one line, without a traceback."""
    config = parse_config(arguments, default_config=str(Path(__file__).parent / "configs" / "digits.yaml"))
    with one_line(ValueError, ImportError):
        accelerator = make_accelerator(config)
    status = 0
    with contextlib.ExitStack() as resources:  # holds the lock on the run folder
        with one_line(ValueError, ImportError):
            training = open_training(config, accelerator, resources)
        if training is not None:
            with (
                one_line(DivergedError, CheckpointError),
                named_rank(accelerator, training.state, before_exit=training.writer.join),
            ):
                status = train(training)
        accelerator.end_training()
    if status:
        raise SystemExit(status)


@contextlib.contextmanager
def one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Exit with the message alone where one of these errors is raised."""
    try:
        yield
    except kinds as error:
        raise SystemExit(f"train_dit.py: error: {error}") from error


def train(training: Training) -> int:
    """Run the loop from the state's step to the last, or to a request to stop.

    Returns:
        The exit status: 0 of a finished run, 143 or 130 of one that was stopped.
    """
    config, accelerator, state = training.config, training.accelerator, training.state
    log, steps, batch_size = config.log, config.train.steps, config.train.batch_size
    meter, skipped_in_a_row, owed, stopping = Meter(accelerator, batch_size, state.step, steps), 0, False, 0
    bar = tqdm(
        total=steps * batch_size,
        initial=state.step * batch_size,
        unit=config.sample_word,
        unit_scale=True,
        disable=not accelerator.is_main_process,
    )
    training.model.train()
    with StopRequest(config.train.max_time) as stop:

        def asked_to_stop() -> int:
            """Exit status with which some process was asked to stop, 0 if none was; all of them ask together."""
            return int(*largest(accelerator, stop.exit_code if stop.requested else 0))

        # The evaluation that a stop ended, of the step that the run goes on from
        missing = accelerator.is_main_process and evaluation_is_missing(config, state.step)
        if largest(accelerator, missing) == [1]:
            with meter.paused():
                best = write_evaluation(training, lambda: stop.requested)
                stopping = asked_to_stop()
                if best is not None:
                    save(training, with_pipeline=not stopping, best=best)

        loader = open_loader(training)
        while state.step < steps and not stopping:
            # 1. One optimizer step on the global batch
            lr = config.optim.learning_rate(state.step * batch_size, batch_size, steps * batch_size)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            result = optimizer_step(training, loader)
            state.step += 1
            bar.update(batch_size)
            skipped_in_a_row = 0 if result.finite else skipped_in_a_row + 1
            if result.finite:
                meter.add(result.sums)
            else:
                report_skipped(training, result, skipped_in_a_row)

            # 2. What is due; a request to stop leaves time for the checkpoint alone
            intervals = (log.every, log.validate_every, log.preview_every, config.eval.every, log.checkpoint_every)
            logs, validates, previews, evaluates, checkpoints = (
                every > 0 and (state.step % every == 0 or state.step == steps) for every in intervals
            )
            best = None
            if logs:
                values = meter.read(state.step)
                training.metrics.write(
                    state.step, **values, lr=lr, grad_norm=result.grad_norm, skipped_steps=state.skipped
                )
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            with meter.paused():
                stopping = asked_to_stop()
                if validates and not stopping:
                    write_validation(training, lambda: asked_to_stop() > 0)
                    stopping = asked_to_stop()
                if previews and not stopping:
                    write_previews(training, lambda: stop.requested)
                    stopping = asked_to_stop()
                if evaluates and not stopping:
                    best = write_evaluation(training, lambda: stop.requested)
                    stopping = asked_to_stop()
                owed = owed or checkpoints or state.step == steps
                # A run that diverges must not push out its good checkpoints.
                if ((owed or best is not None) and result.finite) or stopping:
                    save(training, with_pipeline=not stopping, best=best)
                    owed = False
        finish(training, stopped=stopping > 0)
        bar.close()
        return stopping


class StepResult(NamedTuple):
    """What a step gave.

    `sums` (2, TIME_BINS) of `by_time`, of this process; the gradient norm before clipping; whether all was finite and
    the step taken; the scale of float16's gradients, 1 in other precisions.
    """

    sums: torch.Tensor
    grad_norm: float
    finite: bool
    scale: float


def optimizer_step(training: Training, loader: Iterator[Batch]) -> StepResult:
    """Accumulate the gradients of one global batch; clip, step, and move the average, if all of it is finite."""
    accelerator, state, model = training.accelerator, training.state, training.model
    sums = torch.zeros(2, TIME_BINS, device=accelerator.device)
    for _ in range(accelerator.gradient_accumulation_steps):
        batch = next(loader).to(accelerator.device)
        with accelerator.accumulate(model):
            losses, times = batch_losses(training, model, batch)
            accelerator.backward(losses.mean())
        sums += by_time(losses.detach(), times)
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), training.config.optim.max_grad_norm)
    if isinstance(grad_norm, DTensor):  # of FSDP2
        grad_norm = grad_norm.full_tensor()
    # One process's NaN reaches the others' gradients, but its loss may be infinite alone: all skip, or none.
    broken = ~(grad_norm.isfinite() & sums.isfinite().all())
    finite = largest(accelerator, broken) == [0]
    scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
    if finite:
        state.optimizer.step()
        batch_size = training.config.train.batch_size
        state.ema.update(state.model, (state.step + 1) * batch_size, batch_size)
    elif accelerator.scaler is not None:  # float16's overflows now and then, until it has found its scale
        accelerator.scaler.update()
    state.optimizer.zero_grad()
    return StepResult(sums, grad_norm.item(), finite, scale)


def batch_losses(training: Training, denoiser: Denoiser, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and noise levels, (B,) each, of a batch; `denoiser` is the trained model or the average."""
    latents = training.codec.normalize(batch.latents)
    class_labels = training.state.model.drop_labels(batch.class_labels, batch.drops)
    losses = training.objective.loss(denoiser, latents, class_labels, batch.noise, batch.times)
    return losses, training.objective.time(batch.times)


def report_skipped(training: Training, result: StepResult, in_a_row: int) -> None:
    """Log a step that changed nothing, and give up after too many of them.

    Raises:
        DivergedError: If that was the last one allowed.
    """
    accelerator, state = training.accelerator, training.state
    state.skipped += 1
    summary = loss_summary(accelerator.reduce(result.sums, "sum"))
    values = {"grad_norm": result.grad_norm} | ({} if accelerator.scaler is None else {"scale": result.scale})
    training.metrics.write(state.step, skipped_loss=summary["loss"], skipped_steps=state.skipped, **values)
    message = f"step {state.step}: loss {summary['loss']} (by noise level {summary['loss_by_time']}), " + ", ".join(
        f"{name} {value}" for name, value in values.items()
    )
    logger.warning("%s: not finite, the step is skipped", message)
    if in_a_row >= training.config.train.max_skipped_steps:
        raise DivergedError(
            f"{message}: {in_a_row} steps in a row were not finite. They changed no weights, and the last checkpoint "
            "is intact. Lower optim.lr, look at the data, or train in bfloat16 or float32"
        )


def open_loader(training: Training) -> Iterator[Batch]:
    """Batches from the state's step to the last."""
    steps, accumulation = training.config.train.steps, training.accelerator.gradient_accumulation_steps
    first, last = training.state.step * accumulation, steps * accumulation
    return iter(training.micro_batches.loader(first, last, training.config.data.num_workers, ignore_stop_signals))


def write_validation(training: Training, stopping: Callable[[], bool]) -> None:
    """Write the loss of the averaged weights on held-out latents, unless a request to stop ends it."""

    def losses(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_losses(training, training.state.ema.model, batch)

    size = training.micro_batches.micro_batch
    sums = validate(training.config, training.accelerator, training.held_out, size, losses, stopping)
    if sums is not None:
        training.metrics.write(training.state.step, **loss_summary(sums, prefix="validation_"))


def write_previews(training: Training, stopping: Callable[[], bool]) -> None:
    """Write samples of the trained and of the averaged weights side by side, from the same seeds.

    Whatever goes wrong with them, a full disk or a picture of NaNs, is logged: a preview is no reason to stop training.
    """
    config, state = training.config, training.state
    weights = {"trained": gather_weights(state.model), "averaged": gather_weights(state.ema.model)}
    if not training.accelerator.is_main_process:
        return
    path = training.run / "previews" / f"step-{state.step:08d}"
    try:
        models = {name: model_from(config, weights.pop(name)) for name in list(weights)}
        picture = preview(config, models, training.codec, training.class_names, path, stopping)
        if picture is not None:
            training.metrics.show(state.step, "previews", picture)
    except Exception:
        logger.warning("there is no preview of step %d", state.step, exc_info=True)


def write_evaluation(training: Training, stopping: Callable[[], bool]) -> Score | None:
    """Measure samples of the averaged weights, and write the values; return the score if it is the best so far."""
    assert training.evaluator is not None  # opened where eval.every is above 0
    config, state, accelerator = training.config, training.state, training.accelerator
    measured = evaluate(training.evaluator, config, accelerator, state, training.codec, training.class_names, stopping)
    if measured is None:
        return None
    training.metrics.write(state.step, **logged(measured))
    ours, better = score(config, state.step, measured), False
    if accelerator.is_main_process:
        write_record(config, measured, ours)
        training.writer.join()  # which may be writing the best so far
        better = ours.beats(training.writer.best)
    return ours if largest(accelerator, better) == [1] else None


def save(training: Training, with_pipeline: bool = True, best: Score | None = None) -> None:
    """Copy the state and have it written, as a checkpoint and as a pipeline, while training goes on."""
    started = time.perf_counter()
    training.writer.join()  # lest memory holds two copies

    def export_pipeline(snapshot: Snapshot) -> None:
        model = model_from(training.config, snapshot.ema)
        pipeline = build_pipeline(training.config, model, training.codec, training.class_names)
        export(pipeline, training.run / "pipeline", snapshot.step)

    snapshot = training.state.snapshot()
    if training.accelerator.is_main_process:
        training.writer.save(snapshot, export_pipeline if with_pipeline else None, best)
    training.metrics.write(training.state.step, checkpoint_stall_seconds=time.perf_counter() - started)


def finish(training: Training, stopped: bool) -> None:
    """Wait for the last checkpoint, and make the pipeline of a finished run that was killed before it was written."""
    training.writer.wait()
    config, state, accelerator, run = training.config, training.state, training.accelerator, training.run
    stale = accelerator.is_main_process and not stopped and exported_step(run / "pipeline") != state.step
    if largest(accelerator, stale) != [0]:
        save(training)
        training.writer.wait()
    training.metrics.close()
    word = "stopped" if stopped else "done"
    count, steps = state.step * config.train.batch_size, config.train.steps
    logger.info("%s is %s: %d of %d steps, %d %ss", run, word, state.step, steps, count, config.sample_word)


if __name__ == "__main__":
    main()
