"""The image pipeline: what it loads and saves, what it accepts, seeds, guidance, schedulers, callbacks."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    AutoModel,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from iwin_dit import IwinDiTPipeline
from iwin_dit.diffusion import DDPM
from iwin_dit.files import sha256
from iwin_dit.pipelines import identify, load_pipeline
from iwin_dit.training.checkpoint import CheckpointWriter
from iwin_dit.training.pictures import export
from iwin_dit.training.state import Snapshot
from tests.tools import relative_error, tiny_model, tiny_vae

NAMES = {0: "zero, nought", 1: "crane", 2: "crane", **{i: f"name {i}" for i in range(3, 10)}}


def tiny_pipeline(scheduler=None, vae=True, **model) -> IwinDiTPipeline:
    vae = tiny_vae(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 1.0, 0.5]) if vae else None
    pipe = IwinDiTPipeline(tiny_model(**model), vae, scheduler or FlowMatchEulerDiscreteScheduler(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> IwinDiTPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "pipeline"
    pipe.save_pretrained(path)
    return path


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def draw(pipe, labels=(3, 7), numbers=(0, 1), **arguments):
    arguments = {"num_inference_steps": 4, "output_type": "latent", **arguments}
    return pipe(list(labels), generator=seeds(*numbers), **arguments).images


# --- saving and loading


def test_the_folder_holds_the_data_contract(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "IwinDiTPipeline"
    assert index["transformer"] == ["iwin_dit", "IwinDiTTransformer2DModel"]
    assert index["id2label"]["3"] == "name 3"
    assert json.loads((folder / "transformer" / "config.json").read_text())["num_classes"] == 10  # the null class
    assert json.loads((folder / "vae" / "config.json").read_text())["latents_std"] == [1.0, 2.0, 1.0, 0.5]
    assert not list(folder.rglob("*.bin"))


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: IwinDiTPipeline.from_pretrained(folder),
        lambda folder: DiffusionPipeline.from_pretrained(folder),
        lambda folder: IwinDiTPipeline.from_pretrained(folder, transformer=tiny_model()),
        lambda folder: IwinDiTPipeline.from_pretrained(folder, local_files_only=True, device_map="cpu"),
        load_pipeline,
        lambda folder: load_pipeline(folder.parent),
        lambda folder: load_pipeline(str(folder)),
    ],
)
def test_every_way_of_loading(pipe, folder, load):
    loaded = load(folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is IwinDiTPipeline
    assert loaded.id2label == NAMES
    assert torch.equal(draw(loaded), draw(pipe))


def test_the_model_alone(folder):
    assert type(AutoModel.from_pretrained(str(folder), subfolder="transformer")) is type(tiny_model())


@pytest.mark.parametrize("cls", [IwinDiTPipeline, DiffusionPipeline])
def test_a_hub_id(pipe, folder, tmp_path, cls):
    """From the Hub's own cache, laid out by hand: the id is resolved as online, only nothing is fetched."""
    repository, commit = tmp_path / "models--user--repo", "a" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = cls.from_pretrained("user/repo", cache_dir=tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is IwinDiTPipeline
    assert torch.equal(draw(loaded), draw(pipe))


@pytest.fixture
def checkpoint(folder, tmp_path) -> Path:
    """Of step 5 of a run, which exported its pipeline at step 3."""
    model = tiny_model()
    averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: tensor * 1.1 for name, tensor in averaged.items()}
    root = tmp_path / "run" / "checkpoints"
    CheckpointWriter(root, keep_last=1, asynchronous=False).save(Snapshot(trained, averaged, {}, {"step": 5}))
    other = tiny_pipeline()
    torch.nn.init.constant_(other.transformer.final_layer.linear.bias, 1.0)
    export(other, tmp_path / "run" / "pipeline", 3)
    return root / "step-00000005"


