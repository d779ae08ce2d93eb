"""Video through the same scripts: the configuration, steps on single frames, a start from an image model, previews."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator

import evaluate_fid
import extract_latents
import train_dit
from iwin_dit import IwinDiTPipeline, IwinDiTTransformer2DModel, IwinDiTTransformer3DModel, IwinDiTVideoPipeline
from iwin_dit.data.clips import ClipSettings
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.latents import LatentDataset, LatentStore
from iwin_dit.data.prepare import SPLIT
from iwin_dit.evaluation.videos import Cut
from iwin_dit.files import write_json
from iwin_dit.training.batches import ImageSteps, MicroBatches
from iwin_dit.training.config import Config, parse_config
from iwin_dit.training.data import image_steps, open_codec
from iwin_dit.training.draws import is_image_step
from iwin_dit.training.evaluation import build_request
from iwin_dit.training.initial import PREDICTS, load_initial, report_initial
from iwin_dit.training.log import read_metrics
from iwin_dit.training.pictures import PREVIEW_SIDE, build_pipeline, export, preview
from iwin_dit.training.summary import describe
from tests.faults import launch
from tests.latent_folders import small_codec
from tests.tools import tiny_model

ROOT = Path(__file__).parents[1]
VIDEO = str(ROOT / "configs" / "moving_digits.yaml")
DIGITS = str(ROOT / "configs" / "digits.yaml")
FRAMES, SIDE, CLIPS = 4, 8, 6  # of a clip, of a frame, of a class


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips of squares on the move as folders of frames, a VAE of stride 2, and latents that the script extracted."""
    root = tmp_path_factory.mktemp("video")
    small_codec().vae.save_pretrained(root / "vae")
    generator = np.random.default_rng(0)
    for clip in range(2 * CLIPS):
        place = root / "clips" / ("even", "odd")[clip % 2] / f"clip{clip}"
        place.mkdir(parents=True)
        start, colour = generator.integers(SIDE), tuple(generator.integers(64, 256, size=3).tolist())
        for frame in range(FRAMES):
            picture = Image.new("RGB", (SIDE, SIDE))
            picture.paste(colour, (int(start + frame) % SIDE, 2, SIDE, 5))
            picture.save(place / f"{frame:02d}.png")
    with pytest.MonkeyPatch.context() as patch:  # one thread, as two that spin are slow on a busy machine
        patch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
        AcceleratorState._reset_state(reset_partial_state=True)
        extract_latents.main(["--config", VIDEO, "--run", "unused", *named(root)])
    return root


def named(root: Path) -> list[str]:
    """Arguments that name data, VAE and latents, and a model that fits."""
    return [
        *(
            "--data.source",
            str(root / "clips"),
            "--data.vae",
            str(root / "vae"),
            "--data.latents",
            str(root / "latents"),
        ),
        *("--data.resolution", str(SIDE), "--data.frames", str(FRAMES), "--data.holdout", "2"),
        *("--data.clips_per_video", "1", "--model.window_size", "auto", "--model.pos_embed_type", "none"),
        *("--model.conv_kernel_size", "[2, 3, 3]"),
        *("--data.posterior", "mean_std", "--data.flips", "true"),
        *("--model.sample_size", "[4, 4, 4]", "--model.num_classes", "2", "--model.num_layers", "1"),
        *("--model.num_attention_heads", "2", "--model.attention_head_dim", "8"),
    ]


SMALL = [
    *("--train.batch_size", "4", "--train.images", "16", "--optim.schedule", "constant", "--optim.warmup_images", "0"),
    *("--log.every", "1", "--log.preview_every", "0", "--log.validate_every", "0", "--eval.every", "0"),
]


@pytest.fixture
def base(folder, monkeypatch) -> list[str]:
    """Of a run of 4 small steps, on one thread, too."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
    return ["--config", VIDEO, *named(folder), *SMALL]


def train(*arguments: str) -> None:
    """Run train_dit.py in this process, as if it had just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dit.main([*arguments])


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


# --- the configuration


