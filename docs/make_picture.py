#!/usr/bin/env python3
"""Draw the picture of the README: what `captum-globenc explain` prints, as SVG."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from captum_globenc import demo
from captum_globenc.explanation import explain
from captum_globenc.visualization import to_terminal

TEXT = "Not so funny, and far too long, but a lovely film."
PICTURE = Path(__file__).parent / "images" / "explain.svg"


def main() -> None:
    """Explain one sentence and save the terminal's picture of it."""
    model, tokenizer = demo.load_classifier()
    explain(model, tokenizer, TEXT)  # So that no first use is in the seconds shown.
    console = Console(
        record=True,
        width=82,
        file=io.StringIO(),
        force_terminal=True,
        color_system=None,
    )
    console.print(to_terminal(explain(model, tokenizer, TEXT)))
    PICTURE.parent.mkdir(exist_ok=True)
    svg = console.export_svg(title=f'captum-globenc explain "{TEXT}"')
    # The reader's own monospaced font: a picture should not fetch one.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    PICTURE.write_text(svg.replace("Fira Code", "monospace"), encoding="utf-8")


if __name__ == "__main__":
    main()
