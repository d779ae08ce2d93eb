"""Evaluation of video models: samples by index, moving digits and FVD through the engine, the script and sweeps."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

import evaluate_fid
from iwin_dit import IwinDiTPipeline, IwinDiTVideoPipeline
from iwin_dit.data.clips import ClipSettings
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.digits import DIGIT_NAMES
from iwin_dit.evaluation import networks
from iwin_dit.evaluation.evaluator import Evaluator, Measurement, Request
from iwin_dit.evaluation.partial import Partial
from iwin_dit.evaluation.real import LabelledClips, moving_digits
from iwin_dit.evaluation.report import early_warnings, lines
from iwin_dit.evaluation.samples import SampledImages, Sampling, to_uint8
from iwin_dit.evaluation.sweep import markdown
from iwin_dit.evaluation.videos import Cut
from iwin_dit.metrics.digits import DigitsFeatures
from iwin_dit.metrics.images import ImageTensor
from iwin_dit.metrics.moving_digits import MovingDigitsFeatures, summarise
from iwin_dit.training.config import parse_config
from iwin_dit.training.evaluation import build_request
from iwin_dit.training.pictures import build_pipeline, export
from tests.test_evaluate_fid import MeanColours, launch, run
from tests.test_evaluation import Pair, pair  # noqa: F401 - the fixture
from tests.tools import tiny_model, tiny_vae, tiny_video_model

FRAMES = 4
MOVING_DIGITS = Path(evaluate_fid.__file__).parent / "configs" / "moving_digits.yaml"
ABOUT = {"path": "runs/x", "weights": "ema", "weights_sha256": {"file": "0" * 64}, "step": 7}


def video_pipeline(
    side: int = 32, fps: float = 8.0, frame_stride: int | None = 1, **model: Any
) -> IwinDiTVideoPipeline:
    """Random weights, ten classes, 4 frames of 32 x 32."""
    model = {"sample_size": (FRAMES, side // 2, side // 2), "patch_size": (1, 4, 4), **model}
    return IwinDiTVideoPipeline(
        tiny_video_model(**model),
        tiny_vae(),
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        fps=fps,
        frame_stride=frame_stride,
    )


@pytest.fixture(scope="module")
def pipe() -> IwinDiTVideoPipeline:
    return video_pipeline()


def samples(pipe: IwinDiTVideoPipeline, count: int = 6, **settings: Any) -> SampledImages:
    return SampledImages(pipe, count, Sampling(**{"steps": 2, **settings}), ABOUT)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a (random) classifier of moving digits where the script looks for one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DigitsFeatures().save(tmp_path / networks.MOTION_CLASSIFIER, {})
    return tmp_path


# --- samples by index


def test_clip_i_depends_on_its_index_alone(pipe: IwinDiTVideoPipeline) -> None:
    clips = samples(pipe)
    together = clips.read(range(6))
    assert together.shape == (6, FRAMES, 3, 32, 32)
    assert together.dtype == torch.uint8
    alone = torch.cat([clips.read([i]) for i in (5, 3)])
    assert (alone.int() - together[[5, 3]].int()).abs().max() <= 1  # 1e-4 can cross the border of two greys
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    (theirs,) = pipe([0, 1], num_inference_steps=2, generator=generators, output_type="pt", return_dict=False)
    assert (to_uint8(theirs).int() - together[:2].int()).abs().max() <= 1


def test_the_request_says_frames_and_their_rate(pipe: IwinDiTVideoPipeline) -> None:
    clips = samples(pipe)
    assert (clips.frames, clips.fps, clips.image_size) == (FRAMES, 8.0, [32, 32])
    request = clips.request()
    assert (request["frames"], request["fps"], request["image_size"]) == (FRAMES, 8.0, [32, 32])
    assert clips.record()["frames"] == FRAMES
    assert clips.name == "guidance 3, 2 steps, FlowMatchEulerDiscrete"
    longer = samples(pipe, frames=6)
    assert longer.read([0]).shape == (1, 6, 3, 32, 32)
    assert longer.request()["frames"] == 6
    images = SampledImages(IwinDiTPipeline(tiny_model(), tiny_vae(), pipe.scheduler), 4, Sampling(steps=2), ABOUT)
    assert (images.frames, images.fps) == (None, None)
    assert "frames" not in images.request()


def test_settings_that_a_pipeline_does_not_take_are_refused(pipe: IwinDiTVideoPipeline) -> None:
    image_pipe = IwinDiTPipeline(tiny_model(), tiny_vae(), pipe.scheduler)
    with pytest.raises(ValueError, match="frames are for video pipelines alone, got 8 for IwinDiTPipeline"):
        SampledImages(image_pipe, 4, Sampling(frames=8), ABOUT)
    with pytest.raises(ValueError, match="num_frames"):
        samples(video_pipeline(patch_size=(2, 4, 4)), frames=3)
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        samples(pipe, frames=0)
    with pytest.raises(ValueError, match="guidance_scale must be at least 1"):
        samples(pipe, guidance=0.5)


def test_a_model_without_a_null_class_is_not_guided_by_default(pipe: IwinDiTVideoPipeline) -> None:
    assert samples(pipe).settings["guidance_scale"] == 3
    unguided = samples(video_pipeline(class_dropout_prob=0.0))
    assert unguided.settings["guidance_scale"] == unguided.request()["guidance_scale"] == 1
    assert unguided.name == "guidance 1, 2 steps, FlowMatchEulerDiscrete"


# --- moving digits through the engine


class MeanOfFrames(MeanColours):
    """The same of clips of `FRAMES` frames: 12 numbers."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return torch.nn.functional.pad(x.mean(dim=[3, 4]).flatten(1), [0, 400 - 12])


