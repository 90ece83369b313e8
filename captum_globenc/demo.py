"""The classifier that ships with the package, and sentences that it has never seen.

A BERT of three layers, 384 wide, that tells positive from negative sentences of film
reviews: trained by ``tutorials/train_demo_classifier.py``, which also says from what.
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification, PreTrainedTokenizerBase

#: Its files.
FOLDER = files("captum_globenc") / "data" / "demo_classifier"


def load_classifier() -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """The embedded sentiment classifier, in float32 and evaluation mode.

    Returns:
        *tuple* of model and tokenizer. Labels: 0 negative, 1 positive; at most 256
        tokens.
    """
    from transformers import AutoTokenizer, BertForSequenceClassification

    with as_file(FOLDER) as folder:
        model = BertForSequenceClassification.from_pretrained(folder, dtype="float32")
        return model.eval(), AutoTokenizer.from_pretrained(folder)


def held_out_sentences() -> list[tuple[str, int]]:
    """200 review sentences with their labels, kept out of the classifier's training.

    Returns:
        *list* of (sentence, label), label 0 for negative and 1 for positive.
    """
    labels = {"negative": 0, "positive": 1}
    lines = (FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["text"], labels[record["label"]]) for record in records]
