"""Sweeps: every combination once, results read again, the table and the curves."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from filelock import FileLock
from PIL import Image
from torch._dynamo import config as dynamo

import evaluate_fid
from iwin_dit import IwinDiTPipeline
from iwin_dit.charts import Panel, Series, save_charts
from iwin_dit.data.digits import Digits
from iwin_dit.evaluation.evaluator import Evaluator, Request
from iwin_dit.evaluation.networks import CLASSIFIER
from iwin_dit.evaluation.samples import Sampling
from iwin_dit.evaluation.sweep import Point, grid, markdown, measure_grid, panels
from iwin_dit.metrics.digits import DigitsFeatures
from iwin_dit.metrics.network import FeatureNetwork
from tests.tools import tiny_model, tiny_vae


class MeanColours(FeatureNetwork):
    """The mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = {"digits": 3}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"digits": images.float().mean(dim=[2, 3])}

    def describe(self) -> dict:
        return {"name": "mean colours", "weights_sha256": "0"}


def result(guidance: float, fid: float, score: float, *, steps: int = 50, model: str = "runs/x") -> dict:
    """A result as in the JSON of a point."""
    generated = {
        "path": model,
        "weights": "ema",
        "step": None,
        "scheduler": {"class": "DDIMScheduler"},
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "guidance_interval": [0.0, 1.0],
        "guidance_channels": None,
        "labels": "balanced: i mod 10",
        "seed": 0,
        "n": 500,
    }
    metrics = {"fid_500": {"value": fid}, "is_500": {"value": score}}
    return {"metrics": metrics, "generated": generated, "reference": {"path": "r.npz"}, "protocol": "adm"}


RESULTS = [
    result(1.5, 3.25, 200.0),
    result(1.0, 9.5, 100.0),
    result(1.0, 8.5, 110.0, steps=250),
    result(1.5, 2.5, 215.84, steps=250),
]


def test_the_grid_is_every_combination_once():
    common = Sampling(seed=3)
    points = grid(["a", "b"], common, {"guidance": [1.0, 2.0, 1.0], "steps": [], "scheduler": ["DDIM"]})
    settings = [Sampling(guidance=scale, scheduler="DDIM", seed=3) for scale in (1.0, 2.0)]
    assert points == [Point(model, setting) for model in ("a", "b") for setting in settings]
    assert grid(["a"], common, {}) == [Point("a", common)]


def test_points_without_guidance_are_one():
    values = {"guidance": [1.0, 2.0], "guidance_interval": [(0.0, 1.0), (0.1, 0.9)], "guidance_channels": [3]}
    settings = [point.sampling for point in grid(["a"], Sampling(), values)]
    assert settings == [
        Sampling(guidance=1.0),
        Sampling(guidance=2.0, guidance_interval=(0.0, 1.0), guidance_channels=3),
        Sampling(guidance=2.0, guidance_interval=(0.1, 0.9), guidance_channels=3),
    ]


def test_the_table_has_the_floor():
    floor = {"value": 0.123, "n": 500, "against": 9500}
    with_floor = [{**r, "metrics": {"fid_500": {**r["metrics"]["fid_500"], "floor": floor}}} for r in RESULTS]
    assert "protocol adm, floor of fid_500 0.12 (500 real against 9500 others)\n" in markdown(with_floor)


def test_checkpoints_of_a_run_are_one_curve():
    found = [result(1.5, 9.0 - step, 1.0, model=f"runs/x/checkpoints/step-{step:08}") for step in (2, 1)]
    for entry, step in zip(found, (2, 1), strict=True):
        entry["generated"]["step"] = step
    [panel, _] = panels(found)
    assert panel.xlabel == "training step"
    assert [(series.label, series.x, series.y) for series in panel.series] == [("", (1, 2), (8.0, 7.0))]
    assert "model runs/x, " in markdown(found)
    assert "| training step | fid_500 |" in markdown(found)


