#!/usr/bin/env python3
"""Measure where relevance is read and from where the path to it begins.

AttnLRP and DecompX, at the word embeddings and at the output of the embedding block,
without a baseline and with several points from four baselines: on film reviews, which
the classifiers learned, and on product reviews, which they did not. Needs what
tutorials/train_demo_classifier.py leaves in build/demo.

    python benchmarks/relevance_points.py --limit 200
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from captum_globenc import AttnLRP, DecompX
from captum_globenc.evaluation import benchmark

sys.path += [str(Path(__file__).parents[1] / name) for name in ("docs", "tutorials")]
from make_report import MODELS, load
from train_demo_classifier import read_sentences

MEASURES = ("aopc", "comprehensiveness", "sufficiency", "leave_one_out_tau")
POINTS = {"pad": (1, 2, 3, 5), "mask": (1, 2, 3, 5), "zero": (3,), "mean": (3,)}
Scorer = Callable[..., Tensor]


def main() -> None:
    """Measure all settings and write one table per classifier and kind of text."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--work", type=Path, default=Path("build/demo"))
    arguments.add_argument("--limit", type=int, default=200)
    arguments.add_argument("--measures", nargs="+", default=list(MEASURES))
    arguments.add_argument("--models", nargs="+", default=MODELS)
    arguments.add_argument("--runs", type=Path, default=Path("build/points"))
    options = arguments.parse_args()
    films = options.work / "held_out.jsonl"
    products = product_reviews(next(options.work.glob("vader*.tar.gz")), 120)
    for name in options.models:
        model, tokenizer = load(name, options.work)
        for kind, texts in (("films", films), ("products", products)):
            result = benchmark(
                model,
                tokenizer,
                texts,
                dict(settings(model, tokenizer)),
                measures=options.measures,
                limit=options.limit,
                cost_texts=0,
                output=options.runs / f"{name}-{kind}",
            )
            table = result.table["mean"].unstack()
            print(f"\n{name}, {kind}, {len(result.records)} texts")
            print(table.sort_values("aopc", ascending=False).round(3).to_string())
            (options.runs / f"{name}-{kind}.json").write_text(
                json.dumps(table.to_dict("index"), indent=1)
            )


def settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Scorer]]:
    """Name → scorer of every setting."""
    for kind in (AttnLRP, DecompX):
        for place in ("word_embeddings", "block"):
            method = kind(model, place=place)
            name = f"{kind.__name__} {place}"
            yield name, scorer(method, tokenizer, None, 1)
            for baseline, steps in POINTS.items():
                for count in steps:
                    yield (
                        f"{name} {baseline} {count}",
                        scorer(method, tokenizer, baseline, count),
                    )


def scorer(
    method: AttnLRP | DecompX,
    tokenizer: PreTrainedTokenizerBase,
    baseline: str | None,
    steps: int,
) -> Scorer:
    """A setting as a function of ids, mask and target."""
    frame = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])

    def start(ids: Tensor) -> Tensor | None:
        if baseline is None:
            return None
        if baseline == "zero":
            return torch.zeros(1)
        if baseline == "mean":
            table = method.forward_func.get_input_embeddings().weight
            return table.detach().mean(0)
        token = tokenizer.pad_token_id if baseline == "pad" else tokenizer.mask_token_id
        return torch.where(torch.isin(ids, frame), ids, token)

    def scores(ids: Tensor, mask: Tensor, target: Tensor, *_: Tensor) -> Tensor:
        return method.attribute(
            ids, target, (mask,), baselines=start(ids), n_steps=steps
        )

    scores.__name__ = f"{type(method).__name__}_{method.place}_{baseline}_{steps}"
    return scores


def product_reviews(sdist: Path, count: int) -> list[str]:
    """Snippets of product reviews with a clear rating, in a fixed random order."""
    texts = sorted(text for text, _ in read_sentences(sdist, "amazon"))
    random.Random(0).shuffle(texts)
    return texts[:count]


if __name__ == "__main__":
    main()
