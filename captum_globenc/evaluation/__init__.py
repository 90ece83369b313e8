"""Attribution methods side by side: measures of faithfulness and a benchmark.

Needs the extra ``benchmark``: ``pip install "captum_globenc[benchmark]"``.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_NEEDED = ("datasets", "matplotlib", "pandas", "scipy", "sklearn", "tqdm")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(
        f"captum_globenc.evaluation needs {', '.join(_missing)}: "
        'pip install "captum_globenc[benchmark]"'
    )

if TYPE_CHECKING:
    from captum_globenc.catalogue import MEASURES, PRESETS, Preset
    from captum_globenc.evaluation.data import Example, read_examples
    from captum_globenc.evaluation.measures import (
        aopc,
        comprehensiveness,
        leave_one_out_tau,
        log_odds,
        probability_drop,
        rank_correlation,
        sufficiency,
    )
    from captum_globenc.evaluation.result import BenchmarkResult
    from captum_globenc.evaluation.runner import benchmark

# Loaded when they are first used: names and data can be checked without torch.
_HOMES = {
    "MEASURES": "captum_globenc.catalogue",
    "PRESETS": "captum_globenc.catalogue",
    "BenchmarkResult": "captum_globenc.evaluation.result",
    "Example": "captum_globenc.evaluation.data",
    "Preset": "captum_globenc.catalogue",
    "aopc": "captum_globenc.evaluation.measures",
    "benchmark": "captum_globenc.evaluation.runner",
    "comprehensiveness": "captum_globenc.evaluation.measures",
    "leave_one_out_tau": "captum_globenc.evaluation.measures",
    "log_odds": "captum_globenc.evaluation.measures",
    "probability_drop": "captum_globenc.evaluation.measures",
    "rank_correlation": "captum_globenc.evaluation.measures",
    "read_examples": "captum_globenc.evaluation.data",
    "sufficiency": "captum_globenc.evaluation.measures",
}

__all__ = [
    "MEASURES",
    "PRESETS",
    "BenchmarkResult",
    "Example",
    "Preset",
    "aopc",
    "benchmark",
    "comprehensiveness",
    "leave_one_out_tau",
    "log_odds",
    "probability_drop",
    "rank_correlation",
    "read_examples",
    "sufficiency",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(
        f"module 'captum_globenc.evaluation' has no attribute {name!r}"
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
