"""A run's folder: what has been measured so far, a line per text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captum_globenc.errors import InputError
from captum_globenc.evaluation.scoring import Record


class Store:
    """Records of a run, kept in a folder so that an interrupted run goes on.

    Records are written batch by batch and forced onto the disk, so that a killed run
    loses at most the batch under way (of each process). No file is ever deleted, and
    none overwritten but the run's own.

    Args:
        folder (Path or None): where; None: nowhere but in memory.
        settings (dict): what the run's numbers depend on.

    Raises:
        InputError: the folder cannot be written, or holds something else than this run.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.records: dict[int, Record] = {}
        self.cost: dict[str, dict[str, float]] = {}
        self.cost_texts = 0
        self._folder = folder
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._resume(folder, settings)
        except OSError as error:
            raise InputError(
                f"cannot write {str(folder)!r}: {error.strerror}."
            ) from error

    def add(self, records: Iterable[Record]) -> None:
        """Keep these records, on the disk when this returns."""
        records = list(records)
        self.records.update((record["index"], record) for record in records)
        if self._folder is None:
            return
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with (self._folder / _RECORDS).open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def add_cost(self, cost: dict[str, dict[str, float]], texts: int) -> None:
        """Keep the cost of each method, measured on so many texts."""
        self.cost, self.cost_texts = cost, texts
        if self._folder is not None:
            _write(self._folder / _COST, {"texts": texts, "methods": cost})

    def _resume(self, folder: Path, settings: dict[str, Any]) -> None:
        # As they come back from a file.
        settings = json.loads(json.dumps(settings))
        if not (folder / _SETTINGS).exists():
            if any(folder.iterdir()):
                raise InputError(
                    f"{str(folder)!r} holds files that are no run of the benchmark: "
                    "give a new or an empty folder."
                )
            _write(folder / _SETTINGS, settings)
            return
        before = _read(folder / _SETTINGS)
        other = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
        if other:
            name = other[0]
            raise InputError(
                f"{str(folder)!r} holds a run with another {name} "
                f"({_short(before.get(name))}, now {_short(settings.get(name))}): give "
                "another output folder, or remove this one."
            )
        if (folder / _COST).exists():
            cost = _read(folder / _COST)
            self.cost, self.cost_texts = cost.get("methods", {}), cost.get("texts", 0)
        if (folder / _RECORDS).exists():
            whole = _whole_lines(folder / _RECORDS)
            self.records = {record["index"]: record for record in whole}


_SETTINGS, _RECORDS, _COST = "run.json", "run.jsonl", "run-cost.json"


def _write(path: Path, value: dict[str, Any]) -> None:
    """The whole file or none of it, also where the process is killed."""
    draft = path.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(
            f"{str(path)!r} is damaged: remove its folder, or give another one."
        )
    return value


def _whole_lines(path: Path) -> list[Record]:
    """The records; half a line, left by a killed run, is cut off."""
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(complete))
    return [json.loads(line) for line in complete.decode().splitlines()]


def _short(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