def test_a_checkpoint_gives_its_weights_to_the_pipeline_of_its_run(pipe, checkpoint, monkeypatch):
    loaded, raw, exported = (
        load_pipeline(checkpoint),
        load_pipeline(str(checkpoint), dtype=torch.bfloat16, weights="raw"),
        load_pipeline(checkpoint.parents[1]),
    )
    for ours in (loaded, raw, exported):
        ours.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipe))
    assert raw.transformer.dtype == torch.bfloat16
    weight = pipe.transformer.final_layer.linear.weight
    assert torch.equal(raw.transformer.final_layer.linear.weight, (weight * 1.1).bfloat16())
    assert not torch.equal(draw(exported), draw(pipe))
    monkeypatch.chdir(checkpoint)
    assert torch.equal(load_pipeline(".").transformer.final_layer.linear.weight, weight)


def test_what_identifies_a_pipeline(folder, checkpoint):
    run, vae = checkpoint.parents[1], "vae/diffusion_pytorch_model.safetensors"
    transformer = "transformer/diffusion_pytorch_model.safetensors"
    ema, raw, exported, stored = (
        identify(checkpoint),
        identify(checkpoint, "raw"),
        identify(run),
        identify(str(folder)),
    )
    assert (ema["path"], ema["weights"], ema["step"], ema["revision"]) == (str(checkpoint), "ema", 5, None)
    assert ema["weights_sha256"] == {
        vae: sha256(run / "pipeline" / vae),
        "ema.safetensors": sha256(checkpoint / "ema.safetensors"),
    }
    assert (raw["weights"], list(raw["weights_sha256"])) == ("raw", [vae, "model.safetensors"])
    assert (exported["weights"], exported["step"]) == ("ema", 3)
    assert (stored["weights"], stored["step"]) == ("as stored", None)
    assert stored["weights_sha256"] == {name: sha256(folder / name) for name in (transformer, vae)}
    json.dumps(ema)


