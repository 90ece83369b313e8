"""What must not matter: padding, batch, order, attention function, how it is run."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import transformers as t
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_globenc import (
    ALTI,
    AttentionRollout,
    GlobEnc,
    InputError,
    UnsupportedModelError,
    ValueZeroing,
    record,
)
from captum_globenc.recording.outputs import output_tensor
from tests.conftest import left_behind
from tests.models import (
    FAMILIES,
    SIZES,
    build,
    encoder_of,
    numbers_positions_from_padding,
    padded,
    position_table,
    randomize,
    sentence,
    takes_padded_embeddings,
    within,
)

NAMES = ["W_RES", "N", "N_ENC"]
EXACT = {"rtol": 1e-12, "atol": 0}
OTHERS = {
    "ALTI": ALTI,
    "attention rollout": AttentionRollout,
    "Value Zeroing": ValueZeroing,
    "class-aware": functools.partial(GlobEnc, class_aware=True),
}
METHODS = {name: functools.partial(GlobEnc, local=name) for name in NAMES} | OTHERS
# Of what is left where large numbers are subtracted.
LIMITS = {
    "ALTI": {"rtol": 1e-9, "atol": 1e-13},
    "Value Zeroing": {"rtol": 1e-8, "atol": 1e-13},
    "class-aware": {"rtol": 1e-9, "atol": 1e-10},
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def attribute(model: object, ids, mask, **options):
    globenc = GlobEnc(model, **options)
    return globenc.attribute(ids, target=1, additional_forward_args=(mask,))


@pytest.mark.parametrize("name", METHODS)
def test_padded_batch_equals_single_examples(family: str, name: str) -> None:
    model = build(family)
    limit = within(model, LIMITS.get(name, EXACT))
    sentences = [sentence(n, seed=n) for n in (11, 3, 7)]
    ids, mask = padded(sentences)
    method = METHODS[name](model)
    scores = method.attribute(ids, 0, (mask,))
    whole = method.decompose(ids, (mask,))
    for row, example in enumerate(sentences):
        n = len(example)
        single = method.attribute(example[None], 0, (torch.ones(1, n).long(),))
        torch.testing.assert_close(scores[row, :n], single[0], **limit)
        alone = method.decompose(example[None]).local[0]
        torch.testing.assert_close(whole.local[row, :, :n, :n], alone, **limit)


@pytest.mark.parametrize("name", METHODS)
def test_appended_padding_changes_nothing(family: str, name: str) -> None:
    model = build(family)
    sentences = [sentence(8), sentence(5)]
    method = METHODS[name](model)
    (ids, mask), (longer, longer_mask) = padded(sentences), padded(sentences, extra=6)
    short = method.attribute(ids, 1, (mask,))
    long = method.attribute(longer, 1, (longer_mask,))
    limit = within(model, LIMITS.get(name, EXACT))
    torch.testing.assert_close(long[:, :8], short, **limit)
    assert not long[:, 8:].any()


def test_left_padding() -> None:
    """The head reads the first token, which is padding: nothing worth explaining."""
    model = build("bert")
    ids, mask = padded([sentence(6)], extra=3)
    ids, mask = ids.flip(1), mask.flip(1)
    globenc = GlobEnc(model)
    with pytest.raises(InputError, match="token 0 of example 0, which is padding"):
        globenc.attribute(ids, 0, (mask,))
    scores = globenc.attribute(ids, 0, (mask,), token_index=3)
    rollout = globenc.decompose(ids, (mask,)).rollout()
    torch.testing.assert_close(scores[0], rollout[0, 3], **EXACT)
    assert not scores[0, :3].any()


def test_order_of_the_batch_does_not_matter(family: str) -> None:
    model = build(family)
    ids, mask = padded([sentence(n, seed=n) for n in (4, 9, 6, 2)])
    order = torch.tensor([2, 0, 3, 1])
    scores = attribute(model, ids, mask)
    permuted = attribute(model, ids[order], mask[order])
    torch.testing.assert_close(permuted, scores[order], **EXACT)


def test_internal_batches_give_the_same(family: str) -> None:
    model = build(family)
    ids, mask = padded([sentence(n, seed=n) for n in (4, 9, 6, 2, 7)])
    globenc = GlobEnc(model)
    whole = globenc.attribute(ids, [0, 1, 2, 1, 0], (mask,))
    for size in (1, 2, 5, 100):
        parts = globenc.attribute(
            ids, [0, 1, 2, 1, 0], (mask,), internal_batch_size=size
        )
        torch.testing.assert_close(parts, whole, **EXACT)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "kind", sorted({"bert", "modernbert", "xlnet"} & set(FAMILIES))
)
def test_other_methods_in_any_order_and_parts(kind: str, name: str) -> None:
    model, limit = build(kind), LIMITS.get(name, EXACT)
    ids, mask = padded([sentence(n, seed=n) for n in (4, 9, 6, 2)])
    method, targets = METHODS[name](model), torch.tensor([0, 1, 2, 1])
    whole = method.attribute(ids, targets, (mask,))
    for size in (1, 3):
        parts = method.attribute(ids, targets, (mask,), internal_batch_size=size)
        torch.testing.assert_close(parts, whole, **limit)
    order = torch.tensor([2, 0, 3, 1])
    permuted = method.attribute(ids[order], targets[order], (mask[order],))
    torch.testing.assert_close(permuted, whole[order], **limit)
    run = record(model, ids, mask)
    assert torch.equal(method.attribute(run, targets), whole)
    local = method.decompose(run).local
    assert torch.equal(local, method.decompose(ids, mask).local)
    sizes = METHODS[name](model, normalize=True).attribute(run, targets).abs().sum(-1)
    torch.testing.assert_close(sizes, torch.ones(4).double(), **EXACT)
    if name != "class-aware":
        rollout = method.decompose(run).rollout()
        torch.testing.assert_close(whole, rollout[:, 0], rtol=1e-9, atol=1e-13)
        at_second = method.attribute(run, targets, token_index=1)
        torch.testing.assert_close(at_second, rollout[:, 1], rtol=1e-9, atol=1e-13)
    assert not left_behind(model)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_methods_by_any_attention(name: str, attention: str) -> None:
    ids, mask = padded([sentence(8), sentence(5)])
    expected = METHODS[name](build("bert")).attribute(ids, 1, (mask,))
    model = build("bert", attention=attention)
    scores = METHODS[name](model).attribute(ids, 1, (mask,))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_on_embeddings_and_tuples(name: str) -> None:
    model = build("bert")
    ids, mask = padded([sentence(8), sentence(5)])
    limit = LIMITS.get(name, EXACT)
    expected = METHODS[name](model).attribute(ids, 1, (mask,))
    embeddings = model.get_input_embeddings()(ids).detach()

    def forward(embeddings, types, mask):
        return model(
            inputs_embeds=embeddings, token_type_ids=types, attention_mask=mask
        ).logits

    method, types = METHODS[name](forward), torch.zeros_like(ids)
    spread, zeros = method.attribute((embeddings, types), 1, mask)
    assert spread.shape == embeddings.shape
    torch.testing.assert_close(spread.sum(-1), expected, **limit)
    assert not zeros.any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_does_not_matter(family: str, attention: str) -> None:
    if (family, attention) == ("modernbert", "eager"):
        pytest.skip("in float64 its eager attention makes NaN of padding")
    model = build(family, attention=attention)
    ids, mask = padded([sentence(8), sentence(5)])
    scores = attribute(model, ids, mask)
    # LayoutLM had no sdpa in older releases of transformers.
    chosen = attention if getattr(model, "_supports_sdpa", True) else "eager"
    assert model.config._attn_implementation == chosen
    expected = attribute(build(family), ids, mask)
    # Eager attention takes its softmax in float32 whatever the model's dtype is.
    limit = 1e-5 if attention == "eager" else 1e-12
    torch.testing.assert_close(scores, expected, rtol=limit, atol=0)


def test_closure_wrapper_and_base_model_equal_the_model(family: str) -> None:
    model = build(family)
    ids, mask = padded([sentence(8), sentence(5)])
    expected = attribute(model, ids, mask)
    expected_local = GlobEnc(model).decompose(ids, (mask,)).local

    def closure(ids, mask):
        return output_tensor(model(ids, attention_mask=mask)).softmax(-1)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids, mask):
            return output_tensor(self.inner(ids, attention_mask=mask))

    encoder = encoder_of(family, model)

    def base(ids, mask):
        return encoder(input_ids=ids, attention_mask=mask)

    for forward in (closure, Wrapper(), model.forward, base):
        # A base model's output is one per token: a target would name another token.
        target = None if forward is base else 1
        if forward is base and family in ("bart", "mbart", "xlnet"):
            continue  # Their pooling is none, or the last token.
        # SigLIP's own pooling reads the last token, be it padding, which is refused.
        rows = 1 if (family, forward) == ("siglip_text_model", base) else 2
        found = GlobEnc(forward).attribute(ids[:rows], target, mask[:rows])
        torch.testing.assert_close(found, expected[:rows], **EXACT)
        local = GlobEnc(forward).decompose(ids, (mask,)).local
        torch.testing.assert_close(local, expected_local, **EXACT)
    assert not left_behind(model)


def test_encoder_picks_one_of_two() -> None:
    first, second = build("bert"), build("roberta")

    def both(ids, mask):
        return first(ids, mask).logits + second(ids, mask).logits

    ids, mask = padded([sentence(8), sentence(5)])
    for model in (first, second):
        scores = attribute(both, ids, mask, encoder=model)
        torch.testing.assert_close(scores, attribute(model, ids, mask), **EXACT)
    assert not left_behind(first)
    assert not left_behind(second)


def test_two_encoders_in_one_module_are_refused() -> None:
    pair = nn.ModuleDict({"left": build("bert"), "right": build("electra")})
    with pytest.raises(UnsupportedModelError, match=r"2 encoders.*encoder="):
        GlobEnc(pair).attribute(sentence(4)[None])


@pytest.mark.parametrize(
    "family", [name for name, f in FAMILIES.items() if f.embeddings != "never"]
)
def test_embeddings_as_input(family: str) -> None:
    model = build(family)
    ids, mask = padded([sentence(8), sentence(5)])
    # ESM takes as inputs_embeds what others make of them: the embeddings' output.
    table = model.esm.embeddings if family == "esm" else model.get_input_embeddings()
    embeddings = table(ids).detach()
    if not takes_padded_embeddings(family):
        # Without ids RoBERTa counts padding as positions, and decoders cannot tell
        # where it begins, so only full length agrees.
        ids, mask, embeddings = ids[:1], mask[:1], embeddings[:1]

    def forward(embeddings, mask):
        return model(inputs_embeds=embeddings, attention_mask=mask).logits

    spread = attribute(forward, embeddings, mask)
    assert spread.shape == embeddings.shape
    torch.testing.assert_close(spread.sum(-1), attribute(model, ids, mask), **EXACT)


def test_further_inputs_get_zeros() -> None:
    model = build("bert")
    ids, mask = padded([sentence(8), sentence(5)])
    types = torch.zeros_like(ids)

    def forward(ids, types, mask):
        return model(ids, token_type_ids=types, attention_mask=mask).logits

    scores, zeros = GlobEnc(forward).attribute((ids, types), 1, mask)
    torch.testing.assert_close(scores, attribute(model, ids, mask), **EXACT)
    assert zeros.shape == types.shape
    assert not zeros.any()


def test_token_index() -> None:
    model = build("bert")
    ids, mask = padded([sentence(8), sentence(5)])
    globenc = GlobEnc(model)
    rollout = globenc.decompose(ids, (mask,)).rollout()

    def scores(index):
        return globenc.attribute(ids, 0, (mask,), token_index=index)

    torch.testing.assert_close(scores(None), rollout[:, 0], **EXACT)
    torch.testing.assert_close(scores(2), rollout[:, 2], **EXACT)
    torch.testing.assert_close(scores(-8), rollout[:, 0], **EXACT)
    each = torch.tensor([6, 1])
    torch.testing.assert_close(scores(each), rollout[[0, 1], each], **EXACT)
    mean = torch.stack([rollout[0].mean(0), rollout[1, :5].sum(0) / 5])
    torch.testing.assert_close(scores("mean"), mean, **EXACT)


def test_a_token_level_target_names_the_token() -> None:
    model = build("bert", head=t.BertForTokenClassification)
    ids, mask = padded([sentence(8), sentence(5)])
    globenc = GlobEnc(model)
    rollout = globenc.decompose(ids, (mask,)).rollout()
    one = globenc.attribute(ids, (3, 1), (mask,))
    torch.testing.assert_close(one, rollout[:, 3], **EXACT)
    each = globenc.attribute(ids, [(5, 0), (2, 2)], (mask,))
    torch.testing.assert_close(each, rollout[[0, 1], [5, 2]], **EXACT)
    explicit = globenc.attribute(ids, (3, 1), (mask,), token_index=1)
    torch.testing.assert_close(explicit, rollout[:, 1], **EXACT)


@pytest.mark.parametrize(
    "head",
    [
        t.BertModel,
        t.BertForMaskedLM,
        t.BertForQuestionAnswering,
        t.BertForNextSentencePrediction,
        t.BertForPreTraining,
        t.BertForTokenClassification,
    ],
)
def test_other_heads(head: type[nn.Module]) -> None:
    model = build("bert", head=head)
    ids, mask = padded([sentence(8), sentence(5)])
    globenc = GlobEnc(model)
    rollout = globenc.decompose(ids, (mask,)).rollout()
    scores = globenc.attribute(ids, additional_forward_args=(mask,))
    torch.testing.assert_close(scores, rollout[:, 0], **EXACT)


def test_a_head_without_mask_argument() -> None:
    model = build("bert")
    ids = torch.stack([sentence(6, seed=s) for s in (1, 2)])
    explicit = attribute(model, ids, torch.ones_like(ids))
    bare = GlobEnc(lambda ids: model(ids).logits).attribute(ids, target=1)
    torch.testing.assert_close(bare, explicit, **EXACT)


@pytest.mark.parametrize("shape", ["(b, 1, 1, T)", "(b, 1, T, T)", "(b, H, T, T)"])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_four_dimensional_masks(shape: str, kind: str) -> None:
    model = build("bert")
    ids, mask = padded([sentence(8), sentence(5)])
    full = mask[:, None, None, :].bool()
    if shape != "(b, 1, 1, T)":
        full = full.expand(2, 4 if "H" in shape else 1, 8, 8)
    if kind == "added":
        full = torch.zeros(full.shape).double().masked_fill(~full, -10000.0)
    scores = attribute(model, ids, full)
    torch.testing.assert_close(scores, attribute(model, ids, mask), **EXACT)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_that_hide_everything_from_padding(kind: str) -> None:
    """The outer product of a mask with itself: padding attends to nothing."""
    model = build("bert")
    ids, mask = padded([sentence(8), sentence(5)])
    outer = (mask[:, None, :, None] & mask[:, None, None, :]).bool()
    if kind == "added":
        outer = torch.zeros(outer.shape).double().masked_fill(~outer, -torch.inf)
    scores = attribute(model, ids, outer)
    torch.testing.assert_close(scores, attribute(model, ids, mask), **EXACT)
    local = GlobEnc(model).decompose(ids, (outer,)).local
    expected = GlobEnc(model).decompose(ids, (mask,)).local
    torch.testing.assert_close(local, expected, **EXACT)


@pytest.mark.parametrize("name", [*METHODS, "W", "N_FIXED_RES"])
@pytest.mark.parametrize("around", ["model", "method"])
def test_autocast(name: str, around: str) -> None:
    """The model may run in bfloat16; its decomposition is computed in float32."""
    model = build("bert", torch.float32)
    ids, mask = padded([sentence(8), sentence(5)])
    make = METHODS.get(name, functools.partial(GlobEnc, local=name))
    exact = make(model, normalize=True).attribute(ids, 1, (mask,))

    def forward(ids, mask):
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "model"):
            return model(ids, mask).logits

    with torch.autocast("cpu", torch.bfloat16, enabled=around == "method"):
        scores = make(forward, normalize=True).attribute(ids, 1, mask)
        assert make(forward).decompose(ids, mask).local.isfinite().all()
    torch.testing.assert_close(scores.float(), exact, rtol=0.1, atol=0.02)


def test_copies_work_alone() -> None:
    model = build("bert")
    ids, mask = padded([sentence(8), sentence(5)])
    globenc = GlobEnc(model)
    expected = globenc.attribute(ids, 1, (mask,))
    for copied in (copy.deepcopy(globenc), pickle.loads(pickle.dumps(globenc))):
        assert copied.forward_func is not model
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight.zero_()
        torch.testing.assert_close(copied.attribute(ids, 1, (mask,)), expected, **EXACT)


@pytest.mark.parametrize("padding", [0, 2])
def test_a_causal_encoder(padding: int) -> None:
    """A token of a decoder takes from no later one; with and without a mask."""
    config = t.BertConfig(**SIZES, is_decoder=True)
    model = randomize(t.BertLMHeadModel(config)).double().eval()
    ids, mask = padded([sentence(8)], extra=padding)
    rollout = GlobEnc(model).decompose(ids, (mask,)).rollout()[0, :8, :8]
    assert not rollout.triu(1).any()
    assert (rollout.tril() + rollout.triu(1) == rollout).all()
    assert (rollout.diagonal() > 0).all()
    scores = GlobEnc(model).attribute(ids, (4, 1), (mask,))
    torch.testing.assert_close(scores[0, :8], rollout[4], **EXACT)


def test_normalize() -> None:
    model = build("bert")
    ids, mask = padded([sentence(8), sentence(5)])
    plain = attribute(model, ids, mask)
    shares = attribute(model, ids, mask, normalize=True)
    expected = plain / plain.sum(-1, keepdim=True)
    torch.testing.assert_close(shares, expected, **EXACT)


def test_deep_stacks_keep_their_ratios() -> None:
    """300 layers that each multiply by about 10 leave float32 and even float64."""
    from captum_globenc.contributions.rollout import Decomposition

    local = torch.rand(2, 400, 5, 5, dtype=torch.float64)
    local[0] *= 10
    local[1] *= 0.01
    attended = torch.ones(2, 5, dtype=torch.bool)
    exact = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    for layer in range(400):
        exact = local[:, layer] @ exact
        exact = exact / exact.amax((1, 2), keepdim=True)
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        got = Decomposition(local.to(dtype), attended, "N").rollout()
        assert got.isfinite().all()
        got = got.double() / got.double().amax((1, 2), keepdim=True)
        torch.testing.assert_close(got, exact, rtol=limit, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = build(family, torch.float32)
    ids, mask = padded([sentence(8), sentence(5)])
    exact = attribute(model, ids, mask, normalize=True)
    scores = attribute(model.to(dtype), ids, mask, normalize=True)
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.float(), exact, rtol=0.1, atol=0.01)
    raw = attribute(model, ids, mask)
    assert raw.dtype == dtype
    assert raw.isfinite().all()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_methods_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = build("bert", torch.float32)
    ids, mask = padded([sentence(8), sentence(5)])
    exact = METHODS[name](model, normalize=True).attribute(ids, 1, (mask,))
    method = METHODS[name](model.to(dtype), normalize=True)
    scores = method.attribute(ids, 1, (mask,))
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.float(), exact, rtol=0.1, atol=0.02)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.seen.append(tuple(value.shape))
        return result


@pytest.mark.parametrize("name", ["W", "W_RES", "N", "N_ENC"])
def test_nothing_quadratic_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No (receivers, sources, hidden), and no attention matrix of all receivers."""
    from captum_globenc.contributions import rollout
    from captum_globenc.recording import grouping

    monkeypatch.setattr(rollout, "_HELD", 4 * 40 * 8)
    monkeypatch.setattr(grouping, "_HELD", 40 * 24)
    model = build("bert")
    ids = torch.stack([sentence(40, seed=s) for s in (1, 2)])
    globenc = GlobEnc(model, local=name)
    expected = globenc.decompose(ids).rollout()[:, 0]
    with Shapes() as shapes:
        scores = globenc.attribute(ids, target=0)
    torch.testing.assert_close(scores, expected, **EXACT)
    pairs = [shape for shape in shapes.seen if shape.count(40) > 1]
    assert not pairs
    # The largest tensor is a feed-forward activation or a block, not tokens² × hidden.
    assert max(torch.Size(shape).numel() for shape in shapes.seen) < 40 * 40 * 24


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_changed_weights_are_seen(dtype: torch.dtype) -> None:
    """Folded weights are dropped after any edit, also one that torch does not count."""
    model = build("bert", dtype)
    ids, mask = padded([sentence(8), sentence(5)])
    globenc = GlobEnc(model)

    def fresh_and_kept() -> None:
        kept = globenc.attribute(ids, 0, (mask,))
        torch.testing.assert_close(kept, attribute(model, ids, mask), **EXACT)

    fresh_and_kept()
    part = model.bert.encoder.layer[1].attention.output
    with torch.no_grad():
        part.dense.weight.mul_(1.5)
    fresh_and_kept()
    part.dense.weight.data += 0.1
    fresh_and_kept()
    part.LayerNorm.weight.data *= 1.01
    fresh_and_kept()
    model.bert.encoder.layer[2].output.LayerNorm.weight = nn.Parameter(
        torch.rand(24, dtype=dtype)
    )
    fresh_and_kept()
    model.float()
    fresh_and_kept()


