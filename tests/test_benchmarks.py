"""The benchmarks' sides agree, their counts are right and their command lines work; nothing here is timed."""

import contextlib
import copy
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn
from torch._inductor import config as inductor

import train_dit
from benchmarks import block, data, evaluation, goals, page, protocols, published, run, sample, sides, train
from benchmarks.goals import Goal, Result, by_axes, setting_of
from benchmarks.measure import OTHER, by_operator, kind_of, peak_memory, quartiles, ratio, time_interleaved
from benchmarks.modes import as_many_variants_as, build_modes, check_modes, options_of
from iwin_dit.models.compilation import compile_options, onednn_multiplies_faster
from iwin_dit.nn import IwinAttention
from iwin_dit.nn.windows import per_axis
from tests.tools import relative_error

CPU = torch.device("cpu")
DOCS = Path(__file__).parents[1] / "docs"
IMAGE = sides.Shape(grid=(8, 8), width=16, heads=2, kernel=(3, 3))
CLIP = sides.Shape(grid=(4, 4, 4), width=16, heads=2, kernel=(2, 3, 3))
WINDOWS = {IMAGE: [(2, 2), (4, 4)], CLIP: [(2, 2, 2), (2, 4, 1)]}


@pytest.fixture(params=[IMAGE, CLIP], ids=["image", "video"])
def shape(request):
    return request.param


@pytest.fixture
def modules(shape):
    torch.manual_seed(0)
    return sides.build_sides(shape, WINDOWS[shape])


@pytest.fixture
def inputs(shape):
    torch.manual_seed(1)
    return sides.random_inputs(shape, batch=2, device=CPU, dtype=torch.float32)


def test_sides_agree(shape, modules, inputs):
    errors = sides.check_agreement(modules, inputs)
    names = {IMAGE: {"iwin 2x2", "iwin 4x4"}, CLIP: {"iwin 2x2x2", "iwin 2x4x1", "spatial", "temporal"}}
    assert set(errors) == {*names[shape], "global"}
    assert max(errors.values()) < 1e-5