def test_a_hub_id_is_identified_by_its_snapshot(folder, tmp_path, monkeypatch):
    commit = "b" * 40
    shutil.copytree(folder, tmp_path / "models--user--repo" / "snapshots" / commit)
    (tmp_path / "models--user--repo" / "refs").mkdir()
    (tmp_path / "models--user--repo" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert identify("user/repo") == identify(folder) | {"path": "user/repo", "revision": commit}
    assert type(load_pipeline("user/repo")) is IwinDiTPipeline


def test_a_checkpoint_that_cannot_be_loaded(folder, checkpoint):
    run, manifest = checkpoint.parents[1], checkpoint / "checkpoint.json"
    for path in (run, folder, "user/repo"):
        with pytest.raises(ValueError, match="weights 'raw' are those of a checkpoint such as runs/"):
            load_pipeline(path, weights="raw")
    with pytest.raises(ValueError, match="weights must be one of ema, raw, got 'mean'"):
        identify(checkpoint, "mean")
    (run / "pipeline").rename(run / "elsewhere")
    with pytest.raises(ValueError, match=r"has weights alone: expected the rest .* Training writes it with each"):
        load_pipeline(checkpoint)
    tiny_pipeline(num_layers=1).save_pretrained(run / "pipeline")
    with pytest.raises(ValueError, match=r"ema\.safetensors does not fit the model:\n  unexpected: blocks\.1"):
        load_pipeline(checkpoint)
    content = bytearray((checkpoint / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "ema.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: ema\.safetensors: expected sha256 \w+, got sha256 "):
        load_pipeline(checkpoint)
    (checkpoint / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ema\.safetensors: expected sha256 \w+, got no file"):
        identify(checkpoint)
    for text in ("{torn", "[]", "{}"):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
            load_pipeline(checkpoint)


def test_loading_in_bfloat16(pipe, folder):
    half = IwinDiTPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    images = draw(half, output_type="np")
    assert np.abs(images - draw(pipe, output_type="np")).mean() < 0.05


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "runs/digitz"])
def test_loading_from_nowhere(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as without a network, at once
    with pytest.raises(ValueError, match="expected a run folder"):
        load_pipeline(name)


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match="expected a run folder"):
        load_pipeline(tmp_path)


def test_statistics_for_a_vae_without_fields(tmp_path):
    """They are kept in model_index.json, and the codec reads them there."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    mean, std = [0.5, 0.0, 0.0, 0.0], [2.0, 1.0, 1.0, 1.0]
    pipe = IwinDiTPipeline(tiny_model(), vae, FlowMatchEulerDiscreteScheduler(), latents_mean=mean, latents_std=std)
    pipe.save_pretrained(tmp_path)
    loaded = IwinDiTPipeline.from_pretrained(tmp_path)
    assert loaded.codec.mean.tolist() == mean
    assert loaded.codec.std.tolist() == std


# --- output


def test_output_types(pipe):
    pil = draw(pipe, output_type="pil")
    array = draw(pipe, output_type="np")
    tensor = draw(pipe, output_type="pt")
    assert [image.size for image in pil] == [(16, 16)] * 2
    assert array.shape == (2, 16, 16, 3)
    assert tensor.shape == (2, 3, 16, 16)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())


def test_latents_decode_to_the_same_image(pipe):
    decoded = pipe.codec.decode(draw(pipe))
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), draw(pipe, output_type="pt"))


def test_tuple_and_default_type(pipe):
    (images,) = pipe(3, num_inference_steps=1, return_dict=False)
    assert images[0].size == (16, 16)


def test_other_sizes(pipe):
    assert draw(pipe, height=12, width=28).shape == (2, 4, 6, 14)


def test_given_noise_is_the_start(pipe):
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in seeds(0, 1)])
    images = pipe([3, 7], latents=noise, num_inference_steps=4, output_type="latent").images
    assert torch.equal(images, draw(pipe))


def test_without_vae_latents_only(tmp_path, caplog):
    pipe = tiny_pipeline(vae=False)
    pipe.save_pretrained(tmp_path)
    pipe = IwinDiTPipeline.from_pretrained(tmp_path)
    assert pipe.vae is None
    assert pipe(3, num_inference_steps=1).images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="has no VAE, so output_type must be 'latent', got 'pil'"):
        pipe(3, num_inference_steps=1, output_type="pil")


# --- labels


@pytest.mark.parametrize(
    ("labels", "indices"),
    [
        (3, [3]),
        ("name 4", [4]),
        (["name 4", 5], [4, 5]),
        ("nought", [0]),
        ("zero, nought", [0]),
        (torch.tensor([1, 2]), [1, 2]),
        (np.int64(3), [3]),
    ],
)
def test_labels(pipe, labels, indices):
    assert pipe.get_label_ids(labels) == indices


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (10, r"class labels must be in \[0, 9\], got 10"),
        (-1, r"class labels must be in \[0, 9\], got -1"),
        ("dog", "unknown class name 'dog'; the model's names begin with: 'zero, nought', 'crane'"),
        ("crane", r"class name 'crane' stands for classes \[1, 2\]: give the index"),
        ([], "class_labels is empty"),
        (3.7, "class_labels must be a class index, a class name or a list of them, got 3.7"),
        (torch.tensor([[1, 2]]), "class_labels must be a class index"),
    ],
)
def test_mistaken_labels(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels, num_inference_steps=1)


def test_images_per_label(pipe):
    images = pipe(
        [3, 7], num_images_per_label=2, generator=seeds(0, 1, 2, 3), num_inference_steps=4, output_type="latent"
    )
    assert torch.equal(images.images, draw(pipe, (3, 3, 7, 7), (0, 1, 2, 3)))


# --- an image depends on its own generator alone


def test_same_noise_in_any_batch(pipe):
    one = pipe.prepare_latents(1, (16, 16), seeds(5), None)
    many = pipe.prepare_latents(3, (16, 16), seeds(1, 5, 2), None)
    assert torch.equal(one[0], many[1])
    assert one.dtype == torch.float32


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler(clip_sample=False)])
def test_same_image_in_any_batch(scheduler):
    """Also with a scheduler that draws noise at every step."""
    pipe = tiny_pipeline(scheduler)
    alone = draw(pipe, (7,), (5,), output_type="pt")
    among = draw(pipe, (1, 7, 3), (1, 5, 2), output_type="pt")
    assert (alone[0] - among[1]).abs().max() < 1e-4


def test_as_many_generators_as_images(pipe):
    with pytest.raises(ValueError, match=r"one generator per image \(2\), got 3"):
        pipe([1, 2], generator=seeds(0, 1, 2))


# --- guidance


def calls(pipe, **arguments):
    """Batch sizes of the transformer's calls."""
    sizes = []
    hook = pipe.transformer.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    draw(pipe, **arguments)
    hook.remove()
    return sizes


def test_the_unconditional_half_is_skipped_where_guidance_is_off(pipe):
    assert calls(pipe, guidance_scale=1.0) == [2, 2, 2, 2]
    assert calls(pipe, guidance_scale=3.0) == [4, 4, 4, 4]
    # Four even steps stand at noise levels 1, 0.75, 0.5, 0.25; both ends of the interval count.
    assert calls(pipe, guidance_interval=(0.5, 0.75)) == [2, 4, 4, 2]
    assert calls(pipe, guidance_interval=(0.0, 0.89)) == [2, 4, 4, 4]


def test_guidance_is_linear_in_the_two_predictions(pipe):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500.0)
    y, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    cond, uncond = pipe.predict(x, t, y), pipe.predict(x, t, null)
    torch.testing.assert_close(pipe.predict(x, t, y, 3.0), uncond + 3 * (cond - uncond))
    first = pipe.predict(x, t, y, 3.0, guidance_channels=1)
    torch.testing.assert_close(first[:, :1], (uncond + 3 * (cond - uncond))[:, :1])
    torch.testing.assert_close(first[:, 1:], cond[:, 1:])


