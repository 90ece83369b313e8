"""What a method of one layer is: a function, and whether its numbers have a sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from captum_globenc.recording.records import LayerRecord, Receivers

#: A block of receivers → n_ij, (batch, receivers, sources).
Rows = Callable[[Receivers], Tensor]


@dataclass(frozen=True)
class Contribution:
    """How much each receiver of a layer takes from each source.

    Args:
        name (str): what it is called.
        rows (Callable): :class:`~captum_globenc.recording.records.LayerRecord` → rows:
            what belongs to the sources is prepared once per layer, and ``rows(block)``
            gives :math:`n_{ij}` of a block of receivers, (batch, receivers, sources).
        is_signed (bool, optional): values below 0 occur. Default: False.
        replays (bool, optional): it runs the layer again, which runs whole batches: it
            is given no record of a part of the batch. Default: False.
        stacks (bool, optional): it takes records of several layers stacked, see
            ``captum_globenc.recording.records.stacked``. Default: False, it is
            given one layer after another.
        narrows (bool, optional): what a receiver takes depends on no tokens but those
            that it attends to: of long texts, it is given records of a part of the
            tokens. Default: False, it is given all of them.
    """

    name: str
    rows: Callable[[LayerRecord], Rows]
    is_signed: bool = False
    replays: bool = False
    stacks: bool = False
    narrows: bool = False