def test_the_straightforward_attention_is_dense_attention_under_a_mask(shape, modules, inputs):
    """Lemma 1: token i attends to token j if and only if i = j (mod G) on every axis."""
    i = torch.cartesian_prod(*map(torch.arange, shape.grid))  # (|S|, rank)
    heads = (shape.heads, shape.width // shape.heads)
    for name, side in modules.items():
        if not isinstance(attn := side.attn, IwinAttention) or name == "floor":
            continue
        window = per_axis(attn.window_size, len(shape.grid), "window")
        groups = torch.tensor([1 if m == -1 else n // m for n, m in zip(shape.grid, window, strict=True)])
        mask = ((i[:, None] - i[None, :]) % groups == 0).all(-1)
        x = inputs[0].flatten(1, -2)
        q, k, v = (f(x).unflatten(-1, heads).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        dense = F.scaled_dot_product_attention(attn.norm_q(q), attn.norm_k(k), v, attn_mask=mask)
        dense = attn.to_out(dense.transpose(1, 2).flatten(2)).view_as(inputs[0])
        assert relative_error(sides.FourCopyAttention(attn)(inputs[0]), dense) < 1e-5, name


def test_the_factorised_blocks_attend_within_a_frame_and_at_one_place():
    torch.manual_seed(0)
    blocks = sides.build_sides(CLIP, [])
    x = torch.randn(1, *CLIP.grid, CLIP.width, requires_grad=True)
    for name, reached in (("spatial", (0, 1)), ("temporal", (0, slice(None), 2, 3))):
        seen = torch.autograd.grad(blocks[name].attn(x)[0, 1, 2, 3].sum(), x)[0].any(-1)  # (B, T, H, W)
        assert seen.sum() == seen[reached].sum() == seen[reached].numel()


def test_windows_matter(modules, inputs):
    """The agreement above is none of branches that cancel: sides of different windows do differ."""
    outputs = [side(*inputs[:2]) for name, side in modules.items() if "four-copy" not in name]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("branch", ["attn", "conv"])
def test_disagreement_is_loud(modules, inputs, branch):
    modules["global"].get_submodule(branch).register_forward_hook(lambda module, given, output: 1.1 * output)
    with pytest.raises(RuntimeError, match="'global' and its straightforward twin must agree"):
        sides.check_agreement(modules, inputs)


def test_neighbours_instead_of_interleaved_disagree(shape, modules, inputs):
    name = f"iwin {by_axes(WINDOWS[shape][0])}"
    modules[name].attn.interleaved = False
    with pytest.raises(RuntimeError, match=name):
        sides.check_agreement(modules, inputs)


def test_the_floor_maps_tokens_on_their_own_and_trains_every_layer(shape, modules, inputs):
    x, conditioning, _ = inputs
    place = (0, 3, 2, 1)[: len(shape.grid) + 1]
    seen = torch.autograd.grad(modules["floor"](x, conditioning)[place].sum(), x)[0].any(-1)
    assert seen.nonzero().tolist() == [list(place)]
    assert all(gradient.any() for gradient in sides.forward_backward(modules["floor"], inputs)[1:])


def test_the_linear_layers_are_those_of_the_floor(modules, inputs):
    linear = sides.LinearLayers(modules["global"])
    assert all(gradient.any() for gradient in sides.forward_backward(linear, [inputs[0], inputs[2]]))
    modulation = sum(p.numel() for p in modules["global"].modulation.parameters())
    of_the_block = sum(
        p.numel() for m in modules["global"].modules() if isinstance(m, nn.Linear) for p in m.parameters()
    )
    assert sum(p.numel() for p in linear.parameters()) == of_the_block - modulation


def test_torch_convolves_alike_with_and_without_copies(shape, modules, inputs):
    conv = modules["global"].conv
    expected = sides.forward_backward(conv, [inputs[0], inputs[2]])
    for copies in (True, False):
        ours = sides.forward_backward(sides.TorchConv(conv, copies), [inputs[0], inputs[2]])
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, expected, strict=True))


def test_multiply_adds():
    linear = 64 * (4 * 16**2 + 3 * 16 * int(2 / 3 * 64)) + 7 * 16**2  # projections, SwiGLU; modulation, once a sample
    convolution = 9 * 64 * 16
    assert block.count_macs(IMAGE, [(4, 4)]) == {
        "floor": linear,
        "global": linear + convolution + 2 * 64 * 64 * 16,
        "iwin 4x4": linear + convolution + 2 * 16 * 64 * 16,
        "four-copy 4x4": linear + convolution + 2 * 16 * 64 * 16,
    }
    convolution *= 2  # the tap that reads the frame before, convolved with all frames, the last one too
    assert block.count_macs(CLIP, [(2, 2, 2)]) == {
        "floor": linear,
        "global": linear + convolution + 2 * 64 * 64 * 16,
        "iwin 2x2x2": linear + convolution + 2 * 8 * 64 * 16,
        "spatial": linear + convolution + 2 * 16 * 64 * 16,
        "temporal": linear + convolution + 2 * 4 * 64 * 16,
    }


def test_the_mean_of_two_blocks():
    first, second = block.Measured([1.0, 4.0], 10, 2.0, 0.1), block.Measured([3.0, 2.0], 20, 6.0, 0.2)
    assert block.mean_of(first, second) == block.Measured([2.0, 3.0], 15, 4.0, 0.2)


def test_windows_measured():
    squares = [sides.windows_for(sides.Shape((side, side), 16, 2, (3, 3))) for side in (8, 16, 32, 64)]
    assert squares == [[(8, 8), (4, 4)], [(8, 8)], [(8, 8), (16, 16)], [(16, 16), (32, 32)]]
    clips = [sides.windows_for(sides.Shape(grid, 16, 2, goals.KERNELS[3])) for grid in block.GRIDS["video", "cpu"]]
    assert clips == [[(8, 8, 8), (4, 8, 8)], [(8, 8, 8)], [(8, 8, 8), (8, 16, 16)]]


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
    seconds = time_interleaved({name: functools.partial(order.append, name) for name in "abc"}, CPU, repeats=10)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 3  # each comes after any other
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 10)
    assert quartiles([3.0, 1.0, 2.0]) == (1.5, 2.0, 2.5)


def measured(tmp_path, capsys, *arguments):
    """Run the command; return its record, after checking what each suite writes and prints."""
    out, threads = tmp_path / "run.json", torch.get_num_threads()
    run.main([*arguments, "--threads", "1", "--out", str(out)])
    torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    assert {"device", "threads", "commit", "packages", "load_average_before"} <= set(record["machine"])
    assert all(low <= median <= high for low, median, high in (row["value"] for row in record["results"]))
    tables = f"{run.SUITES[record['suite']].tables(record)}\n\n{run.goals_of(record)}"
    assert capsys.readouterr().out.strip() == tables
    asked = {goal.what for goal in goals.GOALS if goal.suite == record["suite"]}
    found = {row["what"] for row in record["results"]}
    assert found <= asked  # or the table would leave it out
    if "compiled" in record["settings"].get("modes", ["compiled"]):
        assert found == asked
    return record


TINY = ["--width", "16", "--heads", "2", "--batch-tokens", "64", "--repeats", "2", "--modes", "eager"]


def test_block_command(tmp_path, capsys):
    record = measured(tmp_path, capsys, "--suite", "block", *TINY, "--grids", "8x8")
    assert record["settings"]["grids"] == [[8, 8]]
    assert [row["setting"]["window"] for row in record["rows"]] == [[8, 8], [4, 4]]
    for row in record["rows"]:
        assert row["batch"] == 1
        assert set(row["sides"]) == {"iwin", "four-copy", "global", "floor"}
        assert set(row["ratios"]) == {"four-copy / iwin", "global / iwin", "iwin / floor"}
        assert row["ratios"]["iwin / floor"]["time"][0] > 0
        assert row["ratios"]["four-copy / iwin"]["macs"] == 1


def test_video_command(tmp_path, capsys):
    record = measured(tmp_path, capsys, "--suite", "video", *TINY, "--grids", "8x4x4")
    assert record["settings"]["kernel"] == [2, 3, 3]
    assert [row["setting"]["window"] for row in record["rows"]] == [[8, 4, 4], [4, 2, 2]]
    for row in record["rows"]:
        assert row["batch"] == 1  # a sample larger than --batch-tokens is a batch of its own
        assert set(row["sides"]) == {"iwin", "global", "spatial", "temporal", "factorised", "floor"}
        assert set(row["ratios"]) == {"global / iwin", "factorised / iwin", "iwin / floor"}
        assert row["ratios"]["factorised / iwin"]["time"][0] > 0
        macs = {name: side["forward_gmacs_per_sample"] for name, side in row["sides"].items()}
        assert macs["factorised"] == (macs["spatial"] + macs["temporal"]) / 2
    assert record["rows"][0]["ratios"]["global / iwin"]["macs"] == 1  # a window of 8 is the whole grid
    assert [row["grid"] for row in record["convolution"]] == [[8, 4, 4]]
    for row in record["convolution"]:
        assert set(row["share_of_linear"]) == {"taps", "conv3d", "conv3d with copies"}
        assert min(min(share) for share in row["share_of_linear"].values()) > 0


def test_model_command(tmp_path, capsys):
    record = measured(tmp_path, capsys, "--suite", "model", *TINY, "--grids", "8x8", "--layers", "2")
    assert [row["setting"]["window"] for row in record["rows"]] == [[8, 8], [4, 4]]
    assert all(row["difference_from_twin"] < 1e-4 for row in record["rows"])
    assert record["rows"][0]["memory_over_global"] == pytest.approx(1, abs=0.05)  # one window is the whole grid


def test_train_command(tmp_path, capsys):
    batch = ["--batch-tokens", "512", "--layers", "1"]
    record = measured(tmp_path, capsys, "--suite", "train", *TINY, *batch)
    steps = [row["step"] for row in record["rows"]]
    assert steps[:4] == ["bare, eager", "whole, eager", "DiT, eager", "matrix product"]
    assert steps[4:] == ["matrix product, oneDNN"] * onednn_multiplies_faster()
    assert {row["what"] for row in record["results"]} == {
        *("whole step / bare step", "model FLOPs / matrix product peak", "diffusers' DiT, eager / ours, eager"),
    }
    assert set(record["profile"]) == {"eager"}
    assert all(record["profile"]["eager"][kind] > 0 for kind in ("matrix products", "attention", "convolution"))


@pytest.fixture
def training(tmp_path):
    """The training of a tiny train suite, eager and at step 0."""
    arguments = run.parse_arguments(["--suite", "train", *TINY, "--batch-tokens", "512", "--layers", "1"])
    data.write_synthetic(tmp_path, items=4096, shape=(sides.LATENT_CHANNELS, *train.GRID))
    with contextlib.ExitStack() as resources:
        yield train.open_steps(arguments, 2, tmp_path, "eager", resources)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_checking_the_steps_leaves_no_trace(training):
    before = training.state.snapshot()
    train.check_steps(training)
    after = training.state.snapshot()
    for part in ("model", "ema", "optimizer"):
        theirs = getattr(before, part)
        assert theirs.keys() == getattr(after, part).keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in getattr(after, part).items())
    assert after.state == before.state
    assert training.metrics.path.read_text() == ""


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"loss": 0.5}, "whole and a bare training step, of '.*', must agree"),
        ({"lr": 2.0}, "whole and a bare training step, of '.*', must agree"),
        ({"dropped": "blocks.0.attn.to_v.weight"}, r"bare .* left out blocks\.0\.attn\.to_v\.weight"),
        ({"halved": "final_layer.linear.bias"}, "of 'final_layer.linear.bias', must agree"),
    ],
)
def test_a_step_that_scales_or_drops_something_is_found(training, monkeypatch, mistake, message):
    """A bare step with a mistake in it: the loss, the learning rate, or the gradient of one parameter."""
    state = training.state

    def wrong_step(training, batch):
        losses, _ = train_dit.batch_losses(training, training.model, batch)
        (mistake.get("loss", 1.0) * losses.mean()).backward()
        for name, parameter in state.model.named_parameters():
            if name == mistake.get("dropped"):
                parameter.grad = None
            elif name == mistake.get("halved"):
                parameter.grad /= 2
        for group in state.optimizer.param_groups:
            group["lr"] *= mistake.get("lr", 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad()

    monkeypatch.setattr(train, "bare_step", wrong_step)
    with pytest.raises(RuntimeError, match=message):
        train.check_steps(training)


def test_ratios_of_the_train_suite_have_the_direction_of_their_names():
    seconds = {"DiT, eager": [6.0], "DiT, compiled": [5.0], "DiT, compiled-aten": [5.5]}
    seconds |= {"bare, eager": [3.0], "whole, eager": [3.3], "bare, compiled": [2.0], "whole, compiled": [2.5]}
    seconds |= {"bare, compiled-aten": [2.2], "whole, compiled-aten": [2.75]}
    shape = sides.Shape((16, 16), 16, 2, (3, 3))
    modes = ["eager", "compiled", "compiled-aten"]
    found = train.results_of(seconds, modes, flops=10.0, peak=[8.0], shape=shape)
    assert {(result.what, result.mode): result.value[1] for result in found} == {
        ("whole step / bare step", "eager"): pytest.approx(1.1),
        ("model FLOPs / matrix product peak", "eager"): pytest.approx(10 / 3.3 / 8),
        ("diffusers' DiT, eager / ours, eager", "eager"): 2,
        ("whole step / bare step", "compiled"): 1.25,
        ("model FLOPs / matrix product peak", "compiled"): 0.5,
        ("diffusers' DiT, eager / ours, compiled", "compiled"): 3,
        ("diffusers' DiT, compiled / ours, compiled", "compiled"): 2.5,
        ("whole step / bare step", "compiled-aten"): pytest.approx(1.25),
        ("model FLOPs / matrix product peak", "compiled-aten"): pytest.approx(10 / 2.75 / 8),
        ("diffusers' DiT, eager / ours, compiled", "compiled-aten"): pytest.approx(6 / 2.2),
        ("diffusers' DiT, compiled / ours, compiled", "compiled-aten"): pytest.approx(2.5),
    }


def test_ratios_of_a_block_have_the_direction_of_their_names():
    seconds = {"iwin 8x8": 2.0, "four-copy 8x8": 3.0, "global": 5.0, "floor": 1.0}
    sized = {name: block.Measured([value], int(10 * value), value, None) for name, value in seconds.items()}
    row = block.summarise(sides.Shape((16, 16), 16, 2, (3, 3)), 1, (8, 8), sized)
    expected = {"four-copy / iwin": 1.5, "global / iwin": 2.5, "iwin / floor": 2.0}
    assert {name: value["time"][1] for name, value in row["ratios"].items()} == expected
    assert {name: value["memory"] for name, value in row["ratios"].items()} == expected
    (result,) = block.results({"mode": "eager", **row})
    assert (result.what, result.value[1]) == ("Iwin block / its floor", 2.0)


def test_sample_command(tmp_path, capsys):
    sizes = ["--width", "16", "--heads", "2", "--layers", "1", "--images", "1", "--steps", "3", "--repeats", "1"]
    record = measured(tmp_path, capsys, "--suite", "sample", *sizes, "--modes", "eager")
    assert [(row["mode"], row["side"]) for row in record["rows"]] == [
        *(("eager", "interval"), ("eager", "interval (0, 0.89)"), ("eager", "both")),
    ]
    assert [row["what"] for row in record["results"]] == [
        *("both halves always / guidance interval", "both halves always / guidance interval (0, 0.89)"),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the memory of this process")
def test_data_command(tmp_path, capsys):
    sizes = ["--items", "64", "--batch", "4", "--batches", "2", "--repeats", "1", "--reads", "500"]
    record = measured(tmp_path, capsys, "--suite", "data", *sizes, "--posterior", "mean_std")
    assert [(row["what"], row["workers"]) for row in record["rows"]] == [
        *(("read", 0), ("read", 2), ("training", 0), ("training", 2)),
    ]
    assert all(row["latents_per_second"][0] > 0 for row in record["rows"])
    assert record["anonymous_memory"]["reads"] == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "block", "--grids", "16x0"], "positive integer, got 0"),
        (["--suite", "block", "--grids", "16x16x16"], "of 2 axes for --suite block, got 16x16x16, 3x3"),
        (["--suite", "video", "--kernel", "3x3"], "of 3 axes for --suite video"),
        (["--suite", "model", "--grids", "12x12"], "must divide the grid, got window 8x8 for 12x12 tokens"),
        (["--suite", "block", "--batch-tokens", "300"], "multiple of the 256 tokens of 16x16, or fewer, got 300"),
        (["--suite", "train", "--batch-tokens", "300"], "multiple of 256, got 300"),
        (["--suite", "block", "--repeats", "0"], "positive integer, got 0"),
        (["--suite", "block", "--dtype", "float16"], "invalid choice"),
        (["--suite", "block", "--device", "cuda", "--modes", "compiled-plain"], "invalid choice"),
        (["--suite", "sample", "--no-keep-memory"], "unrecognized arguments: --no-keep-memory"),
        (["--suite", "block", "--layers", "2"], "unrecognized arguments: --layers 2"),
        (["--suite", "data", "--device", "cuda"], "of the CPU alone, got --device cuda"),
        (["--suite", "speed"], "invalid choice: 'speed'"),
        ([], "--suite"),
    ],
)
def test_mistaken_commands(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


# --- modes, profile, goals


@pytest.mark.slow
def test_compiled_copies_agree_with_the_eager_modules(modules, inputs):
    torch.compiler.reset()
    built = build_modes(modules, ["eager", "compiled"], torch.float32)
    assert all(built["eager", name] is module for name, module in modules.items())
    with as_many_variants_as(built):
        check_modes(modules, built, inputs)
        with torch.no_grad():
            for parameter in modules["global"].attn.parameters():
                parameter.mul_(2)
        with pytest.raises(RuntimeError, match="'global' compiled and eager must agree"):
            check_modes(modules, built, inputs)


def test_modes_add_to_the_librarys_options():
    ours = compile_options(CPU)
    compiled, aten, plain = (options_of(mode, CPU) for mode in ("compiled", "compiled-aten", "compiled-plain"))
    assert compiled.keys() == ours.keys()
    assert aten == ours | {"post_grad_custom_post_pass": None}
    assert plain.keys() == ours.keys()
    assert all(plain[name] == getattr(inductor, name) for name in plain)


def test_low_precision_may_be_off_by_twice_what_eager_code_is(modules, inputs):
    block, low = modules["global"].bfloat16(), [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in inputs]
    other = copy.deepcopy(block)
    check_modes({"global": block}, {("compiled", "global"): other}, low)
    with torch.no_grad():
        other.attn.to_v.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="'global' compiled and eager must agree"):
        check_modes({"global": block}, {("compiled", "global"): other}, low)


