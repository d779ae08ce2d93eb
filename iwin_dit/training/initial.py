"""The weights that a new run starts from, where these are not random: those of another run, checkpoint or pipeline.

Owns which of them fit. Must not know how a run goes on: one that does reads its own checkpoint and nothing else.
"""

import json
from typing import Any

from ..models.inflate import load_inflated
from ..models.loading import load_strictly
from ..models.transformer import IwinDiTCore, IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from ..pipelines.loading import identify, load_pipeline
from .config import Config

# Arguments of a model that may change when training starts from its weights: what it is trained on and what of that
# attends to what. Out_channels may be None for the same number, which shapes tell.
FREE = {"sample_size", "window_size", "window_padding", "single_frame", "class_dropout_prob", "out_channels"}


def load_initial(config: Config, model: IwinDiTCore) -> dict[str, Any] | None:
    """Replace a model's weights by those that the configuration names, the averaged ones of whatever that is.

    Args:
        config: Names them, or leaves the model as it is.
        model: Receives them: of the same class as theirs, or a video model that receives an image model's.

    Returns:
        JSON that identifies them, as `pipelines.loading.identify` gives it, and by "codec_sha256" the latents that they
        were trained on, None where their pipeline has no VAE; None where the model is left as it is.

    Raises:
        ValueError: If they cannot be found, or do not fit; every difference is listed, and the model is as it was.
    """
    if config.init_from is None:
        return None
    try:
        pipe = load_pipeline(config.init_from)
        source = pipe.transformer
        if isinstance(model, IwinDiTTransformer3DModel) and isinstance(source, IwinDiTTransformer2DModel):
            load_inflated(model, source)
        else:
            _check_configs(model, source)
            load_strictly(model, source.state_dict(), "its transformer")
        codec = None if pipe.codec is None else pipe.codec.fingerprint()
        return {**identify(config.init_from), "codec_sha256": codec}
    except ValueError as error:
        raise ValueError(f"init_from {config.init_from!r}: {error}") from error


def _check_configs(model: IwinDiTCore, source: IwinDiTCore) -> None:
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
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError("its transformer differs from the model:\n  " + "\n  ".join(differing))


def _arguments(model: IwinDiTCore) -> dict[str, Any]:
    """The arguments that a model was built with and its weights depend on, as JSON gives them back."""
    values = {name: value for name, value in model.config.items() if not name.startswith("_") and name not in FREE}
    values |= {"patch_size": model.patch_size, "conv_kernel_size": model.kernel_size}  # which may be an int for all
    return json.loads(json.dumps(values))
