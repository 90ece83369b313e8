"""The explanation of one text by several methods."""

from captum_globenc.comparison.explanation import (
    ClassScore,
    Explanation,
    MethodScores,
    explain,
)

__all__ = ["ClassScore", "Explanation", "MethodScores", "explain"]
