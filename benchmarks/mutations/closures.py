"""What a forward function does with its inputs before the encoder gets them."""

# Small functions are what their names say.
# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.mutations.campaign import (
    EITHER,
    REFUSED,
    RIGHT,
    Scores,
    Trial,
    case,
)
from benchmarks.mutations.models import HIDDEN, Subject, subject
from captum_globenc import GlobEnc

KIND = "closures"
# What runs the model: (subject, ids, mask) → logits
Closure = Callable[[Subject, Tensor, Tensor], Tensor]
FAMILIES = ("bert", "distilbert", "gpt2", "roberta")


# Of these there is a right answer: scores of the tokens where they stand in the inputs


def sorted_by_length(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    order = mask.sum(1).argsort()
    return one.forward(ids[order], mask[order])[order.argsort()]


def batch_flipped(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.flip(0), mask.flip(0)).flip(0)


def repeated_rows(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.repeat(2, 1), mask.repeat(2, 1))[: len(ids)]


def one_by_one(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([one.forward(i[None], m[None]) for i, m in zip(ids, mask)])


def first_row_last(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.roll(1, 0), mask.roll(1, 0)).roll(-1, 0)


def padding_cut_off(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    width = int(mask.sum(1).max())
    return one.forward(ids[:, :width], mask[:, :width])


def more_padding(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    wider = functional.pad(ids, (0, 3), value=1)
    return one.forward(wider, functional.pad(mask, (0, 3)))


def in_another_thread(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(one.forward, ids, mask).result()


PERMUTING: tuple[Closure, ...] = (
    sorted_by_length,
    batch_flipped,
    repeated_rows,
    one_by_one,
    first_row_last,
    padding_cut_off,
    more_padding,
    in_another_thread,
)


@case(KIND, EITHER, [(c, f) for c in PERMUTING for f in FAMILIES])
def rows_or_padding(run: Closure, family: str) -> Trial:
    """Right: what each example gets is its own."""
    one = subject(family)
    truth = one.truth()
    one.inputs = functional.pad(one.inputs, (0, 1), value=1)
    one.mask = functional.pad(one.mask, (0, 1))  # type: ignore[arg-type]
    truth = functional.pad(truth, (0, 1))
    return one.trial(lambda ids, mask: run(one, ids, mask), truth)


# Of these there is none: another text is read


def tokens_flipped(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.flip(1), mask.flip(1))


def tokens_rolled(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.roll(1, 1), mask)


def shifted_by_one(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(torch.cat([ids[:, 1:], ids[:, :1]], 1), mask)


def two_tokens_swapped(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    order = torch.arange(ids.shape[1])
    order[[1, 3]] = order[[3, 1]]
    return one.forward(ids[:, order], mask)


def cropped(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids[:, :5], mask[:, :5])


def cropped_in_front(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids[:, 2:], mask[:, 2:])


def cropped_and_filled(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    shorter = functional.pad(ids[:, 1:], (0, 1), value=2)
    return one.forward(shorter, mask)


def one_token_masked(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    ids = ids.clone()
    ids[:, 2] = 90
    return one.forward(ids, mask)


def rare_words_replaced(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.masked_fill(ids > 40, 3), mask)


def changed_in_place(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    ids[:, 2] = 90
    return one.forward(ids, mask)


def row_dropped_and_another_doubled(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids[:1].repeat(2, 1), mask[:1].repeat(2, 1))


def rows_exchanged(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.flip(0), mask.flip(0))


def token_put_in_front(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(
        functional.pad(ids, (1, 0), value=50), functional.pad(mask, (1, 0), value=1)
    )


def token_put_in_front_and_last_cut(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    longer = functional.pad(ids, (1, 0), value=50)[:, :-1]
    return one.forward(longer, mask)


def padding_to_the_left(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(1).tolist()
    turned = [row.roll(len(row) - n) for row, n in zip(ids, lengths)]
    return one.forward(torch.stack(turned), mask.flip(1))


def all_of_one_word(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(torch.full_like(ids, 7), mask)


def called_twice_on_two_texts(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids, mask) - one.forward(ids.flip(0), mask.flip(0))


def called_twice_on_one_text(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    one.forward(ids.roll(1, 1), mask)
    return one.forward(ids, mask)


def two_texts_in_one_batch(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    both = torch.cat([ids, ids.roll(1, 1)])
    output = one.forward(both, mask.repeat(2, 1))
    return output[: len(ids)] - output[len(ids) :]


REPLACING: tuple[Closure, ...] = (
    tokens_flipped,
    tokens_rolled,
    shifted_by_one,
    two_tokens_swapped,
    cropped,
    cropped_in_front,
    cropped_and_filled,
    one_token_masked,
    rare_words_replaced,
    row_dropped_and_another_doubled,
    rows_exchanged,
    token_put_in_front,
    token_put_in_front_and_last_cut,
    all_of_one_word,
    called_twice_on_two_texts,
    two_texts_in_one_batch,
)


@case(KIND, REFUSED, [(c, f) for c in REPLACING for f in ("bert", "gpt2")])
def another_text(run: Closure, family: str) -> Trial:
    """What the encoder reads is not what is to be explained."""
    one = subject(family, lengths=(8, 8))
    run(one, one.inputs.clone(), one.mask)  # type: ignore[arg-type]
    return one.trial(lambda ids, mask: run(one, ids, mask), truth=None)


@case(
    KIND,
    REFUSED,
    [
        (c,)
        for c in (
            tokens_flipped,
            tokens_rolled,
            one_token_masked,
            rows_exchanged,
            token_put_in_front_and_last_cut,
        )
    ],
)
def another_text_for_layers_alone(run: Closure) -> Trial:
    """The encoder is a stack of layers: ids arrive at a table in front of it."""
    return another_text(run, "torch-post")


@case(KIND, EITHER, [("bert",), ("roberta",), ("gpt2",)])
def ids_changed_in_place(family: str) -> Trial:
    """The caller's own tensor is another one afterwards: right is what that says."""
    one = subject(family)
    given = one.inputs.clone()

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return changed_in_place(one, ids, mask)

    truth = one.truth(forward)
    return Scores(lambda: GlobEnc(forward).attribute(given, 1, one.arguments), truth)


@case(KIND, REFUSED, [("bert",), ("gpt2",), ("distilbert",)])
def padding_moved_to_the_left(family: str) -> Trial:
    """Of the shorter text, every token."""
    one = subject(family)
    return one.trial(lambda ids, mask: padding_to_the_left(one, ids, mask), truth=None)


@case(KIND, EITHER, [("bert",), ("distilbert",)])
def called_twice_and_the_second_counts(family: str) -> Trial:
    """The first call's output is thrown away."""
    one = subject(family, lengths=(8, 8))
    truth = one.truth()
    return one.trial(lambda ids, mask: called_twice_on_one_text(one, ids, mask), truth)


# The mask


def no_mask(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids)


def one_token_hidden(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[:, 2] = 0
    return one.forward(ids, mask)


def all_but_three_hidden(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids, (torch.arange(ids.shape[1]) < 3).long().expand(2, -1))


def mask_of_bools(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids, mask.bool())


def mask_of_floats(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids, mask.double())


def mask_made_of_ids(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids, (ids != 1).long())


def mask_in_four_dimensions(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    hidden = mask[:, None, None] == 0
    whole = torch.zeros(2, 1, 8, 8).double().masked_fill(hidden, -torch.inf)
    return one.forward(ids, whole)


def causal_mask(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    hidden = torch.ones(8, 8).triu(1).bool() | (mask[:, None, None] == 0)
    whole = torch.zeros(2, 1, 8, 8).double().masked_fill(hidden, -torch.inf)
    return one.forward(ids, whole)


@case(
    KIND,
    RIGHT,
    [
        (c, f)
        for c in (no_mask, mask_made_of_ids)
        for f in ("bert", "distilbert", "gpt2", "torch-post")
    ],
)
def mask_of_ones_own(run: Closure, family: str) -> Trial:
    """What the encoder attends to is seen."""
    one = subject(family)
    return one.trial(lambda ids, mask: run(one, ids, mask))


@case(
    KIND,
    EITHER,
    [
        (c, f)
        for c in (
            one_token_hidden,
            all_but_three_hidden,
            mask_of_bools,
            mask_of_floats,
            mask_in_four_dimensions,
            causal_mask,
        )
        for f in ("bert", "distilbert")
    ],
)
def unusual_mask(run: Closure, family: str) -> Trial:
    """Other tokens are padding than the caller's mask says, or the form is another."""
    one = subject(family)
    return one.trial(lambda ids, mask: run(one, ids, mask))


# Nothing changes but how the model is called


def under_no_grad(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return one.forward(ids, mask)


def under_inference_mode(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        return one.forward(ids, mask)


def with_gradients(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.enable_grad():
        return one.forward(ids, mask)


def cloned(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.clone(), mask.clone())


def of_another_integer(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.int(), mask.int())


def through_numpy(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(torch.from_numpy(ids.numpy().copy()), mask)


def turned_and_turned_back(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids.flip(1).flip(1), mask)


def softmax_of_logits(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    return one.forward(ids, mask).softmax(-1)


def inputs_changed_afterwards(one: Subject, ids: Tensor, mask: Tensor) -> Tensor:
    given, hidden = ids.clone(), mask.clone()
    output = one.forward(given, hidden)
    given.fill_(5)
    hidden.zero_()
    return output


@case(
    KIND,
    RIGHT,
    [
        (c, f)
        for c in (
            under_no_grad,
            under_inference_mode,
            with_gradients,
            cloned,
            of_another_integer,
            through_numpy,
            turned_and_turned_back,
            softmax_of_logits,
        )
        for f in ("bert", "gpt2", "torch-pre")
    ],
)
def harmless(run: Closure, family: str) -> Trial:
    """The encoder gets what is to be explained."""
    one = subject(family)
    truth = one.truth()
    return one.trial(lambda ids, mask: run(one, ids, mask), truth)


@case(KIND, EITHER, [("bert",), ("gpt2",), ("torch-post",)])
def inputs_overwritten_afterwards(family: str) -> Trial:
    """The tensors that the encoder was given are others when the run is over."""
    one = subject(family)
    truth = one.truth()
    return one.trial(lambda ids, mask: inputs_changed_afterwards(one, ids, mask), truth)


@case(KIND, EITHER, [("bert",), ("llama",), ("vit",)])
def under_autocast(family: str) -> Trial:
    """Products in bfloat16, whatever the model's dtype is."""
    one = subject(family, torch.float32)

    def forward(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return one.forward(inputs, mask)

    built = one.trial(forward)
    return Scores(built.found, built.truth, torch.bfloat16)


@case(KIND, RIGHT, [("bert",), ("gpt2",)])
def other_arguments(family: str) -> Trial:
    """Positions that run backwards are a part of the model."""
    one = subject(family, lengths=(8, 8))
    positions = torch.arange(8).flip(0).expand(2, -1)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return one.model(ids, attention_mask=mask, position_ids=positions).logits

    return one.trial(forward)


# Embeddings


def _table(one: Subject) -> Any:
    return one.model.get_input_embeddings()


def as_they_are(e: Tensor) -> Tensor:
    return e


def scaled(e: Tensor) -> Tensor:
    return 1.5 * e


def shifted(e: Tensor) -> Tensor:
    return e + 0.3


def noisy(e: Tensor) -> Tensor:
    return e + torch.randn(e.shape, generator=torch.Generator().manual_seed(0)).to(e)


def rolled(e: Tensor) -> Tensor:
    return e.roll(1, 1)


def flipped(e: Tensor) -> Tensor:
    return e.flip(1)


def smoothed(e: Tensor) -> Tensor:
    return (e + e.roll(1, 1)) / 2


def of_another_example(e: Tensor) -> Tensor:
    return e.flip(0)


def one_zeroed(e: Tensor) -> Tensor:
    return e * (torch.arange(e.shape[1]) != 2)[:, None]


@case(KIND, RIGHT, [("bert",), ("distilbert",), ("llama",), ("gpt2",)])
def ids_looked_up_in_the_closure(family: str) -> Trial:
    """The model gets embeddings of the ids."""
    return _looked_up(family, as_they_are)


@case(
    KIND,
    EITHER,
    [(c, f) for c in (scaled, shifted, noisy, one_zeroed) for f in ("bert", "llama")],
)
def looked_up_and_changed(change: Callable[[Tensor], Tensor], family: str) -> Trial:
    """Each token by itself: right is the score of its position."""
    return _looked_up(family, change)


@case(
    KIND,
    EITHER,
    [
        (c, f)
        for c in (rolled, flipped, smoothed, of_another_example)
        for f in ("bert", "llama")
    ],
)
def looked_up_and_mixed(change: Callable[[Tensor], Tensor], family: str) -> Trial:
    """Right is nothing but the score of the id's own vector, and smoothing has none."""
    one = subject(family, lengths=(8, 8))
    table = _table(one)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return one.model(inputs_embeds=change(table(ids)), attention_mask=mask).logits

    truth = one.truth(forward)
    known = {rolled: truth.roll(-1, 1), flipped: truth.flip(1)}
    return one.trial(forward, known.get(change))


def _looked_up(family: str, change: Callable[[Tensor], Tensor]) -> Trial:
    one = subject(family, lengths=(8, 8))
    table = _table(one)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return one.model(inputs_embeds=change(table(ids)), attention_mask=mask).logits

    return one.trial(forward)


@case(
    KIND,
    EITHER,
    [
        (c, f)
        for c in (scaled, shifted, noisy, rolled, flipped, smoothed, of_another_example)
        for f in ("bert", "gpt2")
    ],
)
def embeddings_changed(change: Callable[[Tensor], Tensor], family: str) -> Trial:
    """Embeddings are to be explained, and others are read."""
    one = subject(family, lengths=(8, 8))
    embeddings = _table(one)(one.inputs).detach()

    def forward(embeddings: Tensor, mask: Tensor) -> Tensor:
        return one.model(inputs_embeds=change(embeddings), attention_mask=mask).logits

    one.inputs = embeddings
    truth = one.truth(forward)[..., None].expand(-1, -1, HIDDEN) / HIDDEN
    known = {
        scaled: truth,
        shifted: truth,
        noisy: truth,
        rolled: truth.roll(-1, 1),
        flipped: truth.flip(1),
    }
    globenc = GlobEnc(forward)
    return Scores(
        lambda: globenc.attribute(embeddings, 1, one.arguments), known.get(change)
    )


# Images


def normalised(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def image_flipped(images: Tensor) -> Tensor:
    return images.flip(-1)


def image_rolled(images: Tensor) -> Tensor:
    return images.roll(4, -1)


def images_exchanged(images: Tensor) -> Tensor:
    return images.flip(0)


def image_blacked_out(images: Tensor) -> Tensor:
    return torch.zeros_like(images)


def channels_exchanged(images: Tensor) -> Tensor:
    return images.flip(1)


def blurred(images: Tensor) -> Tensor:
    return functional.avg_pool2d(images, 5, 1, 2)


@case(KIND, EITHER, [(normalised, "vit"), (channels_exchanged, "vit")])
def image_prepared(change: Callable[[Tensor], Tensor], family: str) -> Trial:
    """Every pixel stays where it is."""
    one = subject(family)
    return one.trial(lambda images: one.forward(change(images)))


@case(
    KIND,
    REFUSED,
    [
        (c, f)
        for c in (
            image_flipped,
            image_rolled,
            images_exchanged,
            image_blacked_out,
            blurred,
        )
        for f in ("vit", "clip_vision_model")
    ],
)
def another_image(change: Callable[[Tensor], Tensor], family: str) -> Trial:
    """Pixels move to other places, or are those of another image."""
    one = subject(family)
    return one.trial(lambda images: one.forward(change(images)), truth=None)
