"""Attribution methods that can be compared, by name."""

from captum_globenc.comparison.methods import (
    METHODS,
    Method,
    logits_of,
    methods_named,
    scorer_of,
)

__all__ = ["METHODS", "Method", "logits_of", "methods_named", "scorer_of"]