class Asked(LabelledClips):
    """Clips that are not read ahead, as samples are not."""

    prefetch = False

    def __init__(self, clips: Tensor, labels: Sequence[int]) -> None:
        super().__init__(clips, labels, stride=1)
        self.asked: list[int] = []

    def read(self, indices: Sequence[int]) -> Tensor:
        self.asked += indices
        return super().read(indices)


def evaluator(batch_size: int = 4) -> Evaluator:
    torch.manual_seed(0)
    network = MovingDigitsFeatures(DigitsFeatures(), 16, FRAMES).requires_grad_(False).eval()
    request = Request(("moving_digits",), "moving_digits", cut=Cut(ClipSettings(FRAMES)), batch_size=batch_size)
    return Evaluator(request, networks={"motion": network})


def fakes(count: int = 11) -> Asked:
    """Real clips at twice the speed, of which some frames are blank, under labels of which some are wrong."""
    real = moving_digits(ClipSettings(FRAMES, frame_stride=2))
    clips, labels = real.read(range(count)).clone(), real.labels(range(count))
    clips[3, 1:] = 0
    return Asked(clips, [(label + i % 2) % 10 for i, label in enumerate(labels)])


def measure(engine: Evaluator, clips: LabelledClips | None = None, **settings: Any) -> Measurement:
    measurement = engine.measure(clips or fakes(), progress=False, **settings)
    assert measurement is not None
    return measurement


def values(measurement: Measurement) -> dict[str, float]:
    return {name: entry["value"] for name, entry in measurement.values.items()}


def test_the_values_are_those_of_direct_computation() -> None:
    engine, fake, real = evaluator(), fakes(), moving_digits(ClipSettings(FRAMES))
    measurement = measure(engine)
    network = engine.networks["motion"]
    mine = summarise(network(fake.images)["motion"], fake.labels(range(11)))
    theirs = summarise(network(real.images)["motion"], real.labels(range(300)))
    assert measurement.values == {
        "digit_recognition": {
            "value": pytest.approx(mine.recognition),
            "floor": {"value": pytest.approx(theirs.recognition), "n": 300},
            "by_class": pytest.approx(list(mine.by_class)),
        },
        "digit_displacement": {
            "value": pytest.approx(mine.displacement / theirs.displacement),
            "pixels": pytest.approx(mine.displacement),
            "real_pixels": pytest.approx(theirs.displacement),
        },
        "blank_frames": {"value": pytest.approx(3 / 44), "floor": {"value": 0, "n": 300}},
    }
    assert 1.5 < measurement.values["digit_displacement"]["value"] < 2.5
    assert (measurement.n_fake, measurement.n_real) == (11, 300)
    record = json.loads(json.dumps(measurement.record, allow_nan=False))
    reference = record["reference"]
    assert (reference["path"], reference["frames"], reference["frame_stride"]) == ("moving_digits", FRAMES, 1)
    assert record["reference"]["images"] == {"n": 300, "of": 300}
    assert record["features"]["motion"]["widths"] == {"motion": 14}
    assert record["protocol"] is None
    assert engine.kept_bytes(11) == 4 * 14 * (11 + 300)


