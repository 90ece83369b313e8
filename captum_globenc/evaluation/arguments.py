"""What can be said of a benchmark's numbers before anything is loaded."""

from __future__ import annotations

from captum_globenc.errors import InputError


def check_counts(
    limit: int | None, batch_size: int, processes: int, cost_texts: int = 0
) -> None:
    """Raise InputError where a number is no number of texts or processes.

    Args:
        limit (int or None): as for :func:`captum_globenc.evaluation.benchmark`.
        batch_size (int): likewise.
        processes (int): likewise.
        cost_texts (int, optional): likewise. Default: 0.
    """
    for name, number, least in [
        ("limit", 1 if limit is None else limit, 1),
        ("batch_size", batch_size, 1),
        ("processes", processes, 1),
        ("cost_texts", cost_texts, 0),
    ]:
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(f"{name} must be at least {least}, got {number!r}.")