def test_the_modality_decides_the_model(tmp_path):
    for path, modality, model in (
        (VIDEO, "video", IwinDiTTransformer3DModel),
        (DIGITS, "image", IwinDiTTransformer2DModel),
    ):
        config = parse_config(["--config", path])
        with torch.device("meta"):
            assert (config.modality, type(config.build_model())) == (modality, model)
    clips = ["--data.frames", "16", "--data.frame_rate", "8", "--model.sample_size", "[16, 8, 8]", "--eval.every", "0"]
    by_flag = parse_config(["--modality", "video", "--config", DIGITS, *clips])
    assert (by_flag.modality, by_flag.model["conv_kernel_size"]) == ("video", (2, 3, 3))
    (tmp_path / "a.yaml").write_text("run: a\nmodality: video\n")
    assert parse_config([f"--config={tmp_path / 'a.yaml'}", "--modality=image"]).modality == "image"


def test_a_schedule_of_windows_is_plain_data():
    config = parse_config(
        ["--config", VIDEO, "--model.window_size", "[[1, -1, -1], [-1, 1, 1]]", "--model.num_layers", "4"]
    )
    with torch.device("meta"):
        model = config.build_model()
    assert model.window_sizes == ((1, -1, -1), (-1, 1, 1)) * 2
    text = describe(config, samples_per_pass=2)
    for words in (
        "tokens       256 per clip",
        "window (1, 4, 4)",
        "window (16, 1, 1)",
        "activations of 2 clips per pass",
    ):
        assert words in text
    odd = ["--model.num_layers", "7", "--model.window_size", "[[1, -1, -1], [-1, 1, 1]]"]
    with pytest.raises(ValueError, match="num_layers=7"):
        parse_config(["--config", VIDEO, *odd]).build_model()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--modality", "audio"], ["modality", "audio", "image", "video"]),
        (["--modal", "image"], ["Did you mean 'modality'?"]),
        (["--model.causal_con", "true"], ["Did you mean 'model.causal_conv'?", "model.window_padding"]),
        (["--data.frames", "null"], ["data.frames and data.frame_rate must be given", "got None and 8.0"]),
        (["--data.frame_rate", "null"], ["data.frames and data.frame_rate must be given", "got 16 and None"]),
        (["--data.frames", "0"], ["data.frames must be from 1 to 10**4, got 0"]),
        (["--data.frame_stride", "0"], ["data.frame_stride must be from 1 to 10**4, got 0"]),
        (["--data.clips_per_video", "0"], ["data.clips_per_video must be from 1 to 10**4, got 0"]),
        (["--data.frame_rate", "-1"], ["data.frame_rate must be above 0, got -1.0"]),
        (["--data.image_steps", "1.5"], ["data.image_steps must be in [0, 1], got 1.5"]),
        (
            ["--data.image_steps", "0.5", "--model.patch_size", "[2, 2, 2]"],
            ["model.single_frame 'refuse'", "patch_size (2, 2, 2)"],
        ),
        (["--eval.metrics", "fid", "--eval.every", "5"], ["cannot be of clips", "expected fvd, moving_digits"]),
        (["--eval.metrics", "fvd", "--eval.reference", "null", "--eval.every", "5"], ["eval.reference must be given"]),
        (["--eval.max_broken", "3"], ["eval.max_broken is for fvd", "got 3 with eval.metrics 'moving_d"]),
        (["--eval.max_broken", "-1"], ["eval.max_broken must be at least 0, got -1"]),
        (["--data.clips_per_video", "4", "--data.holdout", "3"], ["multiple of data.clips_per_video 4", "got 3"]),
        (
            ["--model.class_dropout_prob", "0", "--log.preview_guidance_scale", "2"],
            ["log.preview_guidance_scale must be 1", "class_dropout_prob is 0"],
        ),
        (
            ["--model.class_dropout_prob", "0", "--eval.guidance_scale", "4"],
            ["eval.guidance_scale must be 1 where model.class_dropout_prob is 0", "got 4"],
        ),
        (["--init_classes", "fresh"], ["init_classes 'fresh' has no effect without init_from"]),
    ],
)
def test_mistakes_name_the_field(arguments, messages, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--config", VIDEO, *arguments])
    error = capsys.readouterr().err
    for message in messages:
        assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.frames", "16"], "data.frames is for modality 'video' alone, got modality 'image'"),
        (["--data.frame_rate", "8", "--data.image_steps", "0.5"], "data.frame_rate, data.image_steps is for modality"),
        (["--model.causal_conv", "true"], "Valid keys: model.activation_fn"),
        (["--eval.metrics", "moving_digits", "--eval.every", "5"], "cannot be of images"),
    ],
)
def test_clips_are_not_for_images(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--config", DIGITS, *arguments])
    assert message in capsys.readouterr().err


def test_video_metrics_have_no_say_over_a_run_without_evaluation():
    assert parse_config(["--config", VIDEO, "--eval.every", "0", "--eval.metrics", "fid"]).eval.every == 0


def test_no_guidance_needs_no_null_class():
    unused = ["--log.preview_guidance_scale", "3", "--log.preview_every", "0", "--eval.every", "0"]
    for words in (unused, ["--eval.every", "0"]):
        parse_config(["--config", VIDEO, "--model.class_dropout_prob", "0", *words])
    share = ["--data.clips_per_video", "4", "--data.holdout", "0.1"]
    assert parse_config(["--config", VIDEO, *share]).data.holdout == 0.1


# --- the data


def test_statistics_of_the_data_are_not_for_a_vae_that_keeps_its_own(base, tmp_path):
    """Wan's, whose config calls its channels otherwise."""
    AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(tmp_path / "wan")
    config = parse_config([*base, "--data.vae", str(tmp_path / "wan"), "--data.latent_statistics", "data"])
    with pytest.raises(ValueError, match=r"data\.vae: AutoencoderKLWan has latent statistics of its own"):
        open_codec(config.data, torch.device("cpu"))
    config.data.latent_statistics = "vae"
    assert open_codec(config.data, torch.device("cpu")).latent_channels == 16


def test_extraction_says_what_it_did(folder, caplog):
    caplog.set_level(logging.INFO)
    AcceleratorState._reset_state(reset_partial_state=True)
    extract_latents.main(["--config", VIDEO, "--run", "unused", *named(folder)])
    for words in (
        "clips        12 in 2 classes of 6 to 6; 0 broken ones skipped, 0 other files left out",
        "frames       4 of 8 x 8 pixels in each clip, 8 per second",
        "latents      4 x 4 x 4 x 4 float32, posterior mean_std, with mirror images",
    ):
        assert words in caplog.text


def test_other_clips_are_refused(base, tmp_path):
    with pytest.raises(SystemExit, match=r"data\.frame_stride: 1 there, 2 wanted"):
        train(*base, "--run", str(tmp_path / "run"), "--data.frame_stride", "2")
    with pytest.raises(SystemExit, match=r"latent size: model \(8, 4, 4\), latents \(4, 4, 4\)"):
        train(*base, "--run", str(tmp_path / "run"), "--model.sample_size", "[8, 4, 4]")
    assert not (tmp_path / "run").exists()


# --- steps on single frames


def test_the_share_of_image_steps():
    steps = [is_image_step(3, step, 0.25) for step in range(4000)]
    assert np.mean(steps) == pytest.approx(0.25, abs=0.03)
    assert steps[:100] == [is_image_step(3, step, 0.25) for step in range(100)]
    assert steps[:100] != [is_image_step(4, step, 0.25) for step in range(100)]
    assert not any(is_image_step(3, step, 0.0) for step in range(100))
    assert all(is_image_step(3, step, 1.0) for step in range(100))


@pytest.fixture
def clips(folder) -> LatentDataset:
    return LatentStore(folder / "latents").split(2, 0)[0]


def test_a_step_is_of_frames_for_all_processes(clips):
    """Two processes with two micro-batches each see what one process sees at once, in either kind of step."""
    on_frames, lengths = ImageSteps(0.5, 16, first=False), set()
    for step in range(8):
        whole = MicroBatches(clips, 0, 16, 1, 0, posterior=True, flips=True, image_steps=on_frames)[step]
        parts = [
            MicroBatches(clips, 0, 4, 2, rank, posterior=True, flips=True, image_steps=on_frames)[step * 2 + micro]
            for micro in range(2)
            for rank in range(2)
        ]
        for ours, expected in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(ours), expected)
        lengths.add(whole.latents.shape[2])
        assert whole.latents.shape[2] == (1 if is_image_step(0, step, 0.5) else FRAMES)
    assert lengths == {1, FRAMES}