def test_operators_by_kind():
    linear, x = nn.Linear(64, 64), torch.randn(64, 64)
    spent = by_operator({"step": lambda: linear(x).exp()}, CPU)["step"]
    assert spent["matrix products"] > 0
    assert spent["attention"] == spent["convolution"] == 0


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "attention",
            [
                "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4, false, "
                "false, cutlass::bfloat16_t, pytorch_flash::Flash_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t> "
                ">, false, false>(pytorch_flash::Flash_fwd_params)",
                "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<...>)",
                "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x64_4x1x1_kernel0_0",
                "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
            ],
        ),
        (
            "convolution",
            [
                "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::BFloat16, int>(...)",
                "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64_warpgroupsize1x1x1",
                "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4",
                "aten::mkldnn_convolution",
                "aten::convolution_backward",
            ],
        ),
        (
            "matrix products",
            [
                "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT",
                "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
                "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
                "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(...)",
                "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>(...)",
                "aten::addmm",
                "iwin_dit::onednn_mm",
                "mkldnn::_linear_pointwise",
            ],
        ),
        (
            "fused elementwise",
            [
                "triton_poi_fused_convolution_mul_add_3",
                "triton_red_fused__to_copy_mean_mul_pow_rsqrt_2",
                "triton_poi_fused__scaled_dot_product_flash_attention_clone_transpose_5",
                "cpp_fused_convolution_backward_mul_sum_4",
            ],
        ),
        (
            "optimizer, clipping, average",
            [
                "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
                "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float>>",
                "aten::_fused_adamw_",
                "aten::_foreach_norm",
                "aten::_foreach_lerp_",
            ],
        ),
        (
            "copies",
            [
                "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
                "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>>(int, ...)",
                "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<...>",
                "Memcpy HtoD (Pageable -> Device)",
                "aten::cat",
            ],
        ),
        (
            OTHER,
            [
                "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>(...)",
                "void at::native::_scatter_gather_elementwise_kernel<128, 8, ...>",
                "Memset (Device)",
            ],
        ),
    ],
)
def test_kernels_and_operators_are_sorted_by_what_they_are_for(kind, names):
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_ratios_are_taken_round_by_round():
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == (1.5, 2.0, 2.5)


