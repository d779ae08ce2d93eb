"""The video pipeline: loading and saving, sizes in time, output, seeds, frames per second; grids and files of clips."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image, ImageSequence

from iwin_dit import IwinDiTPipeline, IwinDiTVideoPipeline
from iwin_dit.files import sha256
from iwin_dit.pipelines import identify, load_pipeline
from iwin_dit.pipelines.pictures import check_grid, clip_grid, grid_size, image_grid, save_frames, save_gif
from iwin_dit.training.checkpoint import CheckpointWriter
from iwin_dit.training.state import Snapshot
from tests.tools import all_frames, tiny_model, tiny_vae, tiny_video_model

NAMES = {i: f"name {i}" for i in range(10)}


def tiny_video_vae() -> AutoencoderKLWan:
    """A random video VAE of stride 2 in space and in time: 1 + 2 k frames are 1 + k latent ones."""
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 1.0, 0.5],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    ).eval()


def tiny_pipeline(vae="image", scheduler=None, fps=8.0, **model) -> IwinDiTVideoPipeline:
    """For clips of 16 x 16, with an image VAE of stride 2, a video VAE, or none."""
    vae = {"image": tiny_vae, "video": tiny_video_vae, None: lambda: None}[vae]()
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    model = tiny_video_model(**{"sample_size": (4, 8, 8), **model})
    pipe = IwinDiTVideoPipeline(model, vae, scheduler, id2label=NAMES, fps=fps)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> IwinDiTVideoPipeline:
    return tiny_pipeline(fps=7.5)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "pipeline"
    pipe.save_pretrained(path)
    return path


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def draw(pipe, labels=(3, 7), numbers=(0, 1), **arguments):
    arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments}
    return pipe(list(labels), generator=seeds(*numbers), **arguments).frames


# --- saving and loading


def test_the_folder_holds_the_data_contract(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "IwinDiTVideoPipeline"
    assert index["transformer"] == ["iwin_dit", "IwinDiTTransformer3DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert (index["id2label"]["3"], index["fps"], index["prediction_type"]) == ("name 3", 7.5, "flow_prediction")


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: IwinDiTVideoPipeline.from_pretrained(folder),
        lambda folder: DiffusionPipeline.from_pretrained(folder),
        lambda folder: IwinDiTVideoPipeline.from_pretrained(folder, transformer=tiny_pipeline(None).transformer),
        load_pipeline,
        lambda folder: load_pipeline(folder.parent),
        lambda folder: IwinDiTVideoPipeline.from_pipe(load_pipeline(folder)),
    ],
)
def test_every_way_of_loading(pipe, folder, load):
    loaded = load(folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is IwinDiTVideoPipeline
    assert (loaded.id2label, loaded.config.fps) == (NAMES, 7.5)
    assert torch.equal(draw(loaded), draw(pipe))


def test_a_checkpoint_gives_its_weights_to_the_pipeline_of_its_run(pipe, folder):
    trained = {name: tensor * 1.1 for name, tensor in pipe.transformer.state_dict().items()}
    averaged = {name: tensor * 0.9 for name, tensor in pipe.transformer.state_dict().items()}
    root = folder.parent / "checkpoints"
    CheckpointWriter(root, keep_last=1, asynchronous=False).save(Snapshot(trained, averaged, {}, {"step": 5}))
    checkpoint, name = root / "step-00000005", "final_layer.linear.weight"
    assert torch.equal(load_pipeline(checkpoint).transformer.get_parameter(name), averaged[name])
    assert torch.equal(load_pipeline(checkpoint, weights="raw").transformer.get_parameter(name), trained[name])
    vae = "vae/diffusion_pytorch_model.safetensors"
    found = identify(checkpoint)
    assert found["weights_sha256"] == {
        vae: sha256(folder / vae),
        "ema.safetensors": sha256(checkpoint / "ema.safetensors"),
    }


def test_images_and_videos_are_not_confused(pipe, folder, tmp_path):
    image = IwinDiTPipeline(tiny_model(), None, FlowMatchEulerDiscreteScheduler())
    image.save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path)) is IwinDiTPipeline
    with pytest.raises(ValueError, match="IwinDiTPipeline needs an IwinDiTTransformer2DModel, got IwinDiTTrans"):
        IwinDiTPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="IwinDiTVideoPipeline needs an IwinDiTTransformer3DModel, got IwinDiTTrans"):
        IwinDiTVideoPipeline(image.transformer, None, image.scheduler)
    with pytest.raises(ValueError, match="expected an image VAE, got AutoencoderKLWan, a video VAE"):
        IwinDiTPipeline(tiny_model(), tiny_video_vae(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="the VAE has 4 latent channels, the transformer takes 8"):
        tiny_pipeline(in_channels=8)


def test_another_pipeline_is_not_loaded(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "DiTPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"class IwinDiTPipeline or IwinDiTVideoPipeline in .*, got DiTPipeline"):
        load_pipeline(tmp_path)


def test_a_video_pipeline_from_the_parts_of_an_image_pipeline():
    image = IwinDiTPipeline(tiny_model(), tiny_vae(), FlowMatchEulerDiscreteScheduler(), id2label=NAMES)
    video = IwinDiTVideoPipeline.from_pipe(image, transformer=tiny_video_model(), fps=12.0)
    assert (video.vae is image.vae, video.id2label, video.config.fps) == (True, NAMES, 12.0)


# --- output


@pytest.mark.parametrize(("vae", "frames"), [("image", 4), ("video", 7)])
def test_output_types(vae, frames):
    """The default size is that of the training clips: with a video VAE, 4 latent frames are 1 + 3 * 2 frames."""
    pipe = tiny_pipeline(vae)
    assert pipe.default_size == (frames, 16, 16)
    assert draw(pipe).shape == (2, 4, 4, 8, 8)
    pil, array, tensor = (draw(pipe, output_type=kind) for kind in ("pil", "np", "pt"))
    assert [[frame.size for frame in clip] for clip in pil] == [[(16, 16)] * frames] * 2
    assert array.shape == (2, frames, 16, 16, 3)
    assert tensor.shape == (2, frames, 3, 16, 16)
    assert 0 <= tensor.min() < tensor.max() <= 1
    np.testing.assert_array_equal(np.array([[np.asarray(f) for f in clip] for clip in pil]), (array * 255).round())
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    decoded = pipe.codec.decode(draw(pipe)).transpose(1, 2)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensor)


def test_an_image_vae_decodes_frame_by_frame(pipe):
    """And clip by clip, so that the memory it takes does not grow with the batch."""
    sizes = []
    hook = pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    tensor, latents = draw(pipe, output_type="pt"), draw(pipe)
    hook.remove()
    assert max(sizes) <= 4
    assert sum(sizes) == 8
    for clip, its_latents in zip(tensor, latents, strict=True):
        for t, frame in enumerate(clip):
            alone = pipe.codec.decode(its_latents[None, :, t])[0]
            torch.testing.assert_close((alone / 2 + 0.5).clamp(0, 1), frame)


def test_tuple_and_default_type(pipe):
    (frames,) = pipe(3, num_inference_steps=1, return_dict=False)
    assert [frame.size for frame in frames[0]] == [(16, 16)] * 4


def test_other_sizes(pipe):
    assert draw(pipe, num_frames=6, height=12, width=28).shape == (2, 4, 6, 6, 14)
    assert draw(pipe, num_frames=1, output_type="pt").shape == (2, 1, 3, 16, 16)
    video = tiny_pipeline("video")
    assert draw(video, num_frames=5, height=12, width=28).shape == (2, 4, 3, 6, 14)
    assert draw(video, num_frames=1, output_type="pt").shape == (2, 1, 3, 16, 16)


def test_without_vae_latents_only(tmp_path):
    tiny_pipeline(None).save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path)
    assert pipe.vae is None
    assert pipe(3, num_inference_steps=1).frames.shape == (1, 4, 4, 8, 8)
    with pytest.raises(ValueError, match=r"has no VAE, so output_type must be 'latent', got 'np'.* to get videos"):
        pipe(3, num_inference_steps=1, output_type="np")


def test_frames_per_second(pipe):
    """Saved with the pipeline, overruled by the call, and no frame depends on it."""
    assert pipe(3, num_inference_steps=1, output_type="latent").fps == 7.5
    output = pipe([3, 7], num_inference_steps=2, output_type="latent", generator=seeds(0, 1), fps=30)
    assert output.fps == 30.0
    assert torch.equal(output.frames, draw(pipe))
    for rate in (0, -1.0, float("nan"), float("inf"), "8", True):
        with pytest.raises(ValueError, match="fps must be a number above 0 and finite, got"):
            draw(pipe, fps=rate)
        with pytest.raises(ValueError, match="fps must be a number above 0 and finite, got"):
            tiny_pipeline(None, fps=rate)


# --- a clip depends on its own generator alone


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler(clip_sample=False)])
def test_same_clip_in_any_batch(scheduler):
    """Also with a scheduler that draws noise at every step."""
    pipe = tiny_pipeline(scheduler=scheduler)
    assert torch.equal(
        pipe.prepare_latents(1, (4, 16, 16), seeds(5), None)[0],
        pipe.prepare_latents(2, (4, 16, 16), seeds(1, 5), None)[1],
    )
    alone = draw(pipe, (7,), (5,), output_type="pt")
    among = draw(pipe, (1, 7, 3), (1, 5, 2), output_type="pt")
    assert (alone[0] - among[1]).abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"one generator per video \(2\), got 3"):
        draw(pipe, numbers=(0, 1, 2))


def test_given_noise_is_the_start(pipe):
    noise = torch.cat([torch.randn(1, 4, 4, 8, 8, generator=g) for g in seeds(0, 1)])
    assert torch.equal(draw(pipe, latents=noise, numbers=(8, 9)), draw(pipe))


def test_videos_per_label(pipe):
    frames = draw(pipe, num_videos_per_label=2, numbers=(0, 1, 2, 3))
    assert torch.equal(frames, draw(pipe, (3, 3, 7, 7), (0, 1, 2, 3)))


# --- guidance, callbacks, failures


def test_guidance(pipe):
    """Linear in the two predictions, on the channels asked for, within its interval."""
    x, t = torch.randn(2, 4, 4, 8, 8), torch.tensor(500.0)
    y, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    cond, uncond = pipe.predict(x, t, y), pipe.predict(x, t, null)
    guided = uncond + 3 * (cond - uncond)
    torch.testing.assert_close(pipe.predict(x, t, y, 3.0), guided)
    torch.testing.assert_close(
        pipe.predict(x, t, y, 3.0, guidance_channels=1), torch.cat([guided[:, :1], cond[:, 1:]], dim=1)
    )
    sizes = []
    hook = pipe.transformer.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    draw(pipe, num_inference_steps=4, guidance_interval=(0.5, 0.75))
    hook.remove()
    assert sizes == [2, 4, 4, 2]


def test_callback_sees_replaces_and_interrupts(pipe):
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), pipe.num_timesteps, tuple(tensors["latents"].shape)))
        pipe._interrupt = step == 1
        return {"latents": torch.ones_like(tensors["latents"])}

    frames = draw(pipe, num_inference_steps=4, callback_on_step_end=stop)
    assert seen == [(0, 1000, 4, (2, 4, 4, 8, 8)), (1, 750, 4, (2, 4, 4, 8, 8))]
    assert (frames == 1).all()


def test_lora_weights(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline(None)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    IwinDiTVideoPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    other = tiny_pipeline(None)
    plain = draw(other)
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(other), draw(pipe))
    assert not torch.allclose(draw(other), plain)


def test_nan_is_an_error_not_a_black_clip():
    pipe = tiny_pipeline()
    with pytest.raises(FloatingPointError, match="latents are not finite"):
        draw(pipe, latents=torch.full((2, 4, 4, 8, 8), float("nan")))
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="the VAE gave pixels that are not finite"):
        draw(pipe, output_type="pil")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"num_frames": 4.0}, r"num_frames must be a whole number, got 4\.0"),
        ({"width": "16"}, "width must be a whole number, got '16'"),
        ({"height": 15}, r"height must be a positive multiple of 2 \(VAE stride 2 \* patch_size 1\), got 15"),
        ({"width": 0}, "width must be a positive multiple of 2"),
        ({"num_videos_per_label": 0}, "num_videos_per_label must be at least 1, got 0"),
        ({"output_type": "gif"}, "output_type must be one of"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents must have shape \(2, 4, 4, 8, 8\), got \(2, 4, 8, 8\)"),
    ],
)
def test_mistakes(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)


def test_frames_that_the_vae_cannot_give():
    with pytest.raises(ValueError, match=r"expected frames = 1 \+ k \* 2, as Autoencoder.* got 6; nearest: 5 and 7"):
        draw(tiny_pipeline("video"), num_frames=6)


def test_latents_that_the_vae_cannot_decode():
    """CogVideoX gives 1 + 2 k latent frames, and the model was built for 4."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
    )
    message = r"no latents of the transformer's sample_size \(4, 8, 8\): expected latent frames = 1 \+ k \* 2"
    with pytest.raises(ValueError, match=message):
        IwinDiTVideoPipeline(tiny_video_model(sample_size=(4, 8, 8)), vae, FlowMatchEulerDiscreteScheduler())
    IwinDiTVideoPipeline(tiny_video_model(sample_size=(5, 8, 8)), vae, FlowMatchEulerDiscreteScheduler())


