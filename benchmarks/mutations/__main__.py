"""Run the campaign: ``python -m benchmarks.mutations``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.mutations.campaign import Case, Result, run
from benchmarks.mutations.catalogue import part

OUTCOMES = ("right", "refused", "wrong", "crash")


def table(results: Sequence[Result]) -> Table:
    """Counts of outcomes by kind."""
    shown = Table("kind", "cases", *OUTCOMES, "not accepted", "undecided")
    kinds = list(dict.fromkeys(result.case.kind for result in results))
    for kind in [*kinds, ""]:
        some = [r for r in results if kind in ("", r.case.kind)]
        decided = Counter(r.outcome for r in some if r.case.decided)
        bad = sum(not r.is_good for r in some)
        counts = [*(decided[o] for o in OUTCOMES), bad]
        undecided = sum(not r.case.decided for r in some)
        shown.add_row(kind or "all", *map(str, (len(some), *counts, undecided)))
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases; 1 where one does not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="1/1", help="N/M: every M-th case, from N")
    parser.add_argument("--only", default="", help="cases with this in their titles")
    parser.add_argument("--list", action="store_true", help="list them, run none")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    given = parser.parse_args(arguments)
    number, of = map(int, given.part.split("/"))
    chosen = [case for case in part(number, of) if given.only in case.title]
    if given.list:
        print(*(_line(case) for case in chosen), sep="\n")
        return 0
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    start, results = time.perf_counter(), []
    console = Console(width=None if sys.stdout.isatty() else 120)
    for case in chosen:
        result = run(case)
        results.append(result)
        if given.verbose or not result.is_good:
            sign = " " if result.is_good else "!"
            line = f"{sign} {result.outcome:8}{case.title}  ({result.detail[:300]})"
            print(line, flush=True)
    console.print(table(results))
    seconds = time.perf_counter() - start
    print(f"{len(results)} cases in {seconds:.0f} seconds")
    return int(any(not result.is_good for result in results))


def _line(case: Case) -> str:
    accepted = " or ".join(sorted(case.accept, reverse=True))
    return f"{case.title}  ({accepted if case.decided else 'undecided'})"


if __name__ == "__main__":
    sys.exit(main())
