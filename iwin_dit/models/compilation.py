"""What torch's compiler is told about the repeated block, by device; each choice was measured (docs/performance.md).

On a CPU alone, for nothing was measured elsewhere. No option changes a number by more than rounding, and each is
switched off by giving torch's own value: `layout_optimization=True`, `post_grad_custom_pre_pass=None`,
`post_grad_custom_post_pass=None`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.exc import InvalidCxxCompiler

VARIANTS = 8  # torch's own limit for a function
CPU_INFO = Path("/proc/cpuinfo")
ZEN_5 = 26  # AMD's first family that multiplies 512 bits at once, in servers at least; Zen 4 takes two halves in turn


@torch.library.custom_op("iwin_dit::onednn_mm", mutates_args=(), device_types="cpu")
def onednn_mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply float32 matrices on a CPU by oneDNN; the plain twin is `plain_mm`.

    Args:
        a: (n, k), any strides.
        b: (k, m), any strides.
        bias: (m,), added to every row.

    Returns:
        (n, m), contiguous.
    """
    if not a.shape[1]:
        return plain_mm(a, b, bias)  # oneDNN refuses a sum of nothing, which an empty batch's gradient of weights is
    if bias is None and not a.is_contiguous() and a.numel() > b.numel() + a.shape[0] * b.shape[1]:
        # torch would copy a; to transpose a small b and the product is cheaper (the gradient of a wide layer's weight)
        return torch.ops.mkldnn._linear_pointwise(b.t(), a, None, "none", [], "").t().contiguous()
    bias = None if bias is None else bias.contiguous()  # of an expanded one it would read past the end
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


@onednn_mm.register_fake
def plain_mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply matrices by torch's default library, as `onednn_mm` does by another."""
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def plain_convolution_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> list[torch.Tensor]:
    """Compute the gradients of a convolution by torch's default, `aten::convolution_backward`.

    Args:
        grad_output: (B, C_out, *S_out), any strides.
        x: (B, C_in, *S), any strides.
        weight: (C_out, C_in / groups, *K).
        bias_sizes: [C_out], or None.
        stride: As that operator takes it, like all that follow.
        padding: Likewise.
        dilation: Likewise.
        transposed: Likewise.
        output_padding: Likewise.
        groups: Likewise.
        output_mask: Which of the three gradients are wanted.

    Returns:
        Gradients of x, weight and bias; one that is not wanted is empty.
    """
    settings = (stride, padding, dilation, transposed, output_padding, groups, output_mask)
    gradients = torch.ops.aten.convolution_backward(grad_output, x, weight, bias_sizes, *settings)
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


# The same as an operator of ours, for which the compiler has no rule but to keep the order of the arguments' axes.
convolution_backward = torch.library.custom_op(
    "iwin_dit::convolution_backward",
    plain_convolution_backward,
    mutates_args=(),
    device_types="cpu",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
convolution_backward.register_fake(plain_convolution_backward)


class BlockPass(CustomGraphPass):
    """Rewrites a compiled graph, of a forward or a backward pass, in place; all of one class are the same."""

    def uuid(self) -> bytes:
        """Name this version of the pass to the compiler's cache."""
        return get_hash_for_files((__file__,), type(self).__name__)

    def __eq__(self, other: object) -> bool:
        """All of one class are the same, so that blocks compiled with equal options share their code."""
        return type(self) is type(other)

    def __hash__(self) -> int:
        """As for equality."""
        return hash(type(self))

    def __repr__(self) -> str:
        """Name the pass where options are shown."""
        return f"{type(self).__name__}()"


class KeepConvolutionLayout(BlockPass):
    """Replaces gradients of convolutions by `convolution_backward`, which takes tensors as they lie.

    torch 2.14 gives its own operator (`convolution_backward_lowering`) tensors in the order of the weight's gradient,
    whose axis of one channel it cannot place: it would copy tokens, channels last, to an order with W innermost, then
    to NCHW, and convolve there.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Rewrite a graph in place."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default):
            if node.args[0].meta["val"].device.type == "cpu":
                node.target = torch.ops.iwin_dit.convolution_backward.default


class MultiplyByOneDNN(BlockPass):
    """Replaces products of float32 matrices, with at most one row of bias, by `onednn_mm`."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Rewrite a graph in place."""
        for node in graph.nodes:
            if node.op != "call_function" or not _is_float32_on_cpu(node):
                continue
            if node.target is torch.ops.aten.mm.default:
                node.target = torch.ops.iwin_dit.onednn_mm.default
            elif node.target is torch.ops.aten.addmm.default and not node.kwargs:  # nothing is scaled
                bias, a, b = node.args
                if bias.meta["val"].shape == node.meta["val"].shape[1:]:
                    node.target, node.args = torch.ops.iwin_dit.onednn_mm.default, (a, b, bias)


def _is_float32_on_cpu(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.device.type == "cpu"


def onednn_multiplies_faster() -> bool:
    """Whether torch multiplies float32 matrices by MKL on an AMD CPU from Zen 5 on, and oneDNN is at hand.

    On CPUs that are not Intel's, MKL uses AVX2, and on these takes about twice as long as oneDNN by AVX-512.
    """
    info = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    family = re.search(r"^cpu family\s*: (\d+)", info, re.MULTILINE)
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in info
        and family is not None
        and int(family[1]) >= ZEN_5
    )


def compile_options(device: torch.device) -> dict[str, Any]:
    """Choose the options of torch's compiler (`torch._inductor.config`) for blocks on a device.

    Args:
        device: Of the weights.

    Returns:
        Options by name; none but on a CPU.
    """
    if device.type != "cpu":
        return {}
    # The compiler lays out every tensor of four axes that leads to a convolution as if it were NCHW, and would copy our
    # tokens, (B, H, W, C), to an order with H innermost.
    options: dict[str, Any] = {"layout_optimization": False}
    if inductor.post_grad_custom_pre_pass is None:  # or another's pass would be lost
        options["post_grad_custom_pre_pass"] = KeepConvolutionLayout()
    if inductor.post_grad_custom_post_pass is None and onednn_multiplies_faster():
        options["post_grad_custom_post_pass"] = MultiplyByOneDNN()
    return options


def check_compiler(device: torch.device, options: Mapping[str, Any]) -> None:
    """Refuse to compile for a CPU without a C++ compiler, which torch would only miss at the first batch.

    Args:
        device: Of the weights.
        options: Of torch's compiler, which may name one.

    Raises:
        ValueError: If there is none.
    """
    if device.type == "cpu":
        try:
            with inductor.patch(dict(options)):
                get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                f"compiling for a CPU needs a C++ compiler ({error}): install g++, or name another in the environment "
                "variable CXX, or do without compiling"
            ) from error


def allow_variants(windows: int) -> None:
    """Raise torch's limit of compiled variants to 8 for every window, in this thread: blocks are one function to it.

    Args:
        windows: How many different windows a model has; with one, torch's limit stays.
    """
    if windows > 1:
        dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS * windows)