# --- schedulers

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


class GaussianData(torch.nn.Module):
    """The exact denoiser of data N(mean, std^2): every sampler must turn noise into that Gaussian."""

    mean, std = 0.5, 0.3

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.dtype, self.device, self.patch_size = kind, torch.float32, torch.device("cpu"), (1, 1)
        self.config, self.latent_size = SimpleNamespace(in_channels=4, num_classes=10), (8, 8)
        self.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).float()

    def forward(self, x, timestep, class_labels, attention_kwargs=None, return_dict=False):
        timestep = torch.as_tensor(timestep, dtype=torch.float32)
        if self.kind == "flow":
            signal, noise = 1 - timestep / 1000, timestep / 1000
        else:
            position = timestep.clamp(0, 999)  # Euler asks between the integers
            low, high = self.alphas_cumprod[position.floor().long()], self.alphas_cumprod[position.ceil().long()]
            alpha = torch.lerp(low, high, position.frac())
            signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        residual = (x - signal * self.mean) / ((signal * self.std) ** 2 + noise**2)
        data, epsilon = self.mean + signal * self.std**2 * residual, noise * residual  # posterior means
        return (epsilon - data if self.kind == "flow" else epsilon,)


@pytest.mark.parametrize(
    ("kind", "scheduler", "steps"),
    [
        ("flow", FlowMatchEulerDiscreteScheduler(shift=3.0), 100),
        ("flow", FlowMatchHeunDiscreteScheduler(), 30),
        ("flow", DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0), 100),
        ("flow", UniPCMultistepScheduler(**FLOW, flow_shift=3.0), 100),
        ("flow", DEISMultistepScheduler(**FLOW, flow_shift=3.0), 100),
        ("ddpm", DDPMScheduler(clip_sample=False), 1000),
        ("ddpm", DDIMScheduler(clip_sample=False), 200),
        ("ddpm", EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"), 100),
        ("ddpm", DPMSolverMultistepScheduler(), 100),
        ("ddpm", UniPCMultistepScheduler(), 100),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "step") else value,
)
def test_every_scheduler_samples_an_exact_gaussian(kind, scheduler, steps):
    """Sign, time and scale conventions at once: 4,096 samples of the analytic model have its mean and deviation."""
    pipe = tiny_pipeline(scheduler, vae=False)
    pipe.transformer = GaussianData(kind)
    generator = torch.Generator().manual_seed(0)
    x = pipe([0] * 16, num_inference_steps=steps, guidance_scale=1.0, generator=generator, output_type="latent").images
    assert x.mean().item() == pytest.approx(GaussianData.mean, abs=0.03)
    assert x.std().item() == pytest.approx(GaussianData.std, rel=0.06)