def test_position_and_vocabulary_limits_are_the_models(family: str) -> None:
    model = build(family)
    longest = 38 if numbers_positions_from_padding(family) else 40
    fits = sentence(longest)[None]
    assert GlobEnc(model).attribute(fits, target=0).shape == fits.shape
    longer = sentence(longest + 1)[None]
    if position_table(family) is None:
        # Rotations and relative biases have no end.
        assert GlobEnc(model).attribute(longer, target=0).shape == longer.shape
    else:
        with pytest.raises(InputError, match=f"{longest + 1} tokens.*{longest}"):
            GlobEnc(model).attribute(longer, target=0)
    for wrong in (97, -1):
        ids = sentence(5)[None].clone()
        ids[0, 2] = wrong
        with pytest.raises(InputError, match=f"input id {wrong} .* vocabulary of 97"):
            GlobEnc(model).attribute(ids, target=0)
    assert not left_behind(model)


def test_rotary_positions() -> None:
    """ESM as its checkpoints are: no table of positions, keys and queries rotated."""
    config = FAMILIES["esm"].config()
    config.position_embedding_type = "rotary"
    model = randomize(FAMILIES["esm"].head(config)).double().eval()
    ids, mask = padded([sentence(8), sentence(5)])
    together = attribute(model, ids, mask)
    alone = attribute(model, ids[1:, :5], mask[1:, :5])
    torch.testing.assert_close(together[1, :5], alone[0], **EXACT)
    # Another order of the same tokens: positions matter.
    turned = ids[:1].flip(1)
    assert not torch.allclose(attribute(model, turned, mask[:1]).flip(1), together[:1])
    model.config._attn_implementation = "eager"
    torch.testing.assert_close(attribute(model, ids, mask), together, **EXACT)


def test_layoutlm() -> None:
    """Boxes beside the ids; without them all are zero."""
    config = t.LayoutLMConfig(**SIZES)
    model = randomize(t.LayoutLMForSequenceClassification(config)).double().eval()
    ids, mask = padded([sentence(8), sentence(5)])
    boxes = torch.zeros(2, 8, 4, dtype=torch.long)
    together = GlobEnc(model).attribute(ids, 1, (boxes, mask))
    alone = GlobEnc(model).attribute(ids[1:, :5], 1, (boxes[1:, :5], mask[1:, :5]))
    torch.testing.assert_close(together[1, :5], alone[0], **within(model, EXACT))
    without = GlobEnc(lambda ids: model(ids).logits).attribute(ids[1:, :5], 1)
    torch.testing.assert_close(alone, without, **EXACT)