def test_frames_that_the_temporal_patch_cannot_hold():
    pipe = tiny_pipeline(patch_size=(2, 1, 1), single_frame="refuse")
    with pytest.raises(ValueError, match=r"a multiple of 2 \(patch_size in time\), got 5, which gives 5"):
        draw(pipe, num_frames=5)
    with pytest.raises(ValueError, match=r"takes no single frame: its patches hold 2 .* got num_frames 1, which"):
        draw(pipe, num_frames=1)
    video = tiny_pipeline("video", patch_size=(2, 1, 1), single_frame="repeat")
    with pytest.raises(ValueError, match=r"a multiple of 2 \(patch_size in time\), got 5, which gives 3"):
        draw(video, num_frames=5)
    assert draw(video, num_frames=1).shape == (2, 4, 1, 8, 8)


# --- grids and files of clips


def coloured(frames: int, width: int = 8, height: int = 6) -> list[Image.Image]:
    """Frames of one colour each."""
    return [Image.new("RGB", (width, height), (10 * t, 250 - 10 * t, 100)) for t in range(frames)]


def test_clip_grid():
    first, second = coloured(3), coloured(4)[1:]
    grids = clip_grid([[first, second], [second]], ["a", "b"])
    for t, grid in enumerate(grids):
        assert grid.tobytes() == image_grid([[first[t], second[t]], [second[t]]], ["a", "b"]).tobytes()
    assert len(grids) == 3
    with pytest.raises(ValueError, match=r"expected clips of one length, got \[3, 4\] frames"):
        clip_grid([[coloured(3), coloured(4)]], ["a"])