@pytest.mark.parametrize("first", [True, False])
def test_a_frame_is_the_clips_own_and_so_is_its_noise(first, clips):
    clip = MicroBatches(clips, 0, 32, 1, 0, posterior=True)[0]
    frame = MicroBatches(clips, 0, 32, 1, 0, posterior=True, image_steps=ImageSteps(1.0, 32, first))[0]
    assert frame.latents.shape == frame.noise.shape == (32, 4, 1, 4, 4)
    matches = (clip.noise == frame.noise).flatten(3).all(3).all(1)  # (B, t)
    assert matches.sum(1).tolist() == [1] * 32
    chosen = matches.long().argmax(1)
    assert set(chosen.tolist()) == ({0} if first else set(range(FRAMES)))
    assert torch.equal(frame.latents[:, :, 0], clip.latents[torch.arange(32), :, chosen])
    for name in ("class_labels", "times", "drops"):
        assert torch.equal(getattr(frame, name), getattr(clip, name))


def test_an_image_vae_takes_any_frame(base, folder):
    config = parse_config([*base, "--data.image_steps", "0.25"])
    codec = LatentCodec(small_codec().vae)
    assert image_steps(config, codec) == ImageSteps(0.25, 4, first=False)
    assert image_steps(parse_config(base), codec) is None