@pytest.mark.parametrize("other", [UniPCMultistepScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_a_scheduler_of_the_other_family_is_noticed(folder, other):
    """`from_config` alone would give noise without a word; the recipe in the message works."""
    pipe = IwinDiTPipeline.from_pretrained(folder)
    config = pipe.scheduler.config
    pipe.scheduler = other.from_config(config)
    with pytest.raises(ValueError, match="the model predicts 'flow_prediction', but"):
        draw(pipe)
    if other is not DDIMScheduler:
        pipe.scheduler = other.from_config(config, **FLOW, flow_shift=config.shift)
        assert draw(pipe).isfinite().all()
    ddpm = tiny_pipeline(DDPMScheduler())
    ddpm.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="the model predicts 'epsilon', but"):
        draw(ddpm)


def test_flow_matching_follows_its_equation(pipe):
    """x moves by (next sigma - sigma) * v from noise at 1 to data at 0, on even sigmas."""
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in seeds(0, 1)])
    for sigma in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * pipe.predict(x, torch.tensor(1000 * sigma), torch.tensor([3, 7]), 3.0)
    torch.testing.assert_close(draw(pipe), x)


def test_the_shift_is_applied_once():
    shift = 1 / 0.3
    pipe = tiny_pipeline(FlowMatchEulerDiscreteScheduler(shift=shift))
    even = np.linspace(1, 0, 11)[:-1]
    expected = 1000 * shift * even / (1 + (shift - 1) * even)
    np.testing.assert_allclose(pipe.set_timesteps(10, None).numpy(), expected, rtol=1e-5)


def test_custom_sigmas(pipe):
    sigmas = [1.0, 0.6, 0.1]
    assert pipe.set_timesteps(50, sigmas).tolist() == pytest.approx([1000, 600, 100])
    assert draw(tiny_pipeline(UniPCMultistepScheduler(**FLOW)), sigmas=sigmas).isfinite().all()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler takes no custom sigmas"):
        draw(tiny_pipeline(EulerDiscreteScheduler()), sigmas=sigmas)
    assert draw(pipe, sigmas=sigmas).isfinite().all()
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler takes no custom sigmas"):
        draw(tiny_pipeline(FlowMatchHeunDiscreteScheduler()), sigmas=sigmas)


def test_learned_variance():
    """A model with twice the channels: DDPM with a learned range uses them all, any other scheduler the first half."""
    learned = DDPM(learned_variance=True).scheduler()
    schedulers = [learned, *(s.from_config(learned.config) for s in (DDIMScheduler, UniPCMultistepScheduler))]
    for scheduler in schedulers:
        images = draw(tiny_pipeline(scheduler, out_channels=8))
        assert images.shape == (2, 4, 8, 8)
        assert images.isfinite().all()


# --- callbacks, interruption, LoRA, failures