@pytest.mark.parametrize(("size", "columns", "cell"), [((8, 6), 1, 64), ((100, 80), 3, 64), ((8, 6), 2, 10)])
def test_grid_size(size, columns, cell):
    labels = ["a", "a long label"]
    grid = image_grid([[Image.new("RGB", size)] * columns, [Image.new("RGB", size)]], labels, cell)
    assert grid.size == grid_size(size, columns, labels, cell)


def test_grids_that_are_too_large():
    check_grid((64, 64), 16, ["a"] * 900)
    with pytest.raises(ValueError, match=r"sides of at most 65,535 pixels .*, got 1 of [\d,]+ x 66,000"):
        check_grid((64, 64), 16, ["a"] * 1000)
    with pytest.raises(ValueError, match=r"268,435,456 pixels in all, got 64 of [\d,]+ x 59,400"):
        check_grid((64, 64), 16, ["a"] * 900, frames=64)
    with pytest.raises(ValueError, match="a GIF shows"):
        check_grid((64, 64), 1, ["a"], fps=60)


@pytest.mark.parametrize("fps", [1, 7.5, 8, 25 / 3, 24, 30, 50])
def test_a_gif_plays_at_its_rate(tmp_path, fps):
    """Frames begin within half a hundredth of a second of their time, where rounding each alike drifts away."""
    frames = coloured(20)
    save_gif(frames, tmp_path / "clip.gif", fps)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (20, 0)
        read = [(frame.convert("RGB"), frame.info["duration"] / 1000) for frame in ImageSequence.Iterator(gif)]
    assert [frame.tobytes() for frame, _ in read] == [frame.tobytes() for frame in frames]
    np.testing.assert_allclose(np.cumsum([s for _, s in read]), np.arange(1, 21) / fps, rtol=0, atol=0.00501)


