"""What torch's compiler is told: who is told what, and that what our passes put in computes the same."""

import re

import pytest
import torch
from diffusers import ModelMixin
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.kernel import conv
from torch._inductor.utils import run_and_get_code

from iwin_dit.models import compilation
from iwin_dit.models.compilation import (
    KeepConvolutionLayout,
    MultiplyByOneDNN,
    compile_options,
    convolution_backward,
    onednn_mm,
    onednn_multiplies_faster,
    plain_mm,
)
from tests.tools import relative_error, tiny_model, tiny_video_model

CPU, META = torch.device("cpu"), torch.device("meta")
LAYOUT = {"layout_optimization": False, "post_grad_custom_pre_pass": KeepConvolutionLayout()}
# The torch releases that would copy; one that has this and does not needs the pass no more.
lowers_convolution_backward = pytest.mark.skipif(
    not hasattr(conv, "convolution_backward_lowering"),
    reason="torch is older than its rule for gradients of convolutions",
)
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@needs_onednn
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (drawn(40, 24), drawn(24, 56)),
        (drawn(24, 40).t(), drawn(56, 24).t()),
        (drawn(24, 200).t(), drawn(24, 8)),
        (drawn(80, 48)[::2, ::2], drawn(48, 112)[::2, ::2]),
        (drawn(40, 1).expand(40, 24), drawn(1, 56).expand(24, 56)),
        (drawn(1, 24).expand(40, 24), drawn(24, 1).expand(24, 56)),
        (drawn(40, 1), drawn(1, 56)),
        (drawn(1, 24), drawn(24, 1)),
    ],
    ids=[
        "contiguous",
        "transposed",
        "tall and transposed",
        "strided",
        "expanded",
        "expanded the other way",
        "outer",
        "inner",
    ],
)
@pytest.mark.parametrize("bias", ["none", "contiguous", "strided", "expanded"])
def test_products_by_onednn_are_as_exact_as_those_of_their_twin(a, b, bias):
    columns = b.shape[1]
    biases = {"contiguous": drawn(columns), "strided": drawn(2 * columns)[::2], "expanded": drawn(1).expand(columns)}
    bias = biases.get(bias)
    exact = plain_mm(a.double(), b.double(), None if bias is None else bias.double())
    ours, twin = onednn_mm(a, b, bias), plain_mm(a, b, bias)
    torch.library.opcheck(onednn_mm, (a, b, bias), test_utils=("test_schema", "test_faketensor"))
    assert ours.is_contiguous()
    assert relative_error(ours.double(), exact) <= max(2 * relative_error(twin.double(), exact), 2**-23)


@needs_onednn
@pytest.mark.parametrize(("n", "k", "m"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_empty_products(n, k, m, bias):
    operands = drawn(n, k), drawn(k, m), drawn(m) if bias else None
    assert torch.equal(onednn_mm(*operands), plain_mm(*operands))


def gradients(model, size):
    """The output, and the gradients of all weights that have one, in float64."""
    dtype = next(model.parameters()).dtype
    latents = drawn(2, 4, *size).to(dtype)
    output = model(latents, torch.tensor([100.0, 900.0], dtype=dtype), torch.tensor([3, 10]), return_dict=False)[0]
    output.square().mean().backward()
    found = {"output": output} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().double() for name, tensor in found.items()}


@needs_onednn
@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), (16, 8)])
def test_a_block_whose_products_are_onednns_is_as_exact_as_its_twin(size):
    """Forward and every gradient, against the same graph with torch's own products."""
    exact = gradients(tiny_model(window_size=4).double(), size)
    found = {}
    for products in (MultiplyByOneDNN(), None):
        torch.compiler.reset()
        model = tiny_model(window_size=4)
        model.compile_repeated_blocks(fullgraph=True, options={"post_grad_custom_post_pass": products})
        found[products], codes = run_and_get_code(lambda model=model: gradients(model, size))
        used = {
            name
            for name in ("iwin_dit.onednn_mm", "extern_kernels.mm", "extern_kernels.addmm")
            if name in "".join(codes)
        }
        assert used == ({"iwin_dit.onednn_mm"} if products else {"extern_kernels.mm", "extern_kernels.addmm"})
    ours, twin = found.values()
    assert ours.keys() == exact.keys()
    for name, tensor in ours.items():
        error, allowed = ((t - exact[name]).norm() / exact[name].norm() for t in (tensor, twin[name]))
        assert error <= 2 * max(allowed, 2**-23), (name, error, allowed)


