"""Convolution, embeddings and blocks against closed forms; the published video block against its golden tensors."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from iwin_dit.models.loading import load_strictly
from iwin_dit.nn import (
    DepthwiseConv,
    FinalLayer,
    IwinAttention,
    IwinDiTBlock,
    TimestepEmbedding,
    drop_labels,
    patchify,
    sincos_positions,
    unpatchify,
)
from iwin_dit.nn.blocks import GeluMLP, SwiGLU, modulate
from iwin_dit.nn.embeddings import timestep_features
from tests.tools import relative_error

# --- convolution


@pytest.mark.parametrize(
    ("rank", "kernel", "size", "causal"),
    [
        (1, 3, (9,), True),
        (2, 3, (6, 5), True),
        (2, (3, 5), (4, 7), True),
        (3, (2, 3, 3), (4, 5, 6), True),
        (3, 3, (5, 4, 4), True),
        (3, (4, 3, 1), (2, 3, 3), True),
        (3, 3, (5, 4, 4), False),
        (3, (5, 1, 3), (4, 3, 3), False),
        (3, (5, 3, 3), (1, 3, 3), False),
        (3, (1, 3, 3), (2, 3, 3), False),
    ],
)
def test_conv_equals_torch(rank, kernel, size, causal):
    """Against torch's own depthwise convolution, forward and gradients; causal in time means padding in front only."""
    torch.manual_seed(0)
    conv = DepthwiseConv(4, kernel, rank, causal).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, *size, 4, dtype=torch.float64, requires_grad=True)
    channels_first = x.movedim(-1, 1)
    pads = [(k // 2, k // 2) for k in conv.kernel_size]
    if rank == 3 and causal:
        pads[0] = (conv.kernel_size[0] - 1, 0)
    padded = F.pad(channels_first, [p for pair in reversed(pads) for p in pair])
    expected = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank](padded, conv.weight, conv.bias, groups=4).movedim(1, -1)

    y = conv(x)

    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    cotangent, leaves = torch.randn_like(y), [x, conv.weight, conv.bias]
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_conv_is_causal_in_time():
    conv = DepthwiseConv(4, 3, rank=3)
    x = torch.randn(1, 6, 4, 4, 4)
    later = x.clone()
    later[:, 3:] += 1
    assert torch.equal(conv(x)[:, :3], conv(later)[:, :3])
    assert not torch.equal(conv(x)[:, 3], conv(later)[:, 3])


def test_centred_conv_sees_one_frame_ahead():
    conv = DepthwiseConv(4, 3, rank=3, causal=False)
    x = torch.randn(1, 6, 4, 4, 4)
    later = x.clone()
    later[:, 3:] += 1
    assert torch.equal(conv(x)[:, :2], conv(later)[:, :2])
    assert not torch.equal(conv(x)[:, 2], conv(later)[:, 2])


def test_conv_moves_no_memory():
    """The output is a plain contiguous channels-last grid, and so is the gradient of the input."""
    conv = DepthwiseConv(8, 3)
    x = torch.randn(2, 6, 6, 8, requires_grad=True)
    y = conv(x)
    y.backward(torch.randn_like(y))
    assert y.is_contiguous()
    assert x.grad.is_contiguous()
    assert conv.weight.grad.stride() == conv.weight.stride()  # or data-parallel training copies it at every step


@pytest.mark.parametrize("causal", [True, False])
def test_conv_keeps_no_copy_of_its_input(causal):
    """Whatever a backward pass needs of the input is the input itself, in every clip of the batch."""
    conv, x, kept = DepthwiseConv(4, 3, rank=3, causal=causal), torch.randn(2, 5, 6, 6, 4, requires_grad=True), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        conv(x)
    large = [tensor for tensor in kept if tensor.numel() > conv.weight.numel()]
    assert len(large) == 3  # one per tap
    assert {tensor.untyped_storage().data_ptr() for tensor in large} == {x.untyped_storage().data_ptr()}


def test_conv_keeps_the_variance_at_initialisation():
    torch.manual_seed(0)
    conv = DepthwiseConv(512, 3)
    assert conv.weight.abs().max() <= math.sqrt(1 / 3)
    y = conv(torch.randn(1, 32, 32, 512))[:, 1:-1, 1:-1]
    assert y.var().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 2}, "odd in space, got"),
        ({"kernel_size": (3, 3, 3)}, r"one entry per grid axis \(2\)"),
        ({"rank": 4}, "rank must be 1 to 3, got 4"),
        ({"kernel_size": (0, 3, 3), "rank": 3}, r"positive, and odd in space, got \(0, 3, 3\)"),
        ({"kernel_size": (2, 3, 3), "rank": 3, "causal": False}, r"odd on every axis, .*, got \(2, 3, 3\)"),
    ],
)
def test_conv_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        DepthwiseConv(4, **arguments)


