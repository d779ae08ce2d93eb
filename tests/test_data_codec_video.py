"""The latent codec on clips: tiny random video VAEs of every class it supports, and image VAEs frame by frame."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ModelMixin,
)

from iwin_dit.data.codec import FRAMES_PER_CALL, VIDEO_VAES, LatentCodec, encoder_channels
from iwin_dit.data.prepare import open_vae

MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 3.0]
SIDES = (16, 32)  # height and width: one or two cells, and not square


def wan(**config: object) -> AutoencoderKLWan:
    widths = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**{**widths, "latents_mean": MEAN, "latents_std": STD, **config})


def wan22() -> AutoencoderKLWan:
    return wan(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)


def ltx(**config: object) -> AutoencoderKLLTXVideo:
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        patch_size=1,
        scaling_factor=0.5,
        **config,
    )
    vae.latents_mean.copy_(torch.tensor(MEAN))
    vae.latents_std.copy_(torch.tensor(STD))
    return vae


def cogvideox(**config: object) -> AutoencoderKLCogVideoX:
    widths = {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    return AutoencoderKLCogVideoX(**widths, **config)


def hunyuan() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )


def hunyuan15() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, spatial_compression_ratio=8
    )


def mochi() -> AutoencoderKLMochi:
    return AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,  # 32 groups are built in
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        latent_channels=4,
        latents_mean=MEAN,
        latents_std=STD,
    )


def per_channel(values: list[float] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values).view(1, -1, 1, 1, 1)


# How diffusers' pipelines bring latents to the decoder: pipeline_wan.py, pipeline_ltx.py (`_denormalize_latents`),
# pipeline_cogvideox.py, pipeline_hunyuan_video.py and pipeline_hunyuan_video1_5.py, pipeline_mochi.py.
def as_in_wan(z: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    return z / (1.0 / per_channel(vae.config.latents_std)) + per_channel(vae.config.latents_mean)


def as_in_ltx(z: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    return z * per_channel(vae.latents_std) / vae.config.scaling_factor + per_channel(vae.latents_mean)


def as_in_mochi(z: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    std, mean = per_channel(vae.config.latents_std), per_channel(vae.config.latents_mean)
    return z * std / vae.config.scaling_factor + mean


def scaled(z: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    return 1 / vae.config.scaling_factor * z


# factory, stride in space and in time, frames of a short clip, what the pipeline does before it decodes
VAES: dict[str, tuple[Callable[[], ModelMixin], int, int, int, Callable[[torch.Tensor, ModelMixin], torch.Tensor]]] = {
    "wan": (wan, 8, 4, 9, as_in_wan),
    "wan2.2": (wan22, 16, 4, 9, as_in_wan),
    "ltx": (ltx, 8, 8, 9, as_in_ltx),
    "ltx-timestep": (lambda: ltx(timestep_conditioning=True), 8, 8, 9, as_in_ltx),
    "cogvideox": (cogvideox, 8, 4, 9, scaled),
    "cogvideox-inverted": (lambda: cogvideox(invert_scale_latents=True), 8, 4, 9, scaled),
    "hunyuan": (hunyuan, 8, 4, 5, scaled),
    "hunyuan1.5": (hunyuan15, 8, 4, 5, scaled),
    "mochi": (mochi, 8, 6, 7, as_in_mochi),
}


def codec_of(name: str) -> LatentCodec:
    torch.manual_seed(0)
    return LatentCodec(VAES[name][0]().eval())


def clips(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def decoded_as_in_pipeline(codec: LatentCodec, stored: torch.Tensor) -> torch.Tensor:
    """What the pipelines' call of `vae.decode` gives; that of LTX passes `decode_timestep`, by default 0."""
    time = (torch.zeros(len(stored)),) if codec.vae.config.get("timestep_conditioning") else ()
    with torch.no_grad():
        return codec.vae.decode(stored, *time).sample


def test_every_supported_class_is_tested() -> None:
    assert {type(factory()).__name__ for factory, *_ in VAES.values()} == set(VIDEO_VAES)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("single", [True, False], ids=["frame", "clip"])