def test_real_clips_against_themselves() -> None:
    entry = measure(evaluator(), moving_digits(ClipSettings(FRAMES))).values
    assert entry["digit_recognition"]["value"] == entry["digit_recognition"]["floor"]["value"]
    assert entry["digit_displacement"]["value"] == 1
    assert entry["blank_frames"]["value"] == 0


def test_lines_and_tables_for_people() -> None:
    measurement = measure(evaluator())
    recognition, displacement, blank = lines(measurement, "guidance 4, 50 steps, UniPCMultistep", Path("fid.json"))
    start = "(11 samples vs 300 real, guidance 4, 50 steps, UniPCMultistep): "
    entries = measurement.values
    value, floor = entries["digit_recognition"]["value"], entries["digit_recognition"]["floor"]["value"]
    assert recognition == f"digit_recognition {start}{value:.5g}; 300 real clips score {floor:.3g}   [fid.json]"
    value, mine, real = (entries["digit_displacement"][key] for key in ("value", "pixels", "real_pixels"))
    assert displacement == (
        f"digit_displacement {start}{value:.5g} of the real clips', {mine:.3g} to {real:.3g} pixels a frame   "
        "[fid.json]"
    )
    assert blank == f"blank_frames {start}{3 / 44:.5g}; 300 real clips score 0   [fid.json]"
    generated = {
        **{"path": "runs/x", "weights": "ema", "step": None, "scheduler": {"class": "DDIMScheduler"}, "seed": 0},
        **{"guidance_interval": [0.0, 1.0], "guidance_channels": None, "labels": "balanced", "n": 11},
        **{"num_inference_steps": 50, "frames": FRAMES},
    }
    results = []
    for guidance, ratio, share in ((1.0, 0.5, 0.2), (2.0, 1.2, 0.1), (3.0, 1.9, 0.0)):
        metrics = json.loads(json.dumps(entries))
        metrics["digit_recognition"]["value"] = guidance / 4
        metrics["digit_displacement"]["value"], metrics["blank_frames"]["value"] = ratio, share
        reference = {"path": "moving_digits"}
        settings = {**generated, "guidance_scale": guidance}
        results.append({"metrics": metrics, "generated": settings, "reference": reference, "protocol": None})
    caption, _, *table = markdown(results).splitlines()
    assert (
        f"frames {FRAMES}, reference moving_digits, protocol none, floor of digit_recognition {floor:.3g} (300 real)"
        in (caption)
    )
    assert table[2:] == [
        "| 1 | 0.25 | 0.5 | 0.2 |",
        "| 2 | 0.5 | **1.2** | 0.1 |",
        "| 3 | **0.75** | 1.9 | **0** |",
    ]


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    expected = values(measure(evaluator()))
    turns = iter(range(1000))
    first = fakes()
    stopped = evaluator().measure(
        first,
        partial=Partial(tmp_path / "partial", {"seed": 0}),
        stopping=lambda: bool(first.asked) and next(turns) >= 1,
        progress=False,
    )
    assert stopped is None
    again = fakes()
    measurement = measure(evaluator(3), again, partial=Partial(tmp_path / "partial", {"seed": 0}))
    assert again.asked == list(range(len(first.asked), 11))
    assert values(measurement) == pytest.approx(expected)


def squares() -> Asked:
    """Eleven clips of a square: clip i moves by 1 + i mod 4 pixels a frame; two frames are blank; four labels right."""
    clips = torch.zeros(11, FRAMES, 3, 32, 32, dtype=torch.uint8)
    for i, clip in enumerate(clips):
        for t, frame in enumerate(clip):
            left = 2 + t * (1 + i % 4)
            frame[:, i : i + 8, left : left + 8] = 255
    shown = int(evaluator().networks["motion"](clips)["motion"][0, :10].argmax())  # all are alike to the classifier
    clips[1, 0] = clips[6, 3] = 0
    return Asked(clips, [shown if i % 3 == 1 else (shown + 1) % 10 for i in range(11)])


def assert_known(measurement: Measurement) -> None:
    """The values that `squares` must have."""
    assert measurement.n_fake == 11
    steps = [1 + i % 4 for i in range(11) for t in range(3) if (i, t) not in ((1, 0), (6, 2))]
    entries = measurement.values
    assert entries["digit_displacement"]["pixels"] == pytest.approx(np.median(steps), abs=1e-5)
    assert entries["digit_recognition"]["value"] == pytest.approx((4 - 1 / 4) / 11, abs=1e-7)  # clips 1, 4, 7, 10
    assert entries["blank_frames"]["value"] == pytest.approx(2 / 44, abs=1e-7)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 50])