def test_conv_input_of_another_rank():
    with pytest.raises(ValueError, match=r"with 2 grid axes, got shape \(1, 8, 4\)"):
        DepthwiseConv(4)(torch.randn(1, 8, 4))


# --- embeddings


@pytest.mark.parametrize(("size", "patch"), [((8,), 2), ((6, 4), (3, 2)), ((4, 6, 4), (1, 2, 2)), ((5, 7), 1)])
def test_unpatchify_undoes_patchify_bit_for_bit(size, patch):
    x = torch.randn(2, 3, *size)
    assert torch.equal(unpatchify(patchify(x, patch), patch), x)
    assert unpatchify(patchify(x, patch), patch).is_contiguous()


def test_patchify_and_linear_equal_a_strided_convolution():
    x, conv = torch.randn(2, 3, 6, 8), torch.nn.Conv2d(3, 5, 2, stride=2)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(F.linear(patchify(x, 2), weight, conv.bias), conv(x).movedim(1, -1))


def test_patch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"patch_size \(2, 2\) must divide the latent size, got \(5, 4\)"):
        patchify(torch.zeros(1, 1, 5, 4), 2)


def test_timestep_features_are_cosines_then_sines():
    features = timestep_features(torch.tensor([0.0, 500.0]), 4)
    expected = [[1, 1, 0, 0], [math.cos(500), math.cos(5), math.sin(500), math.sin(5)]]
    torch.testing.assert_close(features, torch.tensor(expected), atol=1e-4, rtol=0)


def test_timestep_features_are_taken_in_float32():
    """In bfloat16 neighbouring timesteps of 999 would be the same number."""
    embed = TimestepEmbedding(8).bfloat16()
    a, b = embed(torch.tensor([998.0]), torch.bfloat16), embed(torch.tensor([999.0]), torch.bfloat16)
    assert a.dtype == torch.bfloat16
    assert not torch.equal(a, b)


def test_labels_are_dropped_where_the_callers_numbers_say():
    labels = torch.tensor([1, 2, 3, 4])
    uniform = torch.tensor([0.05, 0.1, 0.5, 0.0])
    assert drop_labels(labels, 10, 0.1, uniform).tolist() == [10, 2, 3, 10]
    assert drop_labels(labels, 10, 0.0, uniform).tolist() == [1, 2, 3, 4]


def test_positions_interpolate_from_the_base_grid():
    base = sincos_positions((4, 4), (4, 4), 16)
    double = sincos_positions((8, 8), (4, 4), 16)
    assert base.shape == (4, 4, 16)
    torch.testing.assert_close(double[::2, ::2], base)
    assert sincos_positions((2, 3, 4), (2, 3, 4), 12).shape == (2, 3, 4, 12)
    rows = base.flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == 16  # no two positions alike


# --- blocks

CONDITIONS = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


def randomised(**arguments) -> IwinDiTBlock:
    torch.manual_seed(0)
    block = IwinDiTBlock(16, 2, 2, **arguments)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("gate", ["zero", "one_plus"])