def test_goals_are_met_or_not_or_not_measured():
    goal = Goal("block", "Iwin block / its floor", "at most", 1.10, 1.15, (16, 16), (8, 8))
    assert goal in goals.GOALS

    def verdicts(*values: float, device: str = "cpu", mode: str = "compiled", **settings: object) -> list[str]:
        found = [Result(goal.what, mode, (value,) * 3, goal.setting) for value in values]
        record = {"results": goals.as_dicts(found), "settings": goals.SETTINGS[device] | settings}
        table = goals.goals_table(device, {"block": record}, suites=["block"])
        return [line.split(" | ")[-1].removesuffix(" |") for line in table.splitlines()[2:]]

    assert verdicts() == ["not measured"] * 3
    assert verdicts(1.10, 1.11) == ["met", "**not met**", "not measured", "not measured"]
    assert verdicts(1.10, mode="eager")[0] == "met"
    assert verdicts(1.12, 1.16, device="cuda")[:2] == ["met", "**not met**"]
    for other in ({"width": 16}, {"dtype": "bf16"}, {"threads": 1}):
        assert verdicts(1.05, 1.11, **other)[:2] == ["other setting"] * 2
    assert verdicts(1.05, device="cuda", mode="eager")[0] == "other setting"


def test_the_goals_of_a_suite_are_for_its_own_sizes():
    settings = {"width": 1152, "dtype": "bf16", "layers": 28, "images": 32, "steps": 50, "threads": 16}
    for suite, different in (("train", "layers"), ("sample", "images"), ("sample", "steps")):
        assert goals.has_goals_settings({"settings": settings}, suite, "cuda", "compiled")
        assert not goals.has_goals_settings({"settings": settings | {different: 2}}, suite, "cuda", "compiled")


