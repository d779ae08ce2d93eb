"""The weights that a new run starts from, where these are not random: those of another run, checkpoint or pipeline.

Owns which of them fit. Must not know how a run goes on: one that does reads its own checkpoint and nothing else.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..data.codec import LatentCodec
from ..models.inflate import load_inflated
from ..models.loading import load_strictly
from ..models.transformer import IwinDiTCore, IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from ..pipelines.base import IwinDiTPipelineBase
from ..pipelines.loading import identify, load_pipeline
from .config import Config

logger = logging.getLogger(__name__)

# Arguments of a model that may change when training starts from its weights: what it is trained on and what of that
# attends to what. Out_channels may be None for the same number, which shapes tell.
FREE = {"sample_size", "window_size", "window_padding", "single_frame", "class_dropout_prob", "out_channels"}
PREDICTS = {"flow_matching": "flow_prediction", "ddpm": "epsilon"}  # as pipelines call what an objective trains


def load_initial(config: Config, model: IwinDiTCore) -> dict[str, Any] | None:
    """Replace a model's weights by those that the configuration names, the averaged ones of whatever that is.

    Args:
        config: Names them, or leaves the model as it is.
        model: Receives them: of the same class as theirs, or a video model that receives an image model's.

    Returns:
        JSON that identifies them, as `pipelines.loading.identify` gives it; by "codec_sha256" the latents that they
        were trained on, None where their pipeline has no VAE; and "class_names" by label, as far as it knows them, None
        where the label embeddings are not taken. None where the model is left as it is.

    Raises:
        ValueError: If they cannot be found, or do not fit; every difference is listed, and the model is as it was.
    """
    if config.init_from is None:
        return None
    try:
        pipe, fresh = load_pipeline(config.init_from), config.init_classes == "fresh"
        _check_prediction(config, pipe)
        _copy_weights(model, pipe.transformer, fresh)
        codec = None if pipe.codec is None else pipe.codec.fingerprint()
        names = None if fresh else pipe.id2label
        return {**identify(config.init_from), "codec_sha256": codec, "class_names": names}
    except (ValueError, OSError) as error:
        raise ValueError(f"init_from {config.init_from!r}: {error}") from error


def report_initial(initial: dict[str, Any], codec: LatentCodec, class_names: Sequence[str]) -> None:
    """Log where weights are from, and warn where they mean something else than what this run trains them on.

    Args:
        initial: From `load_initial`.
        codec: Of this run.
        class_names: Likewise, by label.
    """
    logger.info("initial      the weights of %s (%s, step %s)", *(initial[key] for key in ("path", "weights", "step")))
    if initial["codec_sha256"] not in (None, codec.fingerprint()):
        logger.warning("they were trained on latents of another VAE, or normalised otherwise, than those of this run")
    theirs = initial["class_names"] or {}
    other = [label for label, name in enumerate(class_names) if theirs.get(label, name) != name]
    if other:
        logger.warning(
            "%d of %d classes had another name where they were trained, such as %d: %r there, %r here. init_classes: "
            "fresh starts without the label embeddings there",
            *(len(other), len(class_names), other[0], theirs[other[0]], class_names[other[0]]),
        )


def _check_prediction(config: Config, pipe: IwinDiTPipelineBase) -> None:
    """Raise a ValueError where a pipeline's model predicts something else than the objective trains."""
    wanted, found = PREDICTS[config.objective], pipe.config.prediction_type
    if found != wanted:
        raise ValueError(
            f"expected a model whose prediction type is {wanted!r}, which objective {config.objective!r} trains, got "
            f"{found!r}"
        )


def _copy_weights(model: IwinDiTCore, source: IwinDiTCore, fresh: bool) -> None:
    """Load one model's weights into another, all or, with `fresh`, all but the label embeddings; a ValueError else."""
    try:
        if isinstance(model, IwinDiTTransformer3DModel) and isinstance(source, IwinDiTTransformer2DModel):
            load_inflated(model, source, fresh_classes=fresh)
            return
        _check_configs(model, source, fresh)
        tensors = source.state_dict()
        if fresh:
            null_class = tensors["class_embed.weight"][-1:]
            tensors["class_embed.weight"] = torch.cat([model.class_embed.weight.detach()[:-1], null_class])
        load_strictly(model, tensors, "its transformer")
    except ValueError as error:
        if fresh or model.config.num_classes == source.config.num_classes:
            raise
        raise ValueError(f"{error}\n  init_classes: fresh starts without the label embeddings there") from error


def _check_configs(model: IwinDiTCore, source: IwinDiTCore, fresh: bool) -> None:
    """Raise a ValueError that lists what differs between two models, but for what may."""
    if type(source) is not type(model):
        raise ValueError(
            f"expected weights of {type(model).__name__}, got those of {type(source).__name__}: only a video model can "
            "start from another class, an image model"
        )
    ours, theirs = _arguments(model), _arguments(source)
    differing = [
        f"model.{name}: {ours.get(name)} here, {theirs.get(name)} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and not (fresh and name == "num_classes")
    ]
    if differing:
        raise ValueError("its transformer differs from the model:\n  " + "\n  ".join(differing))


def _arguments(model: IwinDiTCore) -> dict[str, Any]:
    """The arguments that a model was built with and its weights depend on, as JSON gives them back."""
    values = {name: value for name, value in model.config.items() if not name.startswith("_") and name not in FREE}
    values |= {"patch_size": model.patch_size, "conv_kernel_size": model.kernel_size}  # which may be an int for all
    return json.loads(json.dumps(values))