@pytest.mark.parametrize("structure", ["parallel", "independent", "serial"])
def test_block_reads_like_its_formula(structure, gate):
    block = randomised(structure=structure, gate=gate)
    x = torch.randn(2, 4, 4, 16)
    s_a, m_a, g_a, s_m, m_m, g_m, g_c, *conv_modulation = block.modulation(CONDITIONS, rank=2)
    one = 1 if gate == "one_plus" else 0
    h = modulate(block.norm1(x), s_a, m_a)
    if structure == "parallel":
        u = x + (one + g_c) * block.conv(h) + (one + g_a) * block.attn(h)
    elif structure == "independent":
        u = x + (one + g_c) * block.conv(x) + (one + g_a) * block.attn(h)
    else:
        v = x + (one + g_c) * block.conv(modulate(block.norm_conv(x), *conv_modulation))
        u = v + (one + g_a) * block.attn(modulate(block.norm1(v), s_a, m_a))
    expected = u + (one + g_m) * block.mlp(modulate(block.norm2(u), s_m, m_m))
    torch.testing.assert_close(block(x, CONDITIONS), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_type": "layer_norm"},
        {"activation_fn": "gelu-approximate"},
        {"qkv_bias": False},
        {"qk_norm": False},
        {"structure": "serial", "norm_type": "layer_norm"},
    ],
)
@pytest.mark.parametrize("size", [(4,), (4, 4), (5, 3), (2, 4, 4)])
def test_every_option_on_every_rank(options, size):
    block = randomised(rank=len(size), **options)
    x = torch.randn(2, *size, 16, requires_grad=True)
    y = block(x, CONDITIONS)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_mlps_by_definition():
    x = torch.randn(3, 6)
    swiglu, gelu = SwiGLU(6, 12), GeluMLP(6, 12)
    assert swiglu.proj_out.in_features == 8  # two thirds
    first, second = swiglu.proj_in(x)[:, :8], swiglu.proj_in(x)[:, 8:]
    torch.testing.assert_close(swiglu(x), swiglu.proj_out(first * torch.sigmoid(first) * second))
    torch.testing.assert_close(gelu(x), gelu.proj_out(F.gelu(gelu.proj_in(x), approximate="tanh")))


def test_final_layer_by_definition():
    layer = FinalLayer(16, 5)
    shift, scale = layer.modulation(CONDITIONS, rank=2)
    x = torch.randn(2, 3, 3, 16)
    torch.testing.assert_close(layer(x, CONDITIONS), layer.linear(layer.norm(x) * (1 + scale) + shift))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "S1"}, "structure must be 'parallel', 'independent' or 'serial', got 'S1'"),
        ({"gate": "one"}, "gate must be 'zero' or 'one_plus', got 'one'"),
        ({"norm_type": "rms"}, "norm_type must be 'rms_norm' or 'layer_norm', got 'rms'"),
        ({"activation_fn": "gelu"}, "activation_fn must be one of"),
        ({"window_padding": "zeros"}, "window padding must be 'masked' or 'attended', got 'zeros'"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        IwinDiTBlock(16, 2, 2, **options)


# --- the published video block

GOLDEN = Path(__file__).parent / "golden" / "iwin_block_3d.safetensors"
TOLERANCE = {torch.float64: 2e-7, torch.float32: 1e-5, torch.bfloat16: 5e-2}  # of outputs and input gradients


class PublishedVideoBlock(torch.nn.Module):
    """The published block, x + attn(norm(x)) + conv(norm(x)) and x + mlp(norm(x)), from this package's layers."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(24), torch.nn.LayerNorm(24)
        self.attn = IwinAttention(24, 3, (2, 4, 4), qk_norm=False, window_padding="attended")
        self.conv = DepthwiseConv(24, (2, 3, 3), rank=3)
        self.fc1, self.fc2 = torch.nn.Linear(24, 96), torch.nn.Linear(96, 24)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attn(h) + self.conv(h)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def published_names(tensors):
    """The file's weights under this package's names."""
    names = {"attn.proj.": "attn.to_out.", "dwconv.depthwise.": "conv.", "mlp.": ""}
    renamed = {}
    for name, value in tensors.items():
        name = name.removeprefix("params.")
        if name.startswith("attn.qkv."):
            parts = zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True)
            renamed |= {name.replace("qkv", part): rows for part, rows in parts}
        else:
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            renamed[name] = value
    return renamed


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["aligned", "padded"])
def test_published_video_block(case, dtype):
    tensors = {name: value.to(dtype) for name, value in load_file(GOLDEN).items()}
    block = PublishedVideoBlock().to(dtype)
    load_strictly(block, published_names({k: v for k, v in tensors.items() if k.startswith("params.")}), GOLDEN.name)
    x = tensors[f"{case}.inputs.x"].requires_grad_()

    y = block(x)

    assert relative_error(y, tensors[f"{case}.outputs.y"]) < TOLERANCE[dtype]
    (y * tensors[f"{case}.inputs.r"]).sum().backward()
    assert relative_error(x.grad, tensors[f"{case}.grads.x"]) < TOLERANCE[dtype]
    block.attn.window_padding = "masked"  # ours differs on the padded grid alone
    assert (relative_error(block(x), y) < TOLERANCE[dtype]) == (case == "aligned")