def test_known_values_in_batches_of_any_size(batch_size: int) -> None:
    assert_known(measure(evaluator(batch_size), squares()))


def _measure(rank: int) -> Measurement:
    return measure(evaluator(), squares())


@pytest.mark.slow
def test_two_processes_give_the_known_values(pair: Pair) -> None:  # noqa: F811
    first, second = pair(_measure)
    assert first == second
    assert first.record["run"]["processes"] == 2
    assert_known(first)


def test_sets_that_a_metric_is_not_of_are_refused(pipe: IwinDiTVideoPipeline) -> None:
    image_pipe = IwinDiTPipeline(tiny_model(), tiny_vae(), pipe.scheduler)
    images = SampledImages(image_pipe, 4, Sampling(steps=1), ABOUT)
    with pytest.raises(ValueError, match="moving_digits is of clips, got images: guidance 3"):
        evaluator().check(images)
    with pytest.raises(ValueError, match="expected clips of 4 frames, got 6 in guidance 3"):
        evaluator().check(samples(pipe, frames=6))
    unlabelled = ImageTensor(torch.zeros(2, FRAMES, 3, 32, 32, dtype=torch.uint8), "files")
    with pytest.raises(ValueError, match=r"asks whether a clip shows its label: .* got files, which has no labels"):
        evaluator().check(unlabelled)
    engine = Evaluator(Request(("is",)), networks={"inception": MovingDigitsFeatures(DigitsFeatures(), 16, 4)})
    with pytest.raises(ValueError, match="is is of images, got clips: guidance 3"):
        engine.check(samples(pipe))
    hundred = video_pipeline(num_classes=100)
    with pytest.raises(ValueError, match="moving_digits knows the classes 0 to 9, got clips of class 11"):
        evaluator().check(samples(hundred, 12))


def test_two_speeds_are_warned_of() -> None:
    reference = {"path": "r", "image_size": [32, 32], "protocol": None, "fps": 25.0}
    [warning] = early_warnings(reference, [32, 32], None, 8.0)
    assert warning.startswith("the reference's clips have 25 frames per second, the generated ones 8")
    assert early_warnings(reference, [32, 32], None, 24.98) == []
    [warning] = early_warnings(reference, [32, 32], None)
    assert "25 frames per second, and the generated ones do not say: give --frame-rate" in warning
    assert "fps" not in evaluator().about_reference()  # moving digits: their motion is per frame


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("fvd",), "cut": Cut(ClipSettings(1))}, "fvd is of motion: .* of at least 2 frames, got 1"),
        (
            {"metrics": ("moving_digits",), "cut": Cut(ClipSettings(4, 8))},
            "a frame rate and a resolution are for the f",
        ),
        ({"metrics": ("moving_digits",), "max_broken": 1}, "max_broken and num_real are for the files of fvd"),
        ({"metrics": ("fid",), "num_real": 9}, "max_broken and num_real are for the files of fvd, got fid"),
        ({"metrics": ("fvd",), "max_broken": -1}, "max_broken of at least 0 and a num_real of at least 2, got -1"),
        ({"metrics": ("fvd",), "num_real": 1}, "a num_real of at least 2, got 0 and 1"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**settings)


@pytest.mark.slow
def test_the_classifier_recognises_real_clips_and_tells_wrong_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = Evaluator(Request(("moving_digits",), "moving_digits", batch_size=100))
    record = json.loads((tmp_path / networks.MOTION_CLASSIFIER / "classifier.json").read_text())
    assert record["held_out_accuracy"] >= 0.98
    real = moving_digits(ClipSettings(16))
    found = measure(engine, real).values["digit_recognition"]
    assert found["value"] == found["floor"]["value"] == pytest.approx(record["held_out_accuracy"], abs=1e-3)
    assert min(found["by_class"]) > 0.9
    wrong = LabelledClips(real.images, [(label + 1) % 10 for label in real.labels(range(300))], 1)
    assert measure(engine, wrong).values["digit_recognition"]["value"] < 0.01
    monkeypatch.setattr(networks, "train_motion_classifier", None)  # a second training would fail
    Evaluator(Request(("moving_digits",), "moving_digits"))


