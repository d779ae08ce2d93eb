"""The benchmarks' sides agree, their counts are right and their command lines work; nothing here is timed."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import block, data, evaluation, protocols, published
from benchmarks.measure import peak_memory, quartiles, time_interleaved

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
TINY = ["--width", "16", "--heads", "2", "--batch-tokens", "64", "--repeats", "2", "--threads", "1"]


@pytest.fixture
def sides():
    torch.manual_seed(0)
    return block.build_sides(side=8, width=16, heads=2, kernel=3, windows=[2, 4])


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return block.random_inputs(side=8, batch=2, width=16, device=CPU, dtype=torch.float32)


def test_sides_agree(sides, inputs):
    errors = block.check_agreement(sides, inputs)
    assert set(errors) == {"iwin 2", "iwin 4", "global"}
    assert max(errors.values()) < 1e-5


def test_windows_matter(sides, inputs):
    """The agreement above is none of branches that cancel: sides of different windows do differ."""
    outputs = [sides[name](*inputs[:2]) for name in ("iwin 2", "iwin 4", "global", "floor")]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("branch", ["attn", "conv"])
def test_disagreement_is_loud(sides, inputs, branch):
    with torch.no_grad():
        next(sides["four-copy 4"].get_submodule(branch).parameters()).mul_(1.1)
    with pytest.raises(RuntimeError, match="'iwin 4' and its straightforward twin must agree"):
        block.check_agreement(sides, inputs)


def test_neighbours_instead_of_interleaved_disagree(sides, inputs):
    sides["iwin 4"].attn.interleaved = False
    with pytest.raises(RuntimeError, match="iwin 4"):
        block.check_agreement(sides, inputs)


def test_the_floor_maps_tokens_on_their_own_and_trains_every_layer(sides, inputs):
    x, conditioning, _ = inputs
    seen = torch.autograd.grad(sides["floor"](x, conditioning)[0, 3, 5].sum(), x)[0].any(-1)
    assert seen.nonzero().tolist() == [[0, 3, 5]]
    assert all(gradient.any() for gradient in block.gradients(sides["floor"], inputs))


def test_multiply_adds():
    macs = block.count_macs(side=8, width=16, heads=2, kernel=3, windows=[4])
    linear = 64 * (4 * 16**2 + 3 * 16 * int(2 / 3 * 64)) + 7 * 16**2  # projections, SwiGLU; modulation, once a sample
    convolution = 9 * 64 * 16
    assert macs == {
        "floor": linear,
        "global": linear + convolution + 2 * 64 * 64 * 16,
        "iwin 4": linear + convolution + 2 * 16 * 64 * 16,
        "four-copy 4": linear + convolution + 2 * 16 * 64 * 16,
    }


def test_window_that_does_not_divide():
    with pytest.raises(ValueError, match=r"must divide the grid, got window 3 for 8 x 8"):
        block.build_sides(side=8, width=16, heads=2, kernel=3, windows=[3])


def test_windows_measured():
    assert [block.windows_for(side, 3) for side in (8, 16, 32, 64)] == [[8, 4], [8], [8, 16], [16, 32]]


def test_peak_memory():
    def two_kept_one_released():
        a = torch.empty(1000)
        del a
        b, c = torch.empty(3000), torch.empty(500)
        return b, c

    steps = {"kept": two_kept_one_released, "nothing": lambda: None}
    assert peak_memory(steps, CPU) == {"kept": 4 * 3500, "nothing": 0}


def test_rounds_are_interleaved_and_warm_up_is_not_counted():
    order = []
    seconds = time_interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, repeats=3)
    assert "".join(order) == "ab" * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert quartiles([3.0, 1.0, 2.0]) == [1.5, 2.0, 2.5]


def test_command(tmp_path, capsys):
    out = tmp_path / "run.json"
    threads = torch.get_num_threads()
    block.main([*TINY, "--tokens", "64", "--out", str(out)])
    torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    assert {"device", "threads", "commit", "packages", "load_average_before"} <= set(record["machine"])
    assert record["settings"]["tokens"] == [64]
    assert [row["global_exchange"]["window"] for row in record["rows"]] == [[8, 8], [4, 4]]
    for row in record["rows"]:
        assert row["batch"] == 1
        assert set(row["sides"]) == {"iwin", "four-copy", "global", "floor"}
        assert set(row["ratios"]) == {"four-copy / iwin", "global / iwin", "iwin / floor"}
        low, median, high = row["ratios"]["iwin / floor"]["time"]
        assert 0 < low <= median <= high
        assert row["ratios"]["four-copy / iwin"]["macs"] == 1
    assert capsys.readouterr().out.strip() == block.table(record["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "200"], "square number of tokens"),
        (["--tokens", "256", "--batch-tokens", "300"], "multiple of every --tokens"),
        (["--repeats", "0"], "positive integer, got 0"),
        (["--dtype", "float16"], "invalid choice"),
    ],
)
def test_mistaken_commands(arguments, message, capsys):
    with pytest.raises(SystemExit):
        block.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the memory of this process")
def test_data_command(tmp_path, capsys):
    out, threads = tmp_path / "run.json", torch.get_num_threads()
    sizes = ["--items", "64", "--batch", "4", "--batches", "2", "--repeats", "1", "--reads", "500", "--threads", "1"]
    data.main([*sizes, "--posterior", "mean_std", "--out", str(out)])
    torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    assert [(row["what"], row["workers"]) for row in record["rows"]] == [
        *(("read", 0), ("read", 2), ("training", 0), ("training", 2)),
    ]
    assert all(row["latents_per_second"][0] > 0 for row in record["rows"])
    assert record["anonymous_memory"]["reads"] == 500
    assert capsys.readouterr().out.strip() == data.table(record)
    with pytest.raises(SystemExit):
        data.main(["--items", "0"])
    assert "--items: expected a positive integer, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_command(tmp_path, capsys):
    out = tmp_path / "run.json"
    sizes = ["--images", "4", "--size", "64", "--batch-size", "2", "--repeats", "1", "--count", "100"]
    evaluation.main([*sizes, "--out", str(out)])
    record = json.loads(out.read_text())
    assert set(record["passes"]["images_per_second"]) == {"network", "memory", "png", "npz"}
    assert record["passes"]["share_of_the_network"]["network"] == [1, 1, 1]
    assert record["statistics"]["seconds_per_distance"] > 0
    peak = record["statistics"]["peak_bytes_above_start"]
    assert peak is None or 4 * 2023**2 * 8 < peak < 300e6  # of so few images as of 50,000
    assert capsys.readouterr().out.strip() == evaluation.tables(record)


def test_the_peak_of_memory_is_found_though_it_has_gone():
    if evaluation.anonymous_memory() is None:
        pytest.skip("the system does not tell")
    with evaluation.PeakMemory() as peak:
        for _ in range(20):
            held = torch.ones(2**23, dtype=torch.float64)  # 64 MiB
            del held
    assert peak.bytes is not None
    assert 2**25 < peak.bytes < 2**27


def test_crops_are_seeded_and_of_the_photo():
    images = protocols.crops("china.jpg", 2, seed=0)
    assert images.shape == (2, 3, 256, 256)
    assert torch.equal(images, protocols.crops("china.jpg", 2, seed=0))
    assert not torch.equal(images, protocols.crops("china.jpg", 2, seed=1))
    assert 0 <= images.min() < 50 < 200 < images.max() <= 255
    assert (images != images.round()).any()  # as a decoder gives them: rounding is one of the variants


def test_jpeg_changes_an_image_a_little():
    images = protocols.crops("flower.jpg", 1, seed=0).round().to(torch.uint8)
    errors = [(protocols.through_jpeg(images, q).float() - images).abs().mean().item() for q in (95, 75)]
    assert 0 < errors[0] < errors[1] < 10


def test_protocols_table():
    rows = protocols.rows_of({"adm": 2.0, "other": 1.5})
    assert [row["difference_percent"] for row in rows] == [0, -25]
    assert "| other | 1.5000 | -25.00 % |" in protocols.table(rows)
    with pytest.raises(SystemExit):
        protocols.main(["--images", "7"])


def test_published_numbers_are_met_or_not():
    ours = {name: {"value": value} for name, (value, _) in published.PUBLISHED.items()}
    assert all(near for *_, near in published.compare(ours))
    ours["fid"]["value"] += 0.1
    assert [name for name, *_, near in published.compare(ours) if not near] == ["fid"]


def test_the_pages_show_the_stored_runs():
    """Commands on the pages parse, and their tables are those of the JSON files beside the benchmarks."""
    docs, results = PAGE.parent, PAGE.parents[1] / "benchmarks" / "results"
    modules = {"block": block, "evaluation": evaluation, "protocols": protocols}
    pages = {name: (docs / name).read_text() for name in ("performance.md", "evaluation.md")}
    commands = [
        found
        for text in pages.values()
        for found in re.findall(r"^python -m benchmarks\.(\w+)(.*)$", text.replace("\\\n", ""), re.MULTILINE)
    ]
    assert modules.keys() <= {name for name, _ in commands}
    for name, arguments in commands:
        if name in modules:
            modules[name].build_parser().parse_args(shlex.split(arguments, comments=True))
    blocks = sorted(results.glob("cpu-*.json"))
    assert blocks
    for path in blocks:
        assert block.table(json.loads(path.read_text())["rows"]) in pages["performance.md"]
    stored = json.loads((results / "evaluation-cpu-2cores.json").read_text())
    assert evaluation.tables(stored) in pages["evaluation.md"]
    assert protocols.table(json.loads((results / "protocols.json").read_text())["rows"]) in pages["evaluation.md"]