def test_callback_sees_and_replaces_latents(pipe):
    seen = []

    def zero_at_the_end(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), pipe.num_timesteps, float(pipe.current_timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    images = draw(pipe, callback_on_step_end=zero_at_the_end)
    assert seen == [(0, 1000, 4, 1000), (1, 750, 4, 750), (2, 500, 4, 500), (3, 250, 4, 250)]
    assert not images.any()
    assert pipe.current_timestep is None


def test_callback_interrupts(pipe):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    draw(pipe, callback_on_step_end=stop)
    assert steps == [0, 1]
    assert draw(pipe).isfinite().all()  # the next call starts afresh


def test_callback_changes_guidance(pipe):
    def cut(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {}

    assert calls(pipe, callback_on_step_end=cut) == [4, 2, 2, 2]


def test_lora_weights(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    plain = draw(pipe)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out"], init_lora_weights=False)
    )
    adapted = draw(pipe)
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    IwinDiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    other = tiny_pipeline()
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(other), adapted)
    assert not torch.allclose(draw(other, attention_kwargs={"scale": 0.5}), adapted)
    other.unload_lora_weights()
    torch.testing.assert_close(draw(other), plain)


def test_nan_of_the_vae_is_an_error_too():
    pipe = tiny_pipeline()
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="the VAE gave pixels that are not finite"):
        draw(pipe, output_type="pil")


def test_another_vae_is_used_from_then_on():
    pipe = tiny_pipeline()
    before = draw(pipe, output_type="pt")
    torch.manual_seed(5)
    pipe.vae = type(pipe.vae).from_config(pipe.vae.config)
    assert not torch.equal(draw(pipe, output_type="pt"), before)


def test_a_vae_that_does_not_fit_the_transformer():
    with pytest.raises(ValueError, match="the VAE has 4 latent channels, the transformer takes 8"):
        tiny_pipeline(in_channels=8)


def test_from_pipe(pipe):
    other = IwinDiTPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other), draw(pipe))


def test_nan_is_an_error_not_a_black_picture():
    pipe = tiny_pipeline()
    torch.nn.init.constant_(pipe.transformer.final_layer.linear.bias, float("nan"))
    for output_type in ("pil", "latent"):
        with pytest.raises(FloatingPointError, match="latents are not finite"):
            draw(pipe, output_type=output_type)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "height must be a positive multiple of 2"),
        ({"num_images_per_label": 0}, "num_images_per_label must be at least 1, got 0"),
        ({"sigmas": []}, "sigmas must be noise levels that fall"),
        ({"sigmas": [0.1, 0.6]}, "sigmas must be noise levels that fall"),
        ({"height": 15}, r"height must be a positive multiple of 2 \(VAE stride 2 \* patch_size 1\), got 15"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps must be a whole number, got 2\.5"),
        ({"height": 16.0}, r"height must be a whole number, got 16\.0"),
        ({"num_images_per_label": True}, "num_images_per_label must be a whole number, got True"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1, and 1 turns guidance off, got 0.5"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval must be"),
        ({"guidance_channels": 5}, r"guidance_channels must be None \(all\) or 1 to 4, got 5"),
        ({"output_type": "png"}, "output_type must be one of"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must have shape \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "must be among"),
    ],
)
def test_mistakes(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)


def test_a_model_without_a_trained_null_class_is_not_guided(pipe):
    """Its default is 1, and the pictures are those of 1; another model's default is 3."""
    plain = tiny_pipeline(class_dropout_prob=0.0)
    assert (plain.default_guidance_scale, pipe.default_guidance_scale) == (1.0, 3.0)
    assert torch.equal(draw(plain), draw(plain, guidance_scale=1.0))
    assert torch.equal(draw(pipe), draw(pipe, guidance_scale=3.0))
    with pytest.raises(
        ValueError, match=r"guidance_scale must be 1 for this model, .*class_dropout_prob 0.*; got 1\.5"
    ):
        draw(plain, guidance_scale=1.5)


def test_counts_may_be_numpys(pipe):
    two = np.int64(2)
    assert torch.equal(
        draw(pipe, num_inference_steps=two, height=8 * two), draw(pipe, num_inference_steps=2, height=16)
    )


def test_bfloat16_transformer_under_a_float32_loop(pipe):
    """The loop accumulates in float32 whatever the model computes in."""
    half = tiny_pipeline()
    half.transformer.to(torch.bfloat16)
    assert draw(half).dtype == torch.float32
    assert relative_error(draw(half, guidance_scale=1.0), draw(pipe, guidance_scale=1.0)) < 0.2
