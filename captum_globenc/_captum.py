"""The private helpers of Captum that this package needs, all imported here.

They have no promise of staying; with all of them in one place, a new Captum release is
one file to look at. Checked with captum 0.9.0.
"""

from captum._utils.common import (
    _format_additional_forward_args as format_additional_forward_args,
)
from captum._utils.common import _format_output as format_output
from captum._utils.common import _is_tuple as is_tuple
from captum._utils.common import _select_targets as select_targets
from captum._utils.typing import TargetType, TensorOrTupleOfTensorsGeneric

__all__ = [
    "TargetType",
    "TensorOrTupleOfTensorsGeneric",
    "format_additional_forward_args",
    "format_output",
    "is_tuple",
    "select_targets",
]