@pytest.mark.parametrize("mask", [(True, True, True), (True, True, False), (False, True, True)])
def test_gradients_of_a_convolution_as_tokens_lie(mask):
    x, g = (drawn(2, 6, 5, 16).permute(0, 3, 1, 2) for _ in range(2))
    weight, bias = drawn(16, 1, 3, 3), drawn(16)
    arguments = (g, x, weight, [16], [1, 1], [1, 1], [1, 1], False, [0, 0], 16, mask)
    torch.library.opcheck(convolution_backward, arguments, test_utils=("test_schema", "test_faketensor"))
    ours = convolution_backward(*arguments)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    y = torch.nn.functional.conv2d(*leaves, padding=1, groups=16)
    for gradient, exact, asked in zip(ours, torch.autograd.grad(y, leaves, g.double()), mask, strict=True):
        assert relative_error(gradient.double(), exact) < 1e-6 if asked else not gradient.numel()
    assert not mask[0] or ours[0].is_contiguous(memory_format=torch.channels_last)


@needs_onednn
@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=lowers_convolution_backward)])
@pytest.mark.parametrize(("build", "size"), [(tiny_model, (8, 8)), (tiny_video_model, (4, 6, 6))])
def test_no_token_is_copied_for_the_gradients_of_a_convolution(build, size, kept):
    """Forward and every gradient, and that only without our pass channels lie apart in a compiled (B, C, H, W)."""
    torch.compiler.reset()
    exact, model = gradients(build(window_size=2).double(), size), build(window_size=2)
    options = {"layout_optimization": False, "post_grad_custom_post_pass": None, "fx_graph_cache": False}
    options["post_grad_custom_pre_pass"] = KeepConvolutionLayout() if kept else None
    model.compile_repeated_blocks(fullgraph=True, options=options)
    ours, codes = run_and_get_code(lambda: gradients(model, size))
    assert sum("iwin_dit.convolution_backward" in code for code in codes) == kept  # of both blocks
    apart = r"empty_strided_cpu\(\(\d+, 16, \d+, \d+\), \(\d+, (?!1,)"
    assert kept != any(re.search(apart, code) for code in codes)
    assert ours.keys() == exact.keys()
    for name, tensor in ours.items():
        assert (tensor - exact[name]).norm() < 1e-3 * exact[name].norm(), name


@needs_onednn
@pytest.mark.slow
def test_blocks_share_their_code_at_every_size():
    """Two blocks of one size, then of others, for which one variant is compiled: two in all."""
    torch.compiler.reset()
    counters.clear()
    plain, model = (tiny_model(window_size=4).requires_grad_(False) for _ in range(2))
    for block in model.blocks:
        block.compile(fullgraph=True, options={"post_grad_custom_post_pass": MultiplyByOneDNN()})
    for size in ((8, 8), (16, 8), (24, 8)):
        arguments = drawn(2, 4, *size), torch.tensor([100.0, 900.0]), torch.tensor([3, 10])
        ours, theirs = (m(*arguments, return_dict=False)[0] for m in (model, plain))
        assert relative_error(ours, theirs) < 1e-4
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_more_windows_than_torch_compiles_a_function_for():
    """On clips and on single frames, without the time that kernels take to be built."""
    torch.compiler.reset()
    counters.clear()
    plain, model = (tiny_video_model(num_layers=5, window_size=[[m, 2, 2] for m in range(1, 6)]) for _ in range(2))
    with dynamo.patch(recompile_limit=8):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert dynamo.recompile_limit == 40
        for frames in (4, 1):
            arguments = drawn(2, 4, frames, 6, 6), torch.tensor([100.0, 900.0]), torch.tensor([3, 10])
            ours, theirs = (m(*arguments, return_dict=False)[0] for m in (model, plain))
            assert relative_error(ours, theirs) < 1e-5
    assert counters["stats"]["unique_graphs"] == 10
    torch.compiler.reset()


@needs_onednn
@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
def test_checkpointing_and_mixed_precision(mixed):
    """Recomputed blocks multiply by oneDNN, too; under autocast products are in bfloat16 and stay with torch."""
    torch.compiler.reset()
    plain, model = (tiny_model(window_size=4) for _ in range(2))
    model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, options={"post_grad_custom_post_pass": MultiplyByOneDNN()})
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        ours, codes = run_and_get_code(lambda: gradients(model, (8, 8)))
        theirs = gradients(plain, (8, 8))
    assert any("iwin_dit.onednn_mm" in code for code in codes) != mixed
    for name in ["output"] if mixed else theirs:  # gradients of queries and keys are mere rounding in bfloat16 here
        assert (ours[name] - theirs[name]).norm() < (2e-2 if mixed else 1e-3) * theirs[name].norm(), name