def test_the_table_says_what_varies_and_marks_the_best():
    common, _, *table = markdown(RESULTS).splitlines()
    assert common.startswith("model runs/x, weights ema, ")
    assert "reference r.npz, protocol adm" in common
    assert "steps" not in common
    assert table == [
        "| steps | guidance | fid_500 | is_500 |",
        "| --- | --- | --- | --- |",
        "| 50 | 1.5 | 3.25 | 200 |",
        "| 50 | 1 | 9.5 | 100 |",
        "| 250 | 1 | 8.5 | 110 |",
        "| 250 | 1.5 | **2.5** | **215.84** |",
    ]


def test_the_curves_are_over_guidance_and_the_score_over_the_distance():
    distance, score = panels(RESULTS)
    assert (distance.xlabel, distance.ylabel, score.xlabel, score.ylabel) == (
        "guidance",
        "fid_500",
        "fid_500",
        "is_500",
    )
    assert [(s.label, s.x, s.y) for s in distance.series] == [
        ("steps 50", (1.0, 1.5), (9.5, 3.25)),
        ("steps 250", (1.0, 1.5), (8.5, 2.5)),
    ]
    assert [(s.x, s.y) for s in score.series] == [((9.5, 3.25), (100.0, 200.0)), ((8.5, 2.5), (110.0, 215.84))]


def test_without_guidance_the_curves_are_over_the_steps():
    [panel, _] = panels([result(2.0, 3.0, 1.0, steps=steps, model=m) for m in ("a", "b") for steps in (10, 20)])
    assert panel.xlabel == "steps"
    assert [series.label for series in panel.series] == ["model a", "model b"]