def test_round_trip(name: str, single: bool) -> None:
    _, stride, temporal_stride, frames, denormalized = VAES[name]
    codec = codec_of(name)
    assert (codec.stride, codec.temporal_stride, codec.latent_channels, codec.is_video) == (
        stride,
        temporal_stride,
        4,
        True,
    )

    frames = 1 if single else frames
    pixels = clips(1, 3, frames, *SIDES)
    stored = codec.encode(pixels)
    latent_size = (1 + (frames - 1) // temporal_stride, SIDES[0] // stride, SIDES[1] // stride)
    assert stored.shape == (1, 4, *latent_size)
    assert codec.latent_size(pixels.shape[2:]) == latent_size
    assert codec.pixel_size(latent_size) == pixels.shape[2:]
    with torch.no_grad():
        posterior = codec.vae.encode(pixels).latent_dist
    assert torch.equal(stored, posterior.mode())
    mean, std = codec.encode_posterior(pixels)
    assert torch.equal(mean, stored)
    assert torch.equal(std, posterior.std)

    model = codec.normalize(stored)
    torch.testing.assert_close(denormalized(model, codec.vae), stored, atol=1e-5, rtol=1e-5)
    decoded = codec.decode(model)
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded, decoded_as_in_pipeline(codec, denormalized(model, codec.vae)))


@pytest.mark.parametrize("name", ["wan", "ltx-timestep", "cogvideox", "hunyuan", "hunyuan1.5", "mochi"])
def test_a_clip_depends_on_no_other(name: str) -> None:
    """Neither on those beside it nor on those before it, of which a VAE may keep features."""
    codec, frames = codec_of(name), VAES[name][3]
    pixels = clips(2, 3, frames, 16, 16)
    stored = codec.encode(pixels)
    decoded = codec.decode(codec.normalize(stored))
    single = codec.encode(clips(1, 3, 1, 16, 16, seed=2))  # in between, a batch of another shape
    codec.decode(codec.normalize(single))
    for i in range(2):
        alone = codec.encode(pixels[i : i + 1])
        assert torch.equal(alone, stored[i : i + 1])
        assert torch.equal(codec.decode(codec.normalize(alone)), decoded[i : i + 1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames"), [("hunyuan", 17), ("hunyuan", 29), ("cogvideox", 25), ("wan", 21)])
def test_clips_beyond_what_a_vae_takes_at_once(name: str, frames: int) -> None:
    codec = codec_of(name)
    pixels = clips(1, 3, frames, 16, 16)
    stored = codec.encode(pixels)
    assert stored.shape[2:] == codec.latent_size(pixels.shape[2:])
    assert codec.decode(codec.normalize(stored)).shape == pixels.shape


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("wan", (16, 16, 16), r"frames = 1 \+ k \* 4, as AutoencoderKLWan takes them, got 16; nearest: 13 and 17"),
        ("wan", (0, 16, 16), r"frames = 1 \+ k \* 4, .* got 0; nearest: 1"),
        ("wan", (5, 12, 16), r"height = k \* 8, .* got 12; nearest: 8 and 16"),
        ("wan2.2", (5, 16, 24), r"width = k \* 16, .* got 24; nearest: 16 and 32"),
        ("wan", (5, 16, 0), r"width = k \* 8, .* got 0; nearest: 8"),
        ("wan", (16, 16), r"size \(T, H, W\), T = 1 for an image, as AutoencoderKLWan takes it, got \(16, 16\)"),
        ("ltx", (5, 16, 16), r"frames = 1 \+ k \* 8, .* got 5; nearest: 1 and 9"),
        ("cogvideox", (5, 16, 16), r"frames = 1 \+ k \* 8, .* got 5; nearest: 1 and 9"),  # would decode to 8 frames
        ("mochi", (9, 16, 16), r"frames = 1 \+ k \* 6, .* got 9; nearest: 7 and 13"),
    ],
)
def test_sizes_that_do_not_fit(name: str, size: tuple[int, ...], message: str) -> None:
    codec = codec_of(name)
    with pytest.raises(ValueError, match=message):
        codec.latent_size(size)
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(1, 3, *size))


def test_latent_sizes_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"latent frames = 1 \+ k \* 2, as AutoencoderKLCogVideoX .* got 4; nearest: 3 and 5"
    ):
        codec_of("cogvideox").pixel_size((4, 2, 2))
    with pytest.raises(ValueError, match=r"latent size \(T, H, W\), T = 1 for an image, .* got \(2, 2\)"):
        codec_of("wan").decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"expected latents .*, got \(1, 8, 2, 2, 2\)"):
        codec_of("wan").decode(torch.zeros(1, 8, 2, 2, 2))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"an image VAE, or a video VAE out of .*, got AutoencoderKLCosmos"):
        LatentCodec(AutoencoderKLCosmos(encoder_block_out_channels=(8, 8), decode_block_out_channels=(8, 8)))
    with pytest.raises(ValueError, match=r"an image VAE, or a video VAE out of .*, got AutoencoderKLAllegro"):
        LatentCodec(AutoencoderKLAllegro(block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1))
    with pytest.raises(ValueError, match="AutoencoderKLLTXVideo adds random noise while it decodes"):
        LatentCodec(ltx(decoder_inject_noise=(True, False, False, False, False)))
    codec = LatentCodec(wan(scale_factor_spatial=4).eval())
    with pytest.raises(ValueError, match=r"stride of 4 in space and 4 .* become \(1, 4, 4\), .* gave \(1, 2, 2\)"):
        codec.encode(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) should become \(1, 8, 8\), but its layers gave \(1, 16, 16\)"):
        codec.decode(torch.zeros(1, 4, 1, 2, 2))
    latents = torch.zeros(3, 4, 2, 2, 2)
    latents[1, 0, 1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"samples \[1\] of 3"):
        codec.decode(latents)