# --- the script


def write_clips(folder: Path, count: int, size: tuple[int, int], frames: int = 9) -> Path:
    """Folders of frames of (width, height), each of one grey."""
    for clip in range(count):
        place = folder / "class" / f"clip{clip}"
        place.mkdir(parents=True)
        for frame in range(frames):
            Image.new("L", size, 10 * clip + 5 * frame).save(place / f"{frame}.png")
    return folder


@pytest.mark.slow
def test_a_video_model_is_measured_by_moving_digits(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video_pipeline().save_pretrained("run/pipeline")
    result = run("--model", "run", "--num-samples", "12", "--steps", "1", out="a.json")
    assert list(result["metrics"]) == ["digit_recognition", "digit_displacement", "blank_frames"]
    generated = result["generated"]
    assert (generated["n"], generated["frames"], generated["fps"]) == (12, FRAMES, 8.0)
    assert (result["reference"]["path"], result["reference"]["frames"]) == ("moving_digits", FRAMES)
    assert "digit_recognition (12 samples vs 300 real, guidance 3, 1 steps, " in capsys.readouterr().out
    longer = run("--model", "run", "--num-samples", "2", "--steps", "1", "--frames", "6", out="c.json")
    assert (longer["generated"]["frames"], longer["reference"]["frames"]) == (6, 6)


@pytest.mark.slow
def test_two_processes_of_the_script_give_the_values_of_one(workplace: Path) -> None:
    """Of features that do not jump where a pixel differs by a grey level, as it may between batches."""
    torch.jit.save(torch.jit.script(MeanOfFrames()), workplace / "i3d.pt")
    video_pipeline().save_pretrained("pipeline")
    write_clips(workplace / "real", 5, (32, 32))
    arguments = ("--model", "pipeline", "--num-samples", "7", "--steps", "1", "--batch-size", "2")
    arguments += ("--reference", "real", "--i3d", "i3d.pt")
    one = run(*arguments, "--batch-size", "7")
    with launch(2, *arguments, "--out", "two.json") as process:
        assert process.wait(timeout=300) == 0
    two = json.loads(Path("two.json").read_text())
    assert two["run"]["processes"] == 2
    assert two["generated"]["n"] == 7
    value, floor = (one["metrics"]["fvd_7"][key] for key in ("value", "floor"))
    assert two["metrics"]["fvd_7"]["value"] == pytest.approx(value, rel=1e-4)
    assert two["metrics"]["fvd_7"]["floor"]["value"] == pytest.approx(floor["value"], rel=1e-6)


@pytest.mark.slow
def test_a_video_model_is_measured_by_fvd(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against clips cut as training cuts them: at the model's rate, of its size, from the middle."""
    torch.jit.save(torch.jit.script(MeanOfFrames()), workplace / "i3d.pt")
    video_pipeline(fps=4.0).save_pretrained("pipeline")
    write_clips(workplace / "real", 5, (48, 40))
    model = ("--model", "pipeline", "--num-samples", "6", "--steps", "1", "--reference", "real", "--i3d", "i3d.pt")
    result = run(*model)
    assert list(result["metrics"]) == ["fvd_6"]
    reference = result["reference"]
    assert (reference["frames"], reference["frame_stride"], reference["frame_rate"]) == (FRAMES, 1, 4.0)
    assert (reference["resolution"], reference["image_size"], reference["fps"]) == (32, [32, 32], 4.0)
    real = np.array([[10 * clip + 5 * frame for frame in range(2, 6)] * 3 for clip in range(5)], float)
    pipe = IwinDiTVideoPipeline.from_pretrained("pipeline")
    fake = SampledImages(pipe, 6, Sampling(steps=1), ABOUT).read(range(6)).double().mean(dim=(3, 4))
    fake = fake.transpose(1, 2).flatten(1).numpy()
    m1, m2, S1, S2 = *(x.mean(0) for x in (real, fake)), *(np.cov(x, rowvar=False, ddof=0) for x in (real, fake))
    cross = np.sqrt(np.maximum(np.linalg.eigvals(S1 @ S2).real, 0)).sum()
    expected = ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * cross
    assert result["metrics"]["fvd_6"]["value"] == pytest.approx(expected, rel=1e-2)
    printed = capsys.readouterr().err
    assert "warning: the reference's clips have" not in printed
    other = run(*model, "--frame-stride", "2", out="other.json")["reference"]  # the rate is the model's still
    assert (other["frame_stride"], other["frame_rate"], other["fps"]) == (2, 4.0, 2.0)
    assert "the reference's clips have 2 frames per second, the generated ones 4" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["fvd", "moving_digits"])
def test_real_clips_are_cut_as_training_cuts_them(workplace: Path, metric: str) -> None:
    torch.jit.save(torch.jit.script(MeanOfFrames()), workplace / "i3d.pt")
    write_clips(workplace / "real", 3, (48, 40))
    of_files = ("--reference", "real", "--i3d", "i3d.pt") if metric == "fvd" else ()
    words = ["--eval.metrics", metric, *(word.replace("--", "--eval.") for word in of_files)]
    words += ["--data.frames", str(FRAMES), "--data.frame_rate", "12.5", "--data.frame_stride", "2"]
    words += ["--data.resolution", "32", "--model.sample_size", f"[{FRAMES}, 16, 16]"]
    config = parse_config(["--config", str(MOVING_DIGITS), *words])
    model = tiny_video_model(sample_size=(FRAMES, 16, 16))
    trained = build_pipeline(config, model, LatentCodec(tiny_vae()), DIGIT_NAMES)
    export(trained, workplace / "run" / "pipeline", 7)
    args = evaluate_fid.parse_arguments(["--model", "run", "--metrics", metric, *of_files])
    accelerator = evaluate_fid.start()
    _, comparison = evaluate_fid.open_pipeline("run", args, accelerator)
    assert comparison.cut == build_request(config).cut
    assert comparison.cut.clips == ClipSettings(FRAMES, 12.5 if metric == "fvd" else None, 2)


def test_what_does_not_fit_the_model_is_refused_before_the_work(workplace: Path) -> None:
    video_pipeline().save_pretrained("video")
    video_pipeline(side=16).save_pretrained("small")
    video_pipeline(fps=4.0).save_pretrained("slow")
    video_pipeline(frame_stride=None).save_pretrained("unknown")
    torch.jit.save(torch.jit.script(MeanOfFrames()), workplace / "i3d.pt")
    IwinDiTPipeline(tiny_model(), tiny_vae(), FlowMatchEulerDiscreteScheduler()).save_pretrained("images")
    write_clips(workplace / "real", 2, (32, 32))
    cases = [
        ("--model video --metrics fid --reference real", "fid is of images, to measure are clips: expected fvd or mov"),
        ("--model video --reference digits", "moving_digits compares with itself alone, got reference digits"),
        ("--model video --reference real", "fvd needs the TorchScript file of I3D"),
        ("--model video --save-images png", "--save-images has no meaning with video, .*`sample.py --format frames`"),
        ("--model video --save-npz a.npz", "--save-npz has no meaning with video, .*`sample.py --format frames`"),
        ("--model video --frames 1", "moving_digits is of motion: expected clips of at least 2 frames, got 1"),
        ("--model small", "moving_digits takes images of 32 x 32, got 16 x 16"),
        ("--model images --frames 8", "--frames has no meaning with --metrics frechet_digits"),
        ("--model images --metrics moving_digits", "moving_digits is of clips, to measure are images: expected fid or"),
        (
            "--model unknown --reference real --i3d i3d.pt",
            "unknown does not say how its training cut clips .*: give --f",
        ),
        ("sweep --model video images --out sweep", "moving_digits is of clips, to measure are images"),
        (
            "sweep --model video slow --reference real --i3d i3d.pt --out sweep",
            "alike, got video .* of 8 a second, .* and slow .* of 4",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate_fid.main(arguments.split())
    assert not [path for path in (Path("png"), Path("fid.json"), Path("a.npz")) if path.exists()]


@pytest.mark.slow
def test_a_sweep_of_a_video_model(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video_pipeline().save_pretrained("runs/a/pipeline")
    command = ["sweep", "--model", "runs/a", "--guidance", "1", "2", "--steps", "1", "--num-samples", "4"]
    evaluate_fid.main([*command, "--out", "sweep"])
    table = capsys.readouterr().out
    assert "| guidance | digit_recognition | digit_displacement | blank_frames |" in table
    with Path("sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["guidance"] for row in rows] == ["1.0", "2.0"]
    assert {row["frames"] for row in rows} == {str(FRAMES)}
    assert Path("sweep/sweep.png").is_file()
    evaluate_fid.main([*command, "--out", "sweep"])  # nothing is left to do