def test_less_than_global_is_less():
    (goal,) = (goal for goal in goals.GOALS if goal.bound == "less than")
    table = []
    for value in (1.0, 0.999):
        result = Result(goal.what, "compiled", (value,) * 3, goal.setting)
        record = {"results": goals.as_dicts([result]), "settings": goals.SETTINGS["cuda"]}
        table += [
            line for line in goals.goals_table("cuda", {"model": record}, ["model"]).splitlines() if "less" in line
        ]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in table] == ["**not met**", "met"]


def test_other_settings_of_a_goal_are_listed_without_one():
    result = Result("Iwin block / its floor", "eager", (1.5,) * 3, setting_of((64, 64), (32, 32), (3, 3)))
    record = {"results": goals.as_dicts([result]), "settings": goals.SETTINGS["cpu"]}
    table = goals.goals_table("cpu", {"block": json.loads(json.dumps(record))}, suites=["block"])
    assert "| 64x64 | 32x32 (auto) | 3x3 | yes | eager | - | 1.50 | no goal |" in table


def test_every_goal_is_measured_in_its_setting():
    """The defaults of its suite are its settings and include the grid; its window is the first measured there."""
    grids = {"train": [train.GRID], "sample": [sample.GRID]}  # those of suites without the option
    for goal in goals.GOALS:
        assert goal.suite in run.SUITES
        for device in goals.DEVICES:
            if goal.grid is None or goal.on(device) is None:
                continue
            words = ["--suite", goal.suite, "--device", device, "--threads", "2"]
            arguments = run.parse_arguments(words)
            assert goals.has_goals_settings({"settings": vars(arguments)}, goal.suite, device, arguments.modes[-1])
            assert goal.grid in (grids.get(goal.suite) or arguments.grids)
            assert goal.window == sides.windows_for(sides.Shape(goal.grid, 16, 2, goals.KERNELS[len(goal.grid)]))[0]