def test_what_the_pass_leaves_alone():
    graph = torch.fx.Graph()
    a, b, bias, full, single = (graph.placeholder(name) for name in ("a", "b", "bias", "full", "single"))
    aten, ours = torch.ops.aten, torch.ops.iwin_dit.onednn_mm.default
    bias.meta["val"], full.meta["val"], single.meta["val"] = torch.empty(2), torch.empty(2, 2), torch.empty(1)
    cases = [
        (aten.mm.default, (a, b), {}, torch.empty(2, 2), ours, (a, b)),
        (aten.addmm.default, (bias, a, b), {}, torch.empty(2, 2), ours, (a, b, bias)),
        (aten.addmm.default, (bias, a, b), {"beta": 2}, torch.empty(2, 2), aten.addmm.default, (bias, a, b)),
        (aten.addmm.default, (full, a, b), {}, torch.empty(2, 2), aten.addmm.default, (full, a, b)),
        (aten.addmm.default, (single, a, b), {}, torch.empty(2, 2), aten.addmm.default, (single, a, b)),
        (aten.mm.default, (a, b), {}, torch.empty(2, 2).double(), aten.mm.default, (a, b)),
        (aten.mm.default, (a, b), {}, torch.empty(2, 2).bfloat16(), aten.mm.default, (a, b)),
        (aten.mm.default, (a, b), {}, torch.empty(2, 2, device=META), aten.mm.default, (a, b)),
    ]
    nodes = []
    for target, arguments, options, value, *_ in cases:
        nodes.append(graph.call_function(target, arguments, options))
        nodes[-1].meta["val"] = value
    MultiplyByOneDNN()(graph)
    assert [(node.target, node.args) for node in nodes] == [tuple(case[4:]) for case in cases]


CPU_INFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 2\n"


@pytest.fixture
def zen_5(monkeypatch, tmp_path):
    """A machine where MKL is slow; returns the file that describes its processor."""
    monkeypatch.setattr(compilation, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    (tmp_path / "cpuinfo").write_text(CPU_INFO.format("AuthenticAMD", 26))
    return tmp_path / "cpuinfo"


def test_onednn_multiplies_where_mkl_is_slow(zen_5, monkeypatch):
    assert compile_options(CPU) == LAYOUT | {"post_grad_custom_post_pass": MultiplyByOneDNN()}
    assert compile_options(META) == {}
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert compile_options(CPU) == LAYOUT
    with inductor.patch(post_grad_custom_post_pass=lambda graph: None):  # somebody else's
        assert compile_options(CPU) == LAYOUT
        assert onednn_multiplies_faster()
    with inductor.patch(post_grad_custom_pre_pass=lambda graph: None):
        assert compile_options(CPU).keys() == {"layout_optimization", "post_grad_custom_post_pass"}
    for other in (("GenuineIntel", 26), ("AuthenticAMD", 25)):
        zen_5.write_text(CPU_INFO.format(*other))
        assert compile_options(CPU) == LAYOUT
    zen_5.unlink()  # of a machine without that file nothing is known
    assert compile_options(CPU) == LAYOUT
    zen_5.write_text(CPU_INFO.format("AuthenticAMD", 26))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert compile_options(CPU) == LAYOUT


def test_a_missing_compiler_is_said_at_once():
    with inductor.patch({"cpp.cxx": (None, "nowhere")}):
        with pytest.raises(ValueError, match=r"needs a C\+\+ compiler \(.*nowhere.*\): install g\+\+"):
            tiny_model().compile_repeated_blocks(fullgraph=True)
        tiny_model().compile_repeated_blocks(fullgraph=True, backend="eager")
        tiny_model().compile_repeated_blocks(fullgraph=True, options={"cpp.cxx": (*inductor.cpp.cxx[:1], "g++")})


def test_options_of_the_user_win_and_a_mode_or_backend_excludes_ours(monkeypatch):
    given = []
    monkeypatch.setattr(ModelMixin, "compile_repeated_blocks", lambda self, *args, **kwargs: given.append(kwargs))
    monkeypatch.setattr(compilation, "onednn_multiplies_faster", lambda: False)
    calls = [{}, {"options": {"max_autotune": True}}, {"options": {"layout_optimization": True}}]
    for model, options in ((tiny_model(), LAYOUT), (tiny_model().to("meta"), {})):
        for call in calls:
            model.compile_repeated_blocks(fullgraph=True, **call)
            assert given.pop() == {"fullgraph": True, "options": options | call.get("options", {})}
        for call in ({"mode": "reduce-overhead"}, {"backend": "eager"}):
            model.compile_repeated_blocks(**call)
            assert given.pop() == call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "transposed"),
    [({}, False), ({"options": {"epilogue_fusion": True}}, False), ({"options": {"layout_optimization": True}}, True)],
)
def test_the_compiled_block_equals_the_plain_one_and_does_not_transpose_the_tokens(options, transposed):
    """Outputs and gradients; and where the compiler is left to itself, it lays the tokens out with H innermost."""
    H, W, C = 8, 8, 16
    plain, model = (tiny_model(window_size=4).double() for _ in range(2))
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, **options)
    found, codes = run_and_get_code(lambda: gradients(model, (H, W)))
    expected = gradients(plain, (H, W))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-9, name
    assert any(f"({H * W * C}, 1, {W * C}, {H})" in code for code in codes) == transposed
