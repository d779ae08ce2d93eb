"""Model sizes as data: `IwinDiTTransformer2DModel(**preset("XL/1", in_channels=32, sample_size=16))`.

Parameters are for 32 latent channels and 1,000 classes, query/key norm included (it adds 2 * head_dim per block; the
published FlashDiT counts are without). No size has been trained by this project yet; docs/LOG.md says what has.
"""

from typing import Any

#                 width = heads x head dim      parameters (millions) at patch 1, patch 2
SIZES: dict[str, dict[str, int]] = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},  # 384:    34.71,    34.78
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},  # 768:   137.54,   137.69
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},  # 1024:   483.33,   483.53
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},  # 1152:   712.48,   712.70
    "1p0B": {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64},  # 1536:  1086.04,  1086.33
    "1p6B": {"num_layers": 28, "num_attention_heads": 28, "attention_head_dim": 64},  # 1792:  1721.78,  1722.12
}
PATCH_SIZES = (1, 2)
PRESETS = tuple(f"{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)


def preset(name: str, **overrides: Any) -> dict[str, Any]:
    """Look up a model size, in the notation of the DiT paper: size / patch.

    Args:
        name: Such as "XL/1".
        overrides: Further or other keyword arguments of the model.

    Returns:
        Keyword arguments for `IwinDiTTransformer2DModel`. For `IwinDiTTransformer3DModel` override `patch_size` by
        (pt, ph, pw): the preset's one number would hold in time too.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    size, patch = name.split("/")
    return {**SIZES[size], "patch_size": int(patch), **overrides}
