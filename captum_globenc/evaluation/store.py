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
    loses at most the batch under way (of each process).

    Args:
        folder (Path or None): where; None: nowhere but in memory.
        settings (dict): what the run's numbers depend on.

    Raises:
        InputError: the folder cannot be written, or holds a run with other settings.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.records: dict[int, Record] = {}
        self.cost: dict[str, dict[str, float]] | None = None
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
        with (self._folder / "examples.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def add_cost(self, cost: dict[str, dict[str, float]]) -> None:
        """Keep the cost of each method."""
        self.cost = cost
        if self._folder is not None:
            (self._folder / "cost.json").write_text(json.dumps(cost), encoding="utf-8")

    def _resume(self, folder: Path, settings: dict[str, Any]) -> None:
        kept, run = folder / "run.json", folder / "examples.jsonl"
        # As they come back from a file.
        settings = json.loads(json.dumps(settings))
        if not kept.exists():
            kept.write_text(json.dumps(settings, indent=2), encoding="utf-8")
            run.unlink(missing_ok=True)
            return
        before = json.loads(kept.read_text(encoding="utf-8"))
        other = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
        if other:
            name = other[0]
            raise InputError(
                f"{str(folder)!r} holds a run with another {name} "
                f"({_short(before.get(name))}, now {_short(settings.get(name))}): give "
                "another output folder, or remove this one."
            )
        if (folder / "cost.json").exists():
            self.cost = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
        if run.exists():
            whole = self._whole_lines(run)
            self.records = {record["index"]: record for record in whole}

    @staticmethod
    def _whole_lines(run: Path) -> list[Record]:
        """The records; half a line, left by a killed run, is cut off."""
        content = run.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with run.open("r+b") as file:
                file.truncate(len(complete))
        return [json.loads(line) for line in complete.decode().splitlines()]


def _short(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
