"""Attribution methods side by side: measures of faithfulness and a benchmark.

Needs the extra ``benchmark``: ``pip install "captum_globenc[benchmark]"``.
"""

from importlib.util import find_spec

_NEEDED = ("datasets", "matplotlib", "pandas", "scipy", "sklearn", "tqdm")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(
        f"captum_globenc.evaluation needs {', '.join(_missing)}: "
        'pip install "captum_globenc[benchmark]"'
    )

from captum_globenc.evaluation.data import Example, read_examples  # noqa: E402
from captum_globenc.evaluation.measures import (  # noqa: E402
    aopc,
    comprehensiveness,
    leave_one_out_tau,
    log_odds,
    probability_drop,
    rank_correlation,
    sufficiency,
)
from captum_globenc.evaluation.presets import PRESETS, Preset  # noqa: E402
from captum_globenc.evaluation.result import BenchmarkResult  # noqa: E402
from captum_globenc.evaluation.runner import benchmark  # noqa: E402
from captum_globenc.evaluation.scoring import MEASURES  # noqa: E402

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
