"""Metrics of the averaged weights while training goes on: what `evaluate_fid.py` measures, on fewer samples.

Owns what is evaluated and where its record goes. Must not know the metrics, nor which checkpoint is the best (best.py).
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator

from ..data.codec import LatentCodec
from ..evaluation import report
from ..evaluation.evaluator import EvaluationError, Evaluator, Measurement, Request
from ..evaluation.passes import together
from ..evaluation.samples import SampledImages, Sampling
from ..evaluation.suite import METRICS, check_size, reported_names
from ..evaluation.videos import Cut
from ..files import write_json
from ..models.transformer import IwinDiTCore
from .best import SCORE, Score, record_path
from .config import Config
from .pictures import build_pipeline, model_from
from .ranks import main_first
from .state import TrainState, whole_weights

logger = logging.getLogger(__name__)

# What changes neither an image nor what it is compared with, and the reference, of which the content counts: values
# compare whatever these are.
NOT_COMPARED = ("every", "metrics", "batch_size", "inception_weights", "i3d", "reference", "max_broken")


def open_evaluator(
    config: Config,
    accelerator: Accelerator,
    model: IwinDiTCore,
    codec: LatentCodec,
    class_names: tuple[str, ...],
) -> Evaluator | None:
    """Open and check what an evaluation needs: the settings of the sampler, networks, their weights, the reference.

    Args:
        config: Says which.
        accelerator: The processes, which all call this; the main one goes first, lest they download the same file.
        model: Of the samples, with any weights; it is left as it is.
        codec: Holds the VAE.
        class_names: By label.

    Returns:
        The evaluator; None where evaluation is turned off.

    Raises:
        ValueError: For every mistake of the user's; all processes raise it.
        ImportError: If a metric needs a package that is not installed.
    """
    if not config.eval.every:
        return None
    try:
        check_size(config.eval.metric_names, (config.data.resolution,) * 2)
    except ValueError as error:
        raise ValueError(f"data.resolution: {error}; give other --eval.metrics, or --eval.every 0") from error

    def opened() -> Evaluator:
        with _refusing():
            samples = _samples(config, model, codec, class_names, step=0)
            evaluator = Evaluator(build_request(config), accelerator.device)
            evaluator.check(samples)
            return evaluator

    evaluator = main_first(accelerator, opened)
    with _refusing():
        evaluator.prepare(config.eval.num_samples)
    return evaluator


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn what is wrong with an evaluation, before training, into a mistake of the user's."""
    try:
        yield
    except (ValueError, OSError, EvaluationError) as error:
        raise ValueError(f"{error}. Without evaluation: --eval.every 0") from error


def evaluate(
    evaluator: Evaluator,
    config: Config,
    accelerator: Accelerator,
    state: TrainState,
    codec: LatentCodec,
    class_names: tuple[str, ...],
    stopping: Callable[[], bool],
) -> Measurement | None:
    """Sample from the averaged weights and measure; all processes call it, and share the samples out.

    What goes wrong with it, on one process or on all, is logged: a metric is no reason to stop training.

    Args:
        evaluator: From `open_evaluator`.
        config: Says how to sample.
        accelerator: The processes.
        state: Has the averaged weights. Under FSDP2 every process holds the whole of them for as long as this takes.
        codec: Holds the VAE.
        class_names: By label.
        stopping: Asked between batches; true on any process ends the evaluation on all.

    Returns:
        The measurement, the same on every process; None if it failed or was ended.
    """
    weights = whole_weights(state.ema.model)
    try:
        images = together(lambda: _samples(config, model_from(config, weights), codec, class_names, state.step))
        return evaluator.measure(images, stopping=stopping, progress=False)
    except Exception as error:
        if accelerator.num_processes > 1 and not isinstance(error, EvaluationError):
            raise  # of this process alone, perhaps: the others may be waiting for it
        logger.warning("there is no evaluation of step %d", state.step, exc_info=True)
        return None


def evaluation_is_missing(config: Config, step: int) -> bool:
    """Tell whether the step that a run goes on from is one of its evaluations, and has no record.

    Args:
        config: Says when to evaluate.
        step: Steps done.

    Returns:
        True where the run was stopped in the middle of it, or it failed.
    """
    every = config.eval.every
    due = every > 0 and step > 0 and (step % every == 0 or step == config.train.steps)
    return due and not record_path(Path(config.run), step).is_file()


def _samples(
    config: Config, model: IwinDiTCore, codec: LatentCodec, class_names: tuple[str, ...], step: int
) -> SampledImages:
    """The samples of an evaluation, none of them drawn yet; a ValueError if the sampler cannot be set so."""
    settings = config.eval
    sampling = Sampling(settings.num_inference_steps, settings.guidance_scale, seed=settings.seed)
    about = {"path": config.run, "weights": "ema", "step": step}
    return SampledImages(build_pipeline(config, model, codec, class_names), settings.num_samples, sampling, about)


def build_request(config: Config) -> Request:
    """Say what to measure; real clips are cut as those trained on, as `evaluate_fid.py` cuts them for the pipeline.

    Args:
        config: With the settings of the evaluation, and of the data.

    Returns:
        The request.

    Raises:
        ValueError: As `Request`.
    """
    settings = config.eval
    return Request(
        metrics=settings.metric_names,
        reference=settings.reference,
        protocol=settings.protocol,
        inception_weights=None if settings.inception_weights is None else Path(settings.inception_weights),
        dinov2=settings.dinov2,
        i3d=None if settings.i3d is None else Path(settings.i3d),
        cut=Cut.of_real(settings.metric_names, config.data.clips, config.data.resolution),
        batch_size=settings.batch_size,
        max_broken=settings.max_broken,
        num_real=settings.num_real,
    )


def score(config: Config, step: int, measurement: Measurement) -> Score:
    """Take from a measurement what decides which checkpoint is the best.

    Args:
        config: Names the first metric and the settings.
        step: Of the weights.
        measurement: From `evaluate`, with the sha256 of the reference in its record.

    Returns:
        The first value of the first metric.
    """
    metric = config.eval.metric_names[0]
    name = reported_names(metric, measurement.n_fake)[0]
    settings = {key: value for key, value in dataclasses.asdict(config.eval).items() if key not in NOT_COMPARED}
    settings["reference_sha256"] = (measurement.record["reference"] or {}).get("sha256")
    return Score(step, name, measurement.values[name]["value"], METRICS[metric].greater_is_better, settings)


def write_record(config: Config, measurement: Measurement, score: Score) -> None:
    """Log the values, and write everything that they depend on to evaluations/; where that fails, it is logged.

    What a reader of the values must know besides is logged with the first of a run.

    Args:
        config: Names the run folder, and says how the samples were made.
        measurement: From `evaluate`.
        score: From `score`, which is kept with it.
    """
    path = record_path(Path(config.run), score.step)
    content = {"step": score.step, SCORE: dataclasses.asdict(score), **report.content(measurement)}
    settings = f"guidance {config.eval.guidance_scale:g}, {config.eval.num_inference_steps} steps"
    for line in report.lines(measurement, f"{settings}, averaged weights of step {score.step}", path):
        logger.info("%s", line)
    if not path.parent.exists():
        for warning in report.warnings(measurement):
            logger.warning("%s", warning)
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)


def logged(measurement: Measurement) -> dict[str, float]:
    """Numbers for the log: values by name with "eval_" in front, and the seconds that the evaluation took."""
    values = {f"eval_{name}": float(entry["value"]) for name, entry in measurement.values.items()}
    return {**values, "eval_seconds": measurement.seconds}