# --- the loop


@pytest.mark.slow
@pytest.mark.parametrize("share", ["0", "0.5"])
def test_a_run_on_clips_resumes_bit_for_bit(share, base, tmp_path, caplog):
    """train(4) = train(2) + resume(2); with image_steps 0.5, steps 1 to 4 of this seed are of both kinds."""
    caplog.set_level("INFO")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [*base, "--data.image_steps", share]
    train(*arguments, "--run", str(whole), "--log.validate_every", "4")
    train(*arguments, "--run", str(parts), "--train.images", "8")
    train(*arguments, "--run", str(parts))
    assert f"resumed from {parts / 'checkpoints' / 'step-00000002'}" in caplog.text
    assert "is done: 4 of 4 steps, 16 clips" in caplog.text
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (load_file(run / "checkpoints/step-00000004" / f"{name}.safetensors") for run in (whole, parts))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(whole) == losses(parts)
    assert len({is_image_step(0, step, float(share)) for step in range(4)}) == (1 if share == "0" else 2)

    pipe = IwinDiTVideoPipeline.from_pretrained(whole / "pipeline")
    assert (pipe.config.fps, pipe.id2label) == (8.0, {0: "even", 1: "odd"})
    frames = pipe([0, 1], num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (2, FRAMES, 3, SIDE, SIDE)
    with pytest.raises(SystemExit, match=r"data\.image_steps: .* before, 0\.75 now"):
        train(*arguments, "--run", str(whole), "--data.image_steps", "0.75")


@pytest.mark.slow
def test_previews_move_on_disk_and_in_tensorboard(base, tmp_path):
    arguments = ["--train.images", "4", "--log.preview_every", "1", "--log.preview_steps", "1"]
    arguments += ["--log.preview_columns", "2", "--log.tracker", "tensorboard"]
    train(*base, "--run", str(tmp_path), *arguments)
    path = tmp_path / "previews" / "step-00000001.gif"
    with Image.open(path) as picture:
        assert picture.n_frames == FRAMES
        assert picture.width > 2 * 2 * 64 > picture.height // 2
        assert picture.info["duration"] in (120, 130)  # 8 frames per second
        width, height = picture.size
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [event] = events.Images("previews")
    assert (event.step, event.width, event.height) == (1, width, height)
    assert event.encoded_image_string == path.read_bytes()
    assert events.Scalars("loss")
    record = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert record == {"step": 1}


@pytest.mark.slow
def test_a_preview_of_large_clips_is_small(base, folder, tmp_path):
    sizes = ["--data.resolution", "160", "--model.sample_size", "[2, 80, 80]", "--model.patch_size", "[1, 16, 16]"]
    few = ["--log.preview_classes", "[1]", "--log.preview_columns", "1", "--log.preview_steps", "1"]
    config = parse_config([*base, *sizes, "--data.frames", "2", *few])
    models, codec = {"trained": config.build_model().eval()}, small_codec()
    assert build_pipeline(config, models["trained"], codec, ("a", "b")).default_size == (2, 160, 160)
    path = preview(config, models, codec, ("a", "b"), tmp_path / "previews" / "a", lambda: False)
    with Image.open(path) as picture:
        assert picture.height == 24 + PREVIEW_SIDE + 2  # title, and a row
        assert PREVIEW_SIDE < picture.width < 2 * PREVIEW_SIDE


def test_a_pipeline_of_images_has_no_record_of_clips(image_model, tmp_path):
    export(IwinDiTPipeline.from_pretrained(image_model), tmp_path / "pipeline", 3)
    assert json.loads((tmp_path / "pipeline" / "training.json").read_text()) == {"step": 3}


@pytest.mark.slow
def test_two_processes_train_as_one_does(base, tmp_path):
    """Steps on clips and on single frames, each on all processes at once."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*base, "--data.image_steps", "0.5"]
    for run, ranks in ((one, 1), (two, 2)):
        result = launch([*arguments, "--run", str(run)], ranks=ranks).wait(60)
        assert set(result.exitcodes) == {0}, result.output
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert len(losses(one)) == 4


# --- a start from other weights


@pytest.fixture
def image_model(tmp_path) -> Path:
    """A pipeline folder of an image model with random weights that fits the clips' single frames."""
    return saved_image_model(tmp_path / "image")


def saved_image_model(
    path: Path, objective: str = "flow_matching", names: dict | None = None, classes: int = 2
) -> Path:
    model = tiny_model(sample_size=4, patch_size=2, num_layers=1, num_classes=classes)
    scheduler = parse_config(["--config", DIGITS, "--objective", objective]).build_objective().scheduler()
    IwinDiTPipeline(model, small_codec().vae, scheduler, names).save_pretrained(path)
    return path


def started(config: Config) -> IwinDiTTransformer3DModel:
    torch.manual_seed(1)
    model = config.build_model()
    record = load_initial(config, model)
    assert record["path"] == config.init_from
    assert len(record["weights_sha256"]) == 2
    assert record["codec_sha256"] == small_codec().fingerprint()
    return model.eval()


def test_a_video_model_starts_from_an_image_model(base, image_model):
    """On single frames its first loss is the image model's, to rounding."""
    config = parse_config([*base, "--init_from", str(image_model)])
    model = started(config)
    image, labels = IwinDiTPipeline.from_pretrained(image_model).transformer.eval(), torch.tensor([0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=generator)
    times = torch.tensor([0.1, 0.5, 0.9])
    objective = config.build_objective()
    with torch.no_grad():
        ours = objective.loss(model, latents[:, :, None], labels, noise[:, :, None], times)
        theirs = objective.loss(image, latents, labels, noise, times)
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)


@pytest.mark.slow
def test_a_run_from_other_weights_does_not_read_them_again(base, image_model, tmp_path, caplog):
    run = tmp_path / "run"
    arguments = [*base, "--run", str(run), "--init_from", str(image_model)]
    caplog.set_level("INFO")
    train(*arguments, "--train.images", "8")
    assert f"initial      the weights of {image_model} (as stored, step None)" in caplog.text
    assert "another VAE" not in caplog.text
    record = json.loads((run / "init_from.json").read_text())
    assert record["path"] == str(image_model)
    assert set(record["weights_sha256"]) == {
        *("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")
    }
    first = losses(run)[0]
    shutil.rmtree(image_model)
    train(*arguments)
    assert len(losses(run)) == 4
    assert losses(run)[0] == first
    assert json.loads((run / "init_from.json").read_text()) == record
    with pytest.raises(SystemExit, match=r"init_from: .* before, None now"):
        train(*base, "--run", str(run))


@pytest.mark.slow
def test_a_run_of_the_same_class_starts_where_the_other_ended(base, tmp_path):
    """From the averaged weights of a checkpoint; windows and sizes may change, what else decides the model may not."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(*base, "--run", str(one))
    arguments = [*base, "--run", str(two), "--init_from", str(one / "checkpoints" / "step-00000004")]
    model = started(parse_config([*arguments, "--model.window_size", "2"]))
    averaged = load_file(one / "checkpoints" / "step-00000004" / "ema.safetensors")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in model.state_dict().items())
    for extra, message in (
        (["--model.num_layers", "2"], "model.num_layers: 2 here, 1 there"),
        (["--model.gate", "one_plus"], "model.gate: one_plus here, zero there"),
        (["--model.conv_kernel_size", "3"], r"model.conv_kernel_size: \[3, 3, 3\] here, \[2, 3, 3\] there"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(*arguments, *extra)
    assert not two.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.num_attention_heads", "4"], "num_attention_heads"),
        (["--model.num_layers", "3"], "num_layers|blocks"),
        (["--model.activation_fn", "gelu-approximate"], "activation_fn"),
        (["--model.num_classes", "3"], r"num_classes(.|\n)*init_classes: fresh starts without the label embeddings"),
        (["--init_from", "nowhere"], "init_from 'nowhere': expected a run folder"),
        (
            ["--objective", "ddpm", "--flow_matching.logit_mean", "0"],
            "prediction type is 'epsilon', which objective 'ddpm' trains, got 'flow_prediction'",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(extra, message, base, image_model, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train(*base, "--run", str(tmp_path / "run"), "--init_from", str(image_model), *extra)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_loads_what_a_run_would_start_from(base, image_model, tmp_path, caplog):
    caplog.set_level("INFO")
    train(*base, "--run", str(tmp_path / "run"), "--init_from", str(image_model), "--dry-run")
    assert f"initial      the weights of {image_model} fit" in caplog.text
    assert not (tmp_path / "run").exists()
    (image_model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"init_from '.*image': .*diffusion_pytorch_model"):
        train(*base, "--run", str(tmp_path / "run"), "--init_from", str(image_model), "--dry-run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_what_an_objective_trains_is_what_its_pipeline_says(objective, tmp_path):
    path = saved_image_model(tmp_path / "image", objective)
    assert IwinDiTPipeline.from_pretrained(path).config.prediction_type == PREDICTS[objective]


def test_other_class_names_are_a_warning(base, tmp_path, caplog):
    caplog.set_level("WARNING")  # whatever earlier tests have set
    names = {0: "even", 1: "strange"}
    path = saved_image_model(tmp_path / "image", names=names)
    config = parse_config([*base, "--init_from", str(path)])
    initial = load_initial(config, config.build_model())
    assert initial["class_names"] == names
    report_initial(initial, small_codec(), ("even", "strange"))
    assert not caplog.records
    report_initial(initial, small_codec(), ("even", "odd"))
    [record] = caplog.records
    assert (
        "1 of 2 classes had another name where they were trained, such as 1: 'strange' there, 'odd' here" in caplog.text
    )
    assert record.levelname == "WARNING"
    caplog.clear()
    config.init_classes = "fresh"
    report_initial(load_initial(config, config.build_model()), small_codec(), ("even", "odd"))
    assert not caplog.records


def test_the_vae_of_moving_digits_holds_out_digits_and_not_clips(tmp_path):
    small_codec().vae.save_pretrained(tmp_path)
    write_json(tmp_path / SPLIT, {"data.source": "moving_digits", "data.holdout": 300, "data.split_seed": 0})
    arguments = ["--config", VIDEO, "--data.vae", str(tmp_path), "--data.clips_per_video", "4", "--data.holdout"]
    open_codec(parse_config([*arguments, "1200"]).data, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"data\.holdout"):
        open_codec(parse_config([*arguments, "300"]).data, torch.device("cpu"))


@pytest.mark.parametrize("video", [True, False])
def test_fresh_classes_keep_the_null_class_alone(video, base, tmp_path):
    """Of a model of five classes, for one of two."""
    path = saved_image_model(tmp_path / "image", classes=5)
    source = IwinDiTPipeline.from_pretrained(path).transformer
    if video:
        config = parse_config([*base, "--init_from", str(path), "--init_classes", "fresh"])
    else:
        sizes = ["--model.sample_size", "4", "--model.patch_size", "2", "--model.num_layers", "1"]
        sizes += ["--model.num_attention_heads", "2", "--model.attention_head_dim", "8", "--model.num_classes", "2"]
        config = parse_config(["--config", DIGITS, *sizes, "--init_from", str(path), "--init_classes", "fresh"])
    model = config.build_model()
    drawn = model.class_embed.weight.detach().clone()
    load_initial(config, model)
    assert torch.equal(model.class_embed.weight[:2], drawn[:2])
    assert torch.equal(model.class_embed.weight[2], source.class_embed.weight[5])
    assert torch.equal(model.blocks[0].attn.to_q.weight, source.blocks[0].attn.to_q.weight)


def test_an_image_model_does_not_start_from_a_video_model(base, tmp_path):
    train(*base, "--run", str(tmp_path / "video"), "--train.images", "4")
    config = parse_config(["--config", DIGITS, "--init_from", str(tmp_path / "video"), "--model.num_layers", "1"])
    with pytest.raises(ValueError, match=r"expected weights of IwinDiTTransformer2DModel, got those of .*3DModel"):
        load_initial(config, config.build_model())


# --- evaluation and trackers


def test_real_clips_are_cut_as_those_trained_on():
    clips = ["--data.frame_stride", "3", "--data.frame_rate", "25", "--data.resolution", "64", "--eval.every", "1"]
    request = build_request(parse_config(["--config", VIDEO, *clips]))
    assert request.cut == Cut(ClipSettings(16, frame_stride=3))
    fvd = ["--eval.metrics", "fvd", "--eval.reference", "videos", "--eval.max_broken", "5"]
    request = build_request(parse_config(["--config", VIDEO, *clips, *fvd]))
    assert request.cut == Cut(ClipSettings(16, 25, 3), 64)
    assert request.max_broken == 5


@pytest.mark.slow
def test_moving_digits_are_measured_in_the_loop(tmp_path, monkeypatch):
    """A tiny model on clips of the size that the metric is of, at a stride; the best checkpoint is kept by it.

    The command line measures the same of that checkpoint, against the same real clips.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
    monkeypatch.chdir(tmp_path)
    small_codec().vae.save_pretrained(tmp_path / "vae")
    for clip in range(4):
        place = tmp_path / "clips" / f"{clip % 2}" / f"clip{clip}"
        place.mkdir(parents=True)
        for frame in range(31):
            picture = Image.new("RGB", (32, 32))
            picture.paste("white", (frame % 16, 8, frame % 16 + 6, 20))
            picture.save(place / f"{frame:02d}.png")
    arguments = ["--config", VIDEO, *named(tmp_path), *SMALL, "--run", str(tmp_path / "run")]
    arguments += ["--data.resolution", "32", "--data.frames", "16", "--data.flips", "false"]
    arguments += ["--data.frame_stride", "2"]
    arguments += ["--model.sample_size", "[16, 16, 16]", "--model.patch_size", "[1, 4, 4]", "--train.images", "8"]
    arguments += ["--eval.every", "1", "--eval.num_samples", "4", "--eval.num_inference_steps", "1"]
    train(*arguments)
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_digit_recognition" in r]
    assert [record["step"] for record in records] == [1, 2]
    for name in ("digit_recognition", "digit_displacement", "blank_frames"):
        assert all(np.isfinite(record[f"eval_{name}"]) for record in records)
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["metric"], best["greater_is_better"]) == ("digit_recognition", True)
    assert best["value"] == max(record["eval_digit_recognition"] for record in records)

    AcceleratorState._reset_state(reset_partial_state=True)
    settings = ["--num-samples", "4", "--steps", "1", "--guidance", "4", "--out", "again.json"]
    evaluate_fid.main(["--model", str(tmp_path / "run" / best["checkpoint"]), *settings])
    again = json.loads(Path("again.json").read_text())
    recorded = json.loads((tmp_path / f"run/evaluations/step-{best['step']:08d}.json").read_text())
    assert again["metrics"] == recorded["metrics"]
    assert again["reference"] == recorded["reference"]
    assert recorded["reference"]["frame_stride"] == 2


@pytest.mark.slow
def test_weights_and_biases_gets_the_moving_preview(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ["--train.images", "4", "--log.preview_every", "1", "--log.preview_steps", "1"]
    train(*base, "--run", str(tmp_path), *arguments, "--log.tracker", "wandb")
    assert "the tracker failed" not in caplog.text
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/previews*.gif"))) == 1
