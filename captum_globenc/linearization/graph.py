"""The graph of a run: does it hold operations with a rule, and nothing else?

Operations are seen as they run, but not all of them: what runs in other threads, in
compiled code or in extensions is not. The graph that autograd keeps holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from captum_globenc.errors import UnsupportedModelError

# Moves of numbers, without arithmetic.
_MOVES = """
    Alias AsStrided Cat Chunk Clone ConstantPadNd CopySlices Copy_ Copys Detach
    Diagonal Expand Flip Fold Gather Im2Col Index IndexSelect Lift MaskedFill
    MaskedScatter MaskedSelect MovedimBackward Movedim NarrowBackward Narrow Permute
    PixelShuffle PixelUnshuffle ReflectionPad1D ReflectionPad2D Repeat
    RepeatInterleave ReplicationPad1D ReplicationPad2D Reshape ReshapeAlias Roll Scatter
    ScatterAdd Select SelectScatter Slice SliceScatter Split SplitWithSizes Squeeze
    Stack T TakeAlongDim Take ToCopy Transpose Tril Triu Unbind Unfold Unsqueeze
    UnsafeSplit UnsafeView View Where IndexAdd IndexCopy IndexPut UnfoldBackward
    MaskedFillBackward Contiguous
""".split()  # noqa: SIM905
# Linear maps, and those that select their largest input.
_LINEAR = """
    Add Sub Rsub Neg Sum Mean Nansum Cumsum AvgPool1D AvgPool2D AvgPool3D
    AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveAvgPool1D Embedding EmbeddingBag
    UpsampleBilinear2D UpsampleBicubic2D UpsampleNearest2D UpsampleNearestExact2D
    UpsampleBilinear2DAa UpsampleBicubic2DAa GridSampler2D
    NativeBatchNorm CudnnBatchNorm BatchNorm
    Max Amax MaxPool2DWithIndices AdaptiveMaxPool2D
""".split()  # noqa: SIM905
# Products: one factor must be a constant, or both are shared.
_PRODUCTS = """
    Mul Div Mm Bmm Mv Dot Addmm Baddbmm Addbmm Linear MkldnnLinear Convolution
    MkldnnConvolution CudnnConvolution ThnnConv2D SlowConvDilated2D Addcmul Matmul
    ConvDepthwise2D
""".split()  # noqa: SIM905
_ATTENTION = """
    ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention
    ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention
    ScaledDotProductFusedAttentionOverrideable ScaledDotProductAttentionMath
    Softmax SafeSoftmax
""".split()  # noqa: SIM905
_OWN = (
    "_ShareBackward",
    "_EntryBackward",
    "_NormBackward",
    "_SlopeBackward",
    "_OfTokenBackward",
    "_ConstantBackward",
    "_ReplacedBackward",
)

#: Names of nodes that move numbers.
STRUCTURAL = frozenset(f"{name}Backward" for name in _MOVES)
_KNOWN = STRUCTURAL | {f"{name}Backward" for name in (*_LINEAR, *_ATTENTION)}
_TWO_FACTORS = frozenset(f"{name}Backward" for name in _PRODUCTS)


def name_of(node: Any) -> str:
    """The name of a node without the number of its overload: ``AddBackward``."""
    return str(node.name()).rstrip("0123456789")


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
        if name in _KNOWN or name in _OWN:
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
                f"was made outside of forward_func and enters in {module}: detach it."
            )
        raise UnsupportedModelError(
            f"there is no rule for the operation {name.removesuffix('Backward')!r} in "
            f"{module}: linear maps, norms, activations, softmax and products are "
            "known. Put an activation of several operations into a module without "
            "parameters, and return logits instead of probabilities."
        )


def is_activated(value: Tensor) -> bool:
    """Whether a tensor is the output of an activation, moved or not."""
    return _leads_to(value.grad_fn, "_SlopeBackward")


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
        name = name_of(node)
        has_rule = has_rule and name != "_ShareBackward"
        if not has_rule:
            yield node, module
        has_rule = has_rule or name == "_EntryBackward"
        left += [(below, module, has_rule) for below, _ in node.next_functions]


def _has_constant_factor(node: Any, name: str) -> bool:
    factors = [below for below, _ in node.next_functions]
    if name in (
        "AddmmBackward",
        "BaddbmmBackward",
        "AddbmmBackward",
        "AddcmulBackward",
    ):
        factors = factors[1:]
    elif name in ("LinearBackward", "ConvolutionBackward"):
        factors = factors[:2]
    elif name == "DivBackward":
        return len(factors) < 2 or factors[1] is None
    dependent = [below for below in factors if below is not None]
    return len(dependent) < 2 or all(
        _leads_to(below, "_ShareBackward") for below in dependent
    )


def _leads_to(node: Any, name: str) -> bool:
    """Whether a node, or the only one below its moves, has this name."""
    while node is not None and name_of(node) != name:
        below = [other for other, _ in node.next_functions if other is not None]
        if name_of(node) not in STRUCTURAL or len(below) != 1:
            return False
        node = below[0]
    return node is not None