def test_charts_are_pictures_and_other_files_are_refused(tmp_path):
    panels = [Panel("x", "y", [Series("a", [1, 2], [3, 4]), Series("", [], [])], 3), Panel("x", "z", [])]
    save_charts(panels, tmp_path / "a.png", share_x=True)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.height < image.width
    with pytest.raises(ValueError, match=r"expected a picture such as a\.png, got a\.txt"):
        save_charts(panels, tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an untrained classifier and twenty digits in `real`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DigitsFeatures().save(tmp_path / CLASSIFIER, {})
    digits = Digits()
    Path("real").mkdir()
    for i in range(20):
        Image.fromarray(digits[i].permute(1, 2, 0).numpy()).save(f"real/{i:02}.png")
    return tmp_path


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(workplace: Path, capsys, caplog):
    model = tiny_model(sample_size=16, patch_size=2)
    for name in ("runs/a", "runs/b"):
        IwinDiTPipeline(model, tiny_vae(), FlowMatchEulerDiscreteScheduler()).save_pretrained(f"{name}/pipeline")
        model = tiny_model(sample_size=16, patch_size=2, num_layers=1)
    command = ["sweep", "--model", "runs/a", "runs/b", "--guidance", "1", "2", "--steps", "1", "--num-samples", "4"]
    command += ["--reference", "real", "--metrics", "frechet_digits", "--out", "sweep"]
    interval = ("--guidance-interval", "0.1", "0.9")
    with pytest.raises(ValueError, match="expected a scheduler of"):
        evaluate_fid.main([*command, "--scheduler", "UniPCMultistep", "DDIM"])
    (workplace / "runs/c/pipeline").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected a run folder"):
        evaluate_fid.main([*command[:4], "runs/c", *command[4:]])
    assert list(Path("sweep").iterdir()) == []  # every setting and model is looked at before the first sample
    with FileLock("sweep/sweep.lock"), pytest.raises(ValueError, match="another evaluation is writing sweep"):
        evaluate_fid.main(command)
    caplog.clear()
    evaluate_fid.main([*command, *interval])
    assert "point 3 of 4: runs/b, guidance 1, 1 steps, FlowMatchEulerDiscrete" in caplog.messages
    assert sum("4 samples cannot span 64 features" in message for message in caplog.messages) == 1
    table = capsys.readouterr().out
    results = {path: path.stat().st_mtime_ns for path in Path("sweep").glob("*.json")}
    assert sorted(path.name for path in results) == [
        f"runs-{name}_FlowMatchEulerDiscrete_steps-1_guidance-{scale}.json"
        for name in "ab"
        for scale in ("1_interval-0-1", "2_interval-0.1-0.9")
    ]
    assert "| runs/b | 2 | " in table
    assert Path("sweep/sweep.md").read_text() in table
    with Path("sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = {float(row["frechet_digits"]) for row in rows}
    assert values == {json.loads(path.read_text())["metrics"]["frechet_digits"]["value"] for path in results}
    assert {row["interval"] for row in rows} == {"0 to 1", "0.1 to 0.9"}

    evaluate_fid.main([*command, *interval, "--guidance-interval", "0", "1"])  # some of it is there already
    assert all(path.stat().st_mtime_ns == written for path, written in results.items())
    assert len(list(Path("sweep").glob("*.json"))) == 6
    assert {path.suffix for path in Path("sweep").iterdir()} == {".json", ".md", ".csv", ".png"}

    with pytest.raises(ValueError, match=r"was made otherwise \(generated\.seed is 0 there, 1 was asked for\)"):
        evaluate_fid.main([*command, *interval, "--seed", "1"])
    with pytest.raises(ValueError, match=r"generated\.compiled is nothing there, true was asked for"):
        evaluate_fid.main([*command, *interval, "--compile"])
    next(iter(results)).write_text("{}")
    with pytest.raises(ValueError, match="is not a result of a sweep"):
        evaluate_fid.main([*command, *interval])


@pytest.mark.slow
def test_models_of_different_sizes_are_compiled_one_after_the_other(workplace: Path):
    """A variant each, where torch may build one: what was compiled for a model is forgotten with it."""
    for heads in (1, 2):
        model = tiny_model(sample_size=16, patch_size=2, num_attention_heads=heads)
        IwinDiTPipeline(model, tiny_vae(), FlowMatchEulerDiscreteScheduler()).save_pretrained(str(heads))
    command = ["sweep", "--model", "1", "2", "--guidance", "1", "--steps", "1", "--num-samples", "4", "--compile"]
    command += ["--reference", "real", "--metrics", "frechet_digits", "--out", "sweep"]
    with dynamo.patch(recompile_limit=1):
        evaluate_fid.main(command)
    results = [json.loads(path.read_text()) for path in Path("sweep").glob("*.json")]
    assert [result["generated"]["compiled"] for result in results] == [True, True]


def test_the_table_is_there_after_every_point(tmp_path):
    pipe = IwinDiTPipeline(tiny_model(), tiny_vae(), FlowMatchEulerDiscreteScheduler())
    torch.manual_seed(0)
    network = MeanColours()
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8))
    evaluator = Evaluator(
        Request(("frechet_digits",), str(tmp_path / "real.npz")), networks={"digits": network.requires_grad_(False)}
    )
    points, opened, folder = grid(["a", "b"], Sampling(steps=1), {}), [], tmp_path / "sweep"
    folder.mkdir()

    def open_pipeline(model):
        opened.append(model)
        about = {"path": model, "weights": "ema", "weights_sha256": {model: "0"}, "step": None}
        return pipe, about

    done = measure_grid(points, open_pipeline, evaluator, 4, folder, stopping=(folder / "sweep.csv").exists)
    assert done is None
    assert opened == ["a", "b", "a", "b"]
    assert len((folder / "sweep.csv").read_text().splitlines()) == 2
    assert (folder / "sweep.png").is_file()
    [first, second] = measure_grid(points, open_pipeline, evaluator, 4, folder)
    assert len((folder / "sweep.csv").read_text().splitlines()) == 3
    assert first["metrics"] == second["metrics"]
