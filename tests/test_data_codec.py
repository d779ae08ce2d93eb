"""The latent codec on tiny, randomly initialised VAEs of every image class it names."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, ModelMixin

from iwin_dit.data.codec import LatentCodec

MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 3.0]


def kl(**config: object) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **config,
    )


def dc(**config: object) -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        **config,
    )


def tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def flux2() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 8))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 8))
    return vae


# factory, channels, stride, and what the codec must read: mean and standard deviation of the first channel
VAES: dict[str, tuple[Callable[[], ModelMixin], int, int, float, float]] = {
    "kl-scale": (kl, 4, 2, 0.0, 1 / 0.18215),
    "kl-shift": (lambda: kl(scaling_factor=0.5, shift_factor=0.1), 4, 2, 0.1, 2.0),
    "kl-statistics": (lambda: kl(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD), 4, 2, 0.5, 4.0),
    "dc": (lambda: dc(scaling_factor=0.25), 4, 4, 0.0, 4.0),
    "tiny": (tiny, 4, 2, 0.0, 1.0),
    "flux2": (flux2, 8, 4, -1.0, 0.5001**0.5),
}


@pytest.mark.parametrize("name", VAES)
def test_round_trip(name: str) -> None:
    factory, channels, stride, mean, std = VAES[name]
    torch.manual_seed(0)
    vae = factory().eval()
    codec = LatentCodec(vae)
    assert (codec.latent_channels, codec.stride) == (channels, stride)
    assert codec.mean[0].item() == pytest.approx(mean)
    assert codec.std[0].item() == pytest.approx(std)

    stored = codec.encode(torch.rand(2, 3, 8, 16) * 2 - 1)
    assert stored.shape == (2, channels, 8 // stride, 16 // stride)
    assert codec.latent_size((8, 16)) == stored.shape[2:]
    assert codec.pixel_size(stored.shape[2:]) == (8, 16)
    model = codec.normalize(stored)
    torch.testing.assert_close(model[:, 0], (stored[:, 0] - mean) / std)
    torch.testing.assert_close(codec.denormalize(model), stored, atol=1e-6, rtol=1e-6)

    with torch.no_grad():  # the codec's decode equals the VAE's own, on the VAE's own latents
        own = torch.nn.functional.pixel_shuffle(stored, 2) if name == "flux2" else stored
        torch.testing.assert_close(codec.decode(model), vae.decode(own).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["kl-scale", "flux2"])
def test_posterior(name: str) -> None:
    torch.manual_seed(0)
    vae = VAES[name][0]().eval()
    codec = LatentCodec(vae)
    pixels = torch.rand(2, 3, 8, 16) * 2 - 1
    mean, std = codec.encode_posterior(pixels)
    assert torch.equal(mean, codec.encode(pixels))
    with torch.no_grad():
        own = vae.encode(pixels).latent_dist.std
    assert torch.equal(std, torch.nn.functional.pixel_unshuffle(own, 2) if name == "flux2" else own)


def test_vae_without_a_posterior() -> None:
    with pytest.raises(ValueError, match=r"AutoencoderTiny has no posterior to sample from; set data.posterior: mean"):
        LatentCodec(tiny()).encode_posterior(torch.zeros(1, 3, 8, 8))


def test_given_statistics() -> None:
    codec = LatentCodec(dc(scaling_factor=0.25), MEAN, STD)
    assert codec.mean.tolist() == MEAN
    assert codec.std.tolist() == STD  # the scaling factor does not apply on top
    assert LatentCodec(kl(scaling_factor=1.0, latents_mean=MEAN, latents_std=STD), MEAN, STD).std.tolist() == STD
    assert codec.given_statistics == {"latents_mean": MEAN, "latents_std": STD}  # what builds the same one again
    assert LatentCodec(dc(scaling_factor=0.25)).given_statistics == {}
    with pytest.raises(ValueError, match="keep one"):
        LatentCodec(kl(scaling_factor=1.0, latents_mean=MEAN, latents_std=STD), MEAN, MEAN)
    with pytest.raises(ValueError, match="together"):
        LatentCodec(tiny(), latents_mean=MEAN)
    with pytest.raises(ValueError, match="4 channels"):
        LatentCodec(tiny(), MEAN[:3], STD[:3])
    with pytest.raises(ValueError, match="above 0"):
        LatentCodec(tiny(), MEAN, [1.0, 0.0, 1.0, 1.0])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="AutoencoderKL keeps no latent statistics"):
        LatentCodec(kl(scaling_factor=None))
    codec = LatentCodec(tiny())
    with pytest.raises(ValueError, match=r"height = k \* 2, as AutoencoderTiny takes them, got 7; nearest: 6 and 8"):
        codec.encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match=r"got \(1, 4, 8, 8\)"):
        codec.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"expected latents \(B, 4, h, w\) or .*, got \(1, 3, 2, 2\)"):
        codec.decode(torch.zeros(1, 3, 2, 2))
    latents = torch.zeros(3, 4, 2, 2)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"samples \[1\] of 3"):
        codec.decode(latents)


def test_fingerprint_sees_weights_and_statistics(tmp_path: object) -> None:
    vae = kl()
    vae.save_pretrained(tmp_path)
    fingerprint = LatentCodec(vae).fingerprint()
    assert LatentCodec(AutoencoderKL.from_pretrained(tmp_path)).fingerprint() == fingerprint
    assert LatentCodec(vae, MEAN, STD).fingerprint() != fingerprint
    assert LatentCodec(vae, MEAN, STD).stored_fingerprint() == LatentCodec(vae).stored_fingerprint()
    stored = LatentCodec(vae).stored_fingerprint()
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1
    assert LatentCodec(vae).fingerprint() != fingerprint
    assert LatentCodec(vae).stored_fingerprint() != stored


def test_config_fingerprint_forgets_where_the_vae_came_from(tmp_path: object) -> None:
    vae = kl()
    vae.save_pretrained(tmp_path)
    fingerprint = LatentCodec(vae).config_fingerprint()
    assert LatentCodec(AutoencoderKL.from_pretrained(tmp_path)).config_fingerprint() == fingerprint
    assert LatentCodec(kl(scaling_factor=0.5)).config_fingerprint() != fingerprint