def test_both_halves_are_thrown_away_outside_the_interval():
    """What the interval is timed against computes the same: guided and unguided steps, one of each here."""
    shape = sides.Shape((8, 8), 16, 2, (3, 3))
    torch.manual_seed(0)
    transformer = sides.iwin_model(shape, 1, 4).eval()
    latents, _, labels, _ = sides.model_inputs(shape, 2, CPU, torch.float32)
    kinds = [sample.SIDES[name][0] for name in ("interval", "both")]
    pipelines = [kind(transformer, None, sample.FlowMatchEulerDiscreteScheduler()) for kind in kinds]
    with torch.no_grad():
        for timestep, guided in ((500.0, True), (900.0, False)):
            ours, theirs = (p.predict(latents, torch.tensor(timestep), labels, 4.0, (0.2, 0.7)) for p in pipelines)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
            plain = pipelines[0].predict(latents, torch.tensor(timestep), labels)
            assert torch.allclose(ours, plain, atol=1e-4) != guided


@pytest.mark.slow
def test_evaluation_command(tmp_path):
    out = tmp_path / "run.json"
    sizes = ["--images", "4", "--size", "64", "--batch-size", "2", "--repeats", "1", "--count", "100"]
    # In a process of its own that gives freed arrays back at once, or the heap keeps more, some runs 90 MB more
    command = [sys.executable, "-m", "benchmarks.evaluation", *sizes, "--out", str(out)]
    memory = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, cwd=DOCS.parent, env=memory, check=True, capture_output=True, text=True)
    record = json.loads(out.read_text())
    assert set(record["passes"]["images_per_second"]) == {"network", "memory", "png", "npz"}
    assert record["passes"]["share_of_the_network"]["network"] == [1, 1, 1]
    assert record["statistics"]["seconds_per_distance"] > 0
    peak = record["statistics"]["peak_bytes_above_start"]
    assert peak is None or 4 < peak / (2048**2 * 8) < 8  # covariances, of so few images as of 50,000
    assert done.stdout.strip() == evaluation.tables(record)


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