def test_a_gif_of_frames_that_stand_still(tmp_path):
    for frames in (coloured(1) * 3, coloured(1)):
        save_gif(frames, tmp_path / "clip.gif", 8)
        with Image.open(tmp_path / "clip.gif") as gif:
            assert (gif.n_frames, gif.info["duration"]) == (1, 10 * round(100 / 8 * len(frames)))


@pytest.mark.parametrize("stride", [0, -1, 1.5, True])
def test_a_stride_that_is_none_is_refused(stride):
    image = IwinDiTPipeline(tiny_model(), tiny_vae(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="frame_stride must be a whole number of at least 1, or None, got"):
        IwinDiTVideoPipeline.from_pipe(image, transformer=tiny_video_model(), frame_stride=stride)


def test_the_arguments_of_a_call_are_settled_before_it():
    pipe = tiny_pipeline(fps=7.5)
    given = {"num_frames": None, "fps": None, "guidance_scale": None, "num_inference_steps": 3}
    size = pipe.default_size
    assert pipe.call_settings(**given) == {
        "num_frames": size[0],
        "fps": 7.5,
        "guidance_scale": pipe.default_guidance_scale,
        "num_inference_steps": 3,
    }
    for wrong in ({"fps": float("nan")}, {"num_frames": 0}, {"guidance_scale": 0.5}, {"num_inference_steps": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            pipe.call_settings(**wrong)


def test_the_slowest_gif(tmp_path):
    """A delay has 16 bits."""
    save_gif(coloured(2), tmp_path / "clip.gif", 100 / 65535)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.info["duration"] == 655350


@pytest.mark.parametrize("fps", [0, 0.0015, 50.1, float("nan")])
def test_a_rate_that_no_gif_has(tmp_path, fps):
    with pytest.raises(ValueError, match=r"a GIF shows 0\.0015 to 50 frames per second, got"):
        save_gif(coloured(2), tmp_path / "clip.gif", fps)


def test_frames_as_pictures(tmp_path):
    """Without loss, read back as a clip; a shorter clip leaves nothing of the last one."""
    for frames in (coloured(12), coloured(3)):
        save_frames(frames, tmp_path / "clip")
        read = all_frames(tmp_path / "clip")
        np.testing.assert_array_equal(read, np.stack([np.asarray(frame) for frame in frames]))
