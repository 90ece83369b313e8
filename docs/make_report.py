#!/usr/bin/env python3
"""Make the reports in docs/benchmark: every method, on 500 held-out sentences.

Needs what tutorials/train_demo_classifier.py leaves in build/demo: the six-layer
classifier and the 1,000 sentences that neither it nor the embedded one has seen. An
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from captum_globenc import demo
from captum_globenc.evaluation import PRESETS, benchmark

SENTENCES = 500
FULL = PRESETS["full"]


def main() -> None:
    """Benchmark both classifiers and save what is shown in the documentation."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--work", type=Path, default=Path("build/demo"))
    arguments.add_argument("--runs", type=Path, default=Path("build/report"))
    arguments.add_argument("--output", type=Path, default=Path("docs/benchmark"))
    options = arguments.parse_args()
    six_layers = options.work / "six-layer-film-reviews"
    models = {
        "six-layer": (
            AutoModelForSequenceClassification.from_pretrained(six_layers).eval(),
            AutoTokenizer.from_pretrained(six_layers),
        ),
        "embedded": demo.load_classifier(),
    }
    for name, (model, tokenizer) in models.items():
        result = benchmark(
            model,
            tokenizer,
            options.work / "held_out.jsonl",
            FULL.methods,
            measures=FULL.measures,
            per_layer=FULL.per_layer,
            label_column="label",
            limit=SENTENCES,
            output=options.runs / name,
        )
        result.save(options.output / name)


if __name__ == "__main__":
    main()