def test_a_record_of_another_device_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    (tmp_path / "block-cpu.json").write_text(json.dumps({"suite": "block", "device": "cuda"}))
    with pytest.raises(ValueError, match="of --suite block --device cpu, got --suite block --device cuda"):
        page.stored_records("cpu")


def test_a_suite_may_have_several_records(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    for name in ("train-cpu", "train-plain-cpu", "block-cuda"):
        suite, device = name.split("-")[0], name.split("-")[-1]
        (tmp_path / f"{name}.json").write_text(json.dumps({"suite": suite, "device": device}))
    assert set(page.stored_records("cpu")) == {"train", "train-plain"}
    assert set(page.stored_records("cuda")) == {"block"}


def test_the_pages_show_the_stored_runs():
    """Commands on the pages parse, and their tables are those of the JSON files beside the benchmarks."""
    modules = {"evaluation": evaluation, "protocols": protocols}
    pages = {name: (DOCS / name).read_text() for name in ("performance.md", "evaluation.md")}
    commands = [
        found
        for text in pages.values()
        for found in re.findall(r"^python -m benchmarks\.(\w+)(.*)$", text.replace("\\\n", ""), re.MULTILINE)
    ]
    assert {"run", *modules} <= {name for name, _ in commands}
    for name, arguments in commands:
        words = shlex.split(arguments, comments=True)
        if name == "run":
            run.parse_arguments(words)
        elif name in modules:
            modules[name].build_parser().parse_args(words)
    records = {device: page.stored_records(device) for device in goals.DEVICES}
    assert page.render(pages["performance.md"], records) == pages["performance.md"]
    for device, suites in records.items():
        for suite in suites:
            assert f"<!-- {suite}-{device}.json -->" in pages["performance.md"]
    stored = json.loads((page.RESULTS / "evaluation-cpu-2cores.json").read_text())
    assert evaluation.tables(stored) in pages["evaluation.md"]
    assert protocols.table(json.loads((page.RESULTS / "protocols.json").read_text())["rows"]) in pages["evaluation.md"]
