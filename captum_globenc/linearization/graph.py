"""The graph of a run: does it hold operations with a rule, and nothing else?

Operations are seen as they run, but not all of them: what runs in other threads, in
compiled code or in extensions is not. The graph that autograd keeps holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.modules._functions import BackwardHookFunction

from captum_globenc.errors import UnsupportedModelError
from captum_globenc.linearization.rules import ENTRY, OWN, SHARE, SLOPE

# Moves of numbers, without arithmetic.
_MOVES = """
    Alias AsStrided AsStridedScatter Cat Chunk Clone Col2Im Conj ConstantPadNd
    CopyBackwards CopySlices Detach DiagEmbed Diagonal DiagonalScatter Expand Flip Fold
    Gather Im2Col Index IndexAdd IndexCopy IndexFill IndexPut IndexSelect Lift LazyClone
    MaskedFill MaskedScatter MaskedSelect MkldnnReshape Movedim Narrow NarrowCopy
    Permute PixelShuffle PixelUnshuffle ReflectionPad1D ReflectionPad2D ReflectionPad3D
    Repeat RepeatInterleave ReplicationPad1D ReplicationPad2D ReplicationPad3D Reshape
    ReshapeAlias Roll Rot90 Scatter ScatterAdd Select SelectScatter Slice SliceScatter
    Split SplitWithSizes Squeeze Stack T Take TakeAlongDim ToCopy ToMkldnn Transpose
    Tril Triu Unbind Unfold UnsafeIndex UnsafeSplit UnsafeSplitWithSizes UnsafeView
    Unsqueeze View ViewAsComplex ViewAsReal Where
""".split()  # noqa: SIM905
# Linear maps, also those that select their largest input or change its sign: their
# gradient times the input is what they give.
_LINEAR = """
    Add Sub Rsub Neg Sum Mean Nansum Cumsum Trace AvgPool1D AvgPool2D AvgPool3D
    AdaptiveAvgPool1D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D
    Embedding EmbeddingBag FftC2C FftC2R FftR2C ScatterReduce NativeDropout
    UpsampleLinear1D UpsampleBilinear2D UpsampleBilinear2DAa UpsampleTrilinear3D
    UpsampleBicubic2D UpsampleBicubic2DAa UpsampleNearest1D UpsampleNearest2D
    UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D
    UpsampleNearestExact3D GridSampler2D GridSampler3D
    NativeBatchNorm CudnnBatchNorm MiopenBatchNorm BatchNorm
    Max Min Amax Amin Aminmax Maximum Minimum Cummax Cummin Median Nanmedian Kthvalue
    Mode Sort Topk MaxPool2D MaxPool2DWithIndices MaxPool3DWithIndices
    AdaptiveMaxPool2D AdaptiveMaxPool3D FractionalMaxPool2D MaxUnpool2D MkldnnMaxPool2D
    Abs PreluKernel VarMean StdMean
""".split()  # noqa: SIM905
# Products: one factor must be a constant, or both are shared.
_PRODUCTS = """
    Mul Div Mm Bmm Mv Dot Addmm Addmv Addr Baddbmm Addbmm Linear MkldnnLinear
    Convolution MkldnnConvolution CudnnConvolution CudnnConvolutionTranspose
    MiopenConvolution ThnnConv2D SlowConv2D SlowConvDilated2D Addcmul Matmul
    ConvDepthwise2D ConvDepthwise3D
""".split()  # noqa: SIM905
# Kernels of attention. In CP-LRP nothing but the values has a gradient.
_ATTENTION = """
    ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention
    ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention
    ScaledDotProductFusedAttentionOverrideable ScaledDotProductAttentionMath
