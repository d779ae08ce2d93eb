"""FlashDiT checkpoints: the golden tensors of the published implementation, the file formats, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_checkpoint
import sample
from iwin_dit import IwinDiTPipeline
from iwin_dit.convert import convert_flashdit, read_checkpoint, read_latent_stats
from iwin_dit.convert.flashdit import Sizes, rename
from iwin_dit.models.loading import load_strictly
from iwin_dit.nn import IwinDiTBlock
from tests.tools import relative_error, tiny_vae

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float64: 2e-7, torch.float32: 1e-5, torch.bfloat16: 5e-2}
WEIGHT_GRADIENT_TOLERANCE = {torch.float64: 2e-7, torch.float32: 2e-5}


def golden(name: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Parameters and the other tensors of a golden file, and its configuration."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    parameters = {k.removeprefix("params."): v for k, v in tensors.items() if k.startswith("params.")}
    return parameters, tensors, config


@pytest.fixture(scope="module")
def parameters() -> dict[str, torch.Tensor]:
    return golden("flashdit_model", torch.float32)[0]


def convert(parameters, **overrides):
    return convert_flashdit(
        parameters, **{"num_attention_heads": 4, "window_size": (4, 4), "sample_size": 8, **overrides}
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_block_matches_the_published_block(dtype):
    parameters, tensors, config = golden("flashdit_block", dtype)
    sizes = Sizes(48, 1, 4, 4, (1, 1), 10, 7, True, config["mlp_hidden"], (3, 3))
    block = IwinDiTBlock(48, 4, (4, 4), gate="one_plus", mlp_ratio=sizes.mlp_ratio(), qk_norm=False).to(dtype)
    names = rename({f"blocks.0.{name}": value for name, value in parameters.items()}, sizes)
    load_strictly(block, {name.removeprefix("blocks.0."): value for name, value in names.items()}, "golden block")
    x = tensors["inputs.x"].unflatten(1, (8, 8)).requires_grad_()
    c = tensors["inputs.c"].requires_grad_()

    y = block(x, c)

    assert relative_error(y.flatten(1, 2), tensors["outputs.y"]) < TOLERANCE[dtype]
    (y.flatten(1, 2) * tensors["inputs.r"]).sum().backward()
    assert relative_error(x.grad.flatten(1, 2), tensors["grads.x"]) < TOLERANCE[dtype]
    assert relative_error(c.grad, tensors["grads.c"]) < TOLERANCE[dtype]
    if dtype in WEIGHT_GRADIENT_TOLERANCE:
        gradients = {
            f"blocks.0.{k.removeprefix('grads.params.')}": v for k, v in tensors.items() if "grads.params" in k
        }
        scales = {name: gradients[name].abs().max() for name in gradients}
        expected = rename(gradients, sizes)
        for name, parameter in block.named_parameters():
            # Softmax ignores a key bias, its gradient is 0: q, k and v share the scale of their joint tensor.
            kind = name.rpartition(".")[2]
            scale = (
                scales[f"blocks.0.attn.qkv.{kind}"]
                if ".to_" in name and "out" not in name
                else parameter.grad.abs().max()
            )
            error = (parameter.grad - expected[f"blocks.0.{name}"]).abs().max() / scale
            assert error < WEIGHT_GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_model_is_minus_flashdit_in_reversed_time(dtype):
    parameters, tensors, _ = golden("flashdit_model", dtype)
    model = convert(parameters)
    with torch.no_grad():
        output = model(tensors["inputs.x"], 1000 * (1 - tensors["inputs.t"]), tensors["inputs.y"]).sample
    assert model.dtype == dtype
    assert relative_error(-output, tensors["outputs.v"]) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("time", "interval", "output"),
    [
        ("cfg.t", (0.0, 1.0), "cfg.out"),
        ("cfg.t_low", (0.0, 1.0), "cfg.out_low"),
        ("cfg.t_low", (0.0, 0.89), "cfg.out_low_interval"),
    ],
)
def test_guidance_on_three_channels_matches_the_published_sampler(time, interval, output):
    parameters, tensors, config = golden("flashdit_model", torch.float32)
    pipe = IwinDiTPipeline(convert(parameters), None, FlowMatchEulerDiscreteScheduler())
    half = tensors["cfg.x"][:2]
    prediction = pipe.predict(
        half, 1000 * (1 - tensors[time][0]), tensors["cfg.y"][:2], config["cfg_scale"], interval, config["cfg_channels"]
    )
    assert relative_error(-prediction, tensors[output][:2]) < TOLERANCE[torch.float32]


def test_six_vector_variant_shares_one_gate(parameters):
    """Version A: x + gate * (conv + attn), so its modulation is ours with the attention gate repeated, without 1 +."""
    six = {k: v[: 6 * 48] if "blocks" in k and "adaLN" in k else v for k, v in parameters.items()}
    model = convert(six)
    assert model.config.gate == "zero"
    weight = model.blocks[0].modulation.linear.weight.unflatten(0, (7, 48))
    assert torch.equal(weight[2], weight[6])
    assert torch.equal(weight[:6].flatten(0, 1), six["blocks.0.adaLN_modulation.1.weight"])


def test_five_vector_variant_has_no_shifts(parameters):
    five = {k: v[: 5 * 48] if "blocks" in k and "adaLN" in k else v for k, v in parameters.items()}
    weight = convert(five).blocks[0].modulation.linear.weight.unflatten(0, (7, 48))
    assert not weight[0].any() and not weight[3].any()
    assert torch.equal(weight[[1, 2, 4, 5, 6]].flatten(0, 1), five["blocks.0.adaLN_modulation.1.weight"])


def test_hidden_widths_of_the_published_sizes():
    for width, hidden in ((768, 2048), (1024, 2730), (1152, 3072), (1536, 4096), (1792, 4778)):
        sizes = Sizes(width, 1, 4, 4, (1, 1), 10, 7, True, hidden, (3, 3))
        assert sizes.mlp_ratio() == 4.0
        assert int(2 / 3 * int(4.0 * width)) == hidden


def test_reading_prefers_ema_and_strips_module(parameters, tmp_path):
    other = {k: v + 1 for k, v in parameters.items()}
    torch.save({"model": {f"module.{k}": v for k, v in other.items()}, "ema": parameters}, tmp_path / "a.pt")
    torch.save({"model": {f"module.{k}": v for k, v in parameters.items()}, "opt": {}}, tmp_path / "b.pt")
    save_file(parameters, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.pt", "c.safetensors"):
        tensors = read_checkpoint(tmp_path / name)
        assert tensors.keys() == parameters.keys()
        assert all(torch.equal(tensors[k], parameters[k]) for k in parameters)


def test_malicious_pickle_is_refused_unexecuted(tmp_path):
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"ema": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="safetensors"):
        read_checkpoint(tmp_path / "bad.pt")
    assert not marker.exists()


def test_every_difference_is_listed(parameters):
    broken = dict(parameters)
    broken["extra.weight"] = torch.zeros(3)
    del broken["blocks.1.mlp.w12.bias"]
    broken["blocks.2.norm1.weight"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:
        convert(broken)
    for part in (
        "unexpected: extra.weight (3,)",
        "missing: blocks.1.mlp.proj_in.bias",
        "blocks.2.norm1.weight: expected (48,), got (7,)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("x_embedder.proj.weight"), "missing: x_embedder.proj.weight"),
        (
            lambda p: p.update({"blocks.0.adaLN_modulation.1.weight": torch.zeros(8 * 48, 48)}),
            "must have 336, 288, 240 rows",
        ),
    ],
)
def test_unknown_architectures_are_refused(parameters, change, message):
    broken = dict(parameters)
    change(broken)
    with pytest.raises(ValueError, match=message):
        convert(broken)


def test_heads_that_do_not_divide(parameters):
    with pytest.raises(ValueError, match="must divide the width 48, got 5"):
        convert(parameters, num_attention_heads=5)


def test_latent_statistics_from_both_formats(tmp_path):
    torch.save(
        {"mean": torch.full((1, 2, 1, 1), 0.5), "std": torch.full((1, 2, 1, 1), 2.0)}, tmp_path / "latents_stats.pt"
    )
    (tmp_path / "stats.json").write_text('{"latents_mean": [0.5, 0.5], "latents_std": [2, 2]}')
    for name in ("latents_stats.pt", "stats.json"):
        assert read_latent_stats(tmp_path / name) == ([0.5, 0.5], [2.0, 2.0])
    (tmp_path / "stats.json").write_text('{"latents_mean": [0.5, 0.5]}')
    with pytest.raises(ValueError, match="latents_std"):
        read_latent_stats(tmp_path / "stats.json")


# --- the script


def write_checkpoint(parameters, folder: Path) -> list[str]:
    torch.save({"ema": parameters}, folder / "flashdit.pt")
    sizes = ["--num-attention-heads", "4", "--window-size", "4", "4", "--sample-size", "8"]
    return ["flashdit", str(folder / "flashdit.pt"), "--out", str(folder / "out"), *sizes]


def test_script_without_vae(parameters, tmp_path, capsys):
    convert_checkpoint.main(write_checkpoint(parameters, tmp_path))
    assert "the pipeline gives latents only" in capsys.readouterr().out
    pipe = IwinDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.shift == pytest.approx(1 / 0.3)
    assert pipe(3, num_inference_steps=2).images.shape == (1, 4, 8, 8)
    with pytest.raises(SystemExit, match="must be a new or empty folder"):
        convert_checkpoint.main(write_checkpoint(parameters, tmp_path))
    with pytest.raises(SystemExit, match="has no VAE"):
        sample.main(["--model", str(tmp_path / "out"), "--out", str(tmp_path / "images")])


def test_script_with_vae_and_statistics(parameters, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "stats.json").write_text('{"latents_mean": [0.5, 0, 0, 0], "latents_std": [2, 1, 1, 1]}')
    arguments = [*write_checkpoint(parameters, tmp_path), "--vae", str(tmp_path / "vae")]
    with pytest.raises(SystemExit, match="give --latent-stats"):
        convert_checkpoint.main(arguments)
    convert_checkpoint.main([*arguments, "--latent-stats", str(tmp_path / "stats.json")])
    pipe = IwinDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.vae.config.latents_mean == [0.5, 0, 0, 0]
    assert pipe.codec.std.tolist() == [2, 1, 1, 1]  # no scaling factor besides
    sample.main(
        [
            "--model",
            str(tmp_path / "out"),
            "--classes",
            "3",
            "--seeds",
            "0-1",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "images"),
        ]
    )
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["class-003-seed-000000.png", "class-003-seed-000001.png", "grid.png"]
    with Image.open(tmp_path / "images" / names[0]) as image:
        about = json.loads(image.text["iwin-dit"])
    assert (about["height"], about["width"], about["scheduler"]["class"]) == (16, 16, "FlowMatchEulerDiscreteScheduler")


def test_script_with_a_vae_that_does_not_exist(parameters, tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        convert_checkpoint.main([*write_checkpoint(parameters, tmp_path), "--vae", str(tmp_path / "nowhere")])


def test_damaged_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "a.safetensors")