def test_given_statistics() -> None:
    codec = LatentCodec(cogvideox(), MEAN, STD)
    stored = clips(2, 4, 3, 2, 2)
    torch.testing.assert_close(codec.normalize(stored), (stored - per_channel(MEAN)) / per_channel(STD))
    torch.testing.assert_close(codec.denormalize(codec.normalize(stored)), stored)
    assert codec.given_statistics == {"latents_mean": MEAN, "latents_std": STD}
    with pytest.raises(ValueError, match="AutoencoderKLWan has latent statistics of its own"):
        LatentCodec(wan(), MEAN, MEAN)
    assert LatentCodec(ltx()).given_statistics == {}  # its buffers, over the scaling factor of 0.5
    assert LatentCodec(ltx()).std.tolist() == [2 * std for std in STD]
    for vae, own in ((wan(), True), (ltx(), True), (cogvideox(), False)):
        assert LatentCodec(vae).has_own_statistics == own
        assert encoder_channels(vae) == 4
    assert not codec.has_own_statistics  # the given ones are not the VAE's


@pytest.mark.parametrize("name", ["wan2.2", "ltx", "cogvideox", "hunyuan", "hunyuan1.5", "mochi"])
def test_opened_from_a_folder(name: str, tmp_path: Path) -> None:
    codec = codec_of(name)
    codec.vae.save_pretrained(tmp_path)
    opened = LatentCodec(open_vae(str(tmp_path)))
    assert opened.fingerprint() == codec.fingerprint()
    assert opened.config_fingerprint() == codec.config_fingerprint()


def test_fingerprint_sees_a_causal_encoder() -> None:
    fingerprints = []
    for causal in (True, False):
        torch.manual_seed(0)
        fingerprints.append(LatentCodec(ltx(encoder_causal=causal)).stored_fingerprint())
    assert fingerprints[0] != fingerprints[1]


def image_vae(name: str) -> ModelMixin:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    if name == "kl":
        return AutoencoderKL(**blocks, **widths).eval()
    return AutoencoderKLFlux2(**blocks, **widths, latent_channels=2, sample_size=16).eval()


@pytest.mark.parametrize("name", ["kl", "flux2"])
def test_image_vae_takes_clips_frame_by_frame(name: str) -> None:
    codec = LatentCodec(image_vae(name))
    frames = FRAMES_PER_CALL + 3
    assert (codec.temporal_stride, codec.is_video) == (1, False)
    assert codec.latent_size((frames, 8, 16)) == (frames, *codec.latent_size((8, 16)))
    assert codec.pixel_size((frames, 2, 4)) == (frames, *codec.pixel_size((2, 4)))

    calls: list[int] = []
    for part in (codec.vae.encoder, codec.vae.decoder):
        part.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    pixels = clips(2, 3, frames, 8, 16)
    stored = codec.encode(pixels)
    decoded = codec.decode(codec.normalize(stored))
    assert calls == [FRAMES_PER_CALL, 3] * 4  # of one clip after the other, in and out

    for t in range(frames):
        frame = codec.encode(pixels[:, :, t])
        torch.testing.assert_close(stored[:, :, t], frame)
        torch.testing.assert_close(decoded[:, :, t], codec.decode(codec.normalize(frame)), atol=1e-4, rtol=1e-4)
    assert torch.equal(codec.encode(pixels[1:]), stored[1:])  # the same bits in any batch
    for part, expected in zip(codec.encode_posterior(pixels), codec.encode_posterior(pixels[:, :, 2]), strict=True):
        torch.testing.assert_close(part[:, :, 2], expected)


def test_image_vae_refuses_clips_without_frames_and_other_ranks() -> None:
    codec = LatentCodec(image_vae("kl"))
    with pytest.raises(ValueError, match=r"frames = 1 \+ k \* 1, as AutoencoderKL takes them, got 0; nearest: 1"):
        codec.latent_size((0, 8, 8))
    with pytest.raises(ValueError, match=r"size \(H, W\), or \(T, H, W\) of a clip, as AutoencoderKL .* got \(8,\)"):
        codec.latent_size((8,))