""".split()  # noqa: SIM905
# Activations without a line through the origin. In CP-LRP, gates are constants.
_GATES = ("Sigmoid", "Hardsigmoid", "Softplus")
_TAG = "_captum_globenc_activated"
# Functions of Python, by kind: a user's may have any name.
_OWN = OWN | {BackwardHookFunction._backward_cls}

#: Names of nodes that move numbers.
STRUCTURAL = frozenset(_MOVES)
_KNOWN = STRUCTURAL | frozenset(_LINEAR)
_TWO_FACTORS = frozenset(_PRODUCTS)


def name_of(node: Any) -> str:
    """The name of a node without the number of its overload: ``Add``."""
    name = str(node.name()).removeprefix("torch::autograd::").rstrip("0123456789")
    return name.removesuffix("Backward")


def check_graph(
    output: Tensor, leaves: Iterable[Tensor], modules: dict[Any, str]
) -> None:
    """Raise where a run did something for which there is no rule.

    Args:
        output (Tensor): what is explained.
        leaves (iterable of Tensor): inputs and biases.
        modules (dict): node of a module's output → the module's name.

    Raises:
        UnsupportedModelError: what was found, and in which module.
    """
    known = {id(leaf) for leaf in leaves}
    for node, module in _walk(output.grad_fn, modules):
        name = name_of(node)
        if isinstance(node, BackwardCFunction):
            if type(node) in _OWN:
                continue
            raise UnsupportedModelError(
                f"there is no rule for the operation {name!r} in {module}, a "
                "torch.autograd.Function with a gradient of its own: write it with "
                "torch's operations."
            )
        if name in _KNOWN or (name in _ATTENTION and _has_values_only(node)):
            continue
        if name in _TWO_FACTORS:
            if _has_constant_factor(node, name):
                continue
            raise UnsupportedModelError(
                f"two values that depend on the inputs are multiplied in {module} "
                f"({name}), and there is no rule for it here: one factor must be an "
                "activation, or the product must be of two different tensors. Put what "
                "belongs to one activation into a module without parameters."
            )
        if name.endswith("AccumulateGrad"):
            if id(node.variable) in known:
                continue
            raise UnsupportedModelError(
                f"a tensor of shape {tuple(node.variable.shape)} that requires grad "
                f"was made outside of forward_func, or hidden from Python in compiled "
                f"or scripted code, and enters in {module}: detach it, or pass the "
                "model as it is in Python."
            )
        raise UnsupportedModelError(
            f"there is no rule for the operation {name!r} in "
            f"{module}: linear maps, norms, activations, softmax and products are "
            "known. Put an activation of several operations into a module without "
            "parameters, and return logits instead of probabilities."
        )


def mark_activated(value: Tensor) -> Tensor:
    """Take note that the output of an activation was written to a tensor."""
    setattr(value, _TAG, value._version)
    return value


def is_activated(value: Tensor) -> bool:
    """Whether a tensor is the output of an activation or gate, moved or not."""
    if getattr(value, _TAG, None) == value._version:
        return True
    return _leads_to(
        value.grad_fn, lambda n: isinstance(n, SLOPE) or name_of(n) in _GATES
    )


def goes_around(output: Tensor, place: Any, leaves: Iterable[Tensor]) -> bool:
    """Whether the output depends on a leaf by a way that does not lead through a node.

    Args:
        output (Tensor): what is explained.
        place (Node): the node.
        leaves (iterable of Tensor): the leaves.
    """
    sought = {id(leaf) for leaf in leaves}
    seen: set[Any] = {place}
    left: list[Any] = [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if name_of(node).endswith("AccumulateGrad") and id(node.variable) in sought:
            return True
        left += [below for below, _ in node.next_functions]
    return False


def _walk(root: Any, modules: dict[Any, str]) -> Iterator[tuple[Any, str]]:
    """Every node once, with the module that it ran in, as far as that is known.

    Between an entry in the ledger and the shares below it there is one operation that
    has its rule, of several nodes in some of torch's kernels: it is left out.
    """
    seen, left = set(), [(root, "forward_func", False)]
    while left:
        node, module, has_rule = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        module = modules.get(node, module)
        has_rule = has_rule and not _is_share(node)
        if not has_rule:
            yield node, module
        has_rule = has_rule or isinstance(node, ENTRY)
        left += [(below, module, has_rule) for below, _ in node.next_functions]


def _has_values_only(node: Any) -> bool:
    """Whether attention has a gradient for its values alone."""
    return all(below is None for below, _ in node.next_functions[:2])


def _has_constant_factor(node: Any, name: str) -> bool:
    factors = [below for below, _ in node.next_functions]
    if name in ("Addmm", "Addmv", "Addr", "Baddbmm", "Addbmm", "Addcmul"):
        factors = factors[1:]
    elif name in ("Linear", "Convolution"):
        factors = factors[:2]
    elif name == "Div":
        return len(factors) < 2 or factors[1] is None
    dependent = [below for below in factors if below is not None]
    return len(dependent) < 2 or all(_leads_to(node, _is_share) for node in dependent)


def _is_share(node: Any) -> bool:
    return isinstance(node, SHARE)


def _leads_to(node: Any, is_sought: Callable[[Any], bool]) -> bool:
    """Whether a node, or the only one below its moves, is the one that is sought."""
    while node is not None and not is_sought(node):
        below = [other for other, _ in node.next_functions if other is not None]
        if name_of(node) not in STRUCTURAL or len(below) != 1:
            return False
        node = below[0]
    return node is not None
