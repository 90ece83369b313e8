"""LayerGlobEnc: the rollout from the top down to a layer, as Captum's layer methods."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import transformers as t
from captum.attr import (
    IntegratedGradients,
    LayerAttribution,
    LayerConductance,
    LayerIntegratedGradients,
    configure_interpretable_embedding_layer,
    remove_interpretable_embedding_layer,
)
from torch import nn

from captum_globenc import (
    GlobEnc,
    InputError,
    LayerGlobEnc,
)
from captum_globenc.encoders.discovery import find_encoder
from tests.conftest import left_behind
from tests.models import FAMILIES, build, encoder_of, padded, sentence

EXACT = {"rtol": 1e-12, "atol": 0}
IDS, MASK = padded([sentence(8), sentence(5)])


def above(local: torch.Tensor, layer: int) -> torch.Tensor:
    """n^L … n^{layer+1} of (batch, layers, receivers, sources), as plain products."""
    batch, layers, tokens, _ = local.shape
    product = torch.eye(tokens).to(local).expand(batch, -1, -1)
    for index in reversed(range(layer, layers)):
        product = product @ local[:, index]
    return product


def read(family: str, rows: torch.Tensor) -> torch.Tensor:
    """What the head takes of (batch, receivers, sources) of the two sentences."""
    lengths = MASK.sum(-1).tolist()
    return torch.stack(
        [
            FAMILIES[family].reads(ids[:n]) @ row[:n]
            for ids, row, n in zip(IDS, rows, lengths)
        ]
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "albert"])
@pytest.mark.parametrize("name", ["N_ENC", "W_RES"])
def test_layers(family: str, name: str) -> None:
    model = build(family)
    encoder = encoder_of(family, model)
    layers = list(encoder.get_submodule(FAMILIES[family].recipe.layers))
    local = GlobEnc(model, local=name).decompose(IDS, (MASK,)).local
    method = LayerGlobEnc(model, layers, local=name)
    assert isinstance(method, LayerAttribution)
    for inputs in (False, True):
        found = method.attribute(IDS, 1, (MASK,), attribute_to_layer_input=inputs)
        assert len(found) == len(layers) == 3
        for index, attributions in enumerate(found):
            expected = read(family, above(local, index + (not inputs)))
            assert attributions.shape == (2, 8, 24)
            assert attributions.dtype == torch.float64
            torch.testing.assert_close(attributions.sum(-1), expected, **EXACT)
            alone = LayerGlobEnc(model, layers[index], local=name).attribute(
                IDS, 1, (MASK,), inputs
            )
            torch.testing.assert_close(alone, attributions, **EXACT)
    assert not left_behind(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_give_the_global_scores(family: str) -> None:
    model = build(family)
    encoder = find_encoder(model)
    assert encoder is not None
    expected = GlobEnc(model).attribute(IDS, 1, (MASK,))
    table = encoder.token_table
    parts = [encoder.embeddings, table]
    positions = encoder.positions
    if positions is not None and positions in list(encoder.embeddings.modules()):
        parts.append(positions)
    for part, found in zip(
        parts, LayerGlobEnc(model, parts).attribute(IDS, 1, (MASK,))
    ):
        hidden = part.embedding_dim if isinstance(part, nn.Embedding) else None
        rows = 1 if part is positions and found.shape[0] == 1 else 2
        assert found.shape == (rows, 8, hidden or table.embedding_dim)
        torch.testing.assert_close(found.sum(-1), expected[:rows], **EXACT)
    ids = LayerGlobEnc(model, table).attribute(
        IDS, 1, (MASK,), attribute_to_layer_input=True
    )
    torch.testing.assert_close(ids, expected, **EXACT)


def test_a_shared_layer_is_no_single_place() -> None:
    model = build("albert")
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    with pytest.raises(InputError, match=r"albert_layers.0' runs 3 times.*decompose"):
        LayerGlobEnc(model, layer).attribute(IDS, 1, (MASK,))
    assert not left_behind(model)


def test_token_index_target_and_normalize() -> None:
    model = build("bert", head=t.BertForTokenClassification)
    layer = model.bert.encoder.layer[0]
    local = GlobEnc(model).decompose(IDS, (MASK,)).local
    rows = above(local, 1)
    by_target = LayerGlobEnc(model, layer).attribute(IDS, (3, 1), (MASK,))
    torch.testing.assert_close(by_target.sum(-1), rows[:, 3], **EXACT)
    mean = LayerGlobEnc(model, layer).attribute(IDS, None, (MASK,), token_index="mean")
    expected = torch.stack([rows[0].mean(0), rows[1, :5].mean(0)])
    torch.testing.assert_close(mean.sum(-1), expected, **EXACT)
    shares = LayerGlobEnc(model, layer, normalize=True).attribute(IDS, (3, 1), (MASK,))
    torch.testing.assert_close(
        shares.sum((1, 2)), torch.ones(2, dtype=torch.float64), **EXACT
    )


def test_the_output_of_the_last_layer_is_the_token_itself() -> None:
    model = build("bert")
    found = LayerGlobEnc(model, model.bert.encoder.layer[2]).attribute(IDS, 1, (MASK,))
    assert found.sum(-1)[:, 0].tolist() == pytest.approx([1, 1])
    assert not found[:, 1:].any()


def test_captums_question_answering_tutorial() -> None:
    """The tutorial's functions, with the method's name swapped."""
    model = build("bert", head=t.BertForQuestionAnswering)
    embeddings = model.bert.embeddings
    types = torch.zeros_like(IDS)
    positions = torch.arange(8).expand(2, -1)

    def predict(inputs, token_type_ids=None, position_ids=None, attention_mask=None):
        output = model(
            inputs,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
        )
        return output.start_logits, output.end_logits

    def squad_pos_forward_func(
        inputs,
        token_type_ids=None,
        position_ids=None,
        attention_mask=None,
        position=0,
    ):
        pred = predict(inputs, token_type_ids, position_ids, attention_mask)[position]
        return pred.max(1).values

    ids, mask = torch.stack([sentence(8), sentence(8, seed=1)]), torch.ones_like(IDS)
    rollout = GlobEnc(model).decompose(ids).rollout()
    with torch.no_grad():
        answer = [logits.argmax(-1) for logits in predict(ids)]
    for position in (0, 1):
        # Each gives the largest logit: its token is explained.
        expected = rollout[[0, 1], answer[position]]
        one = LayerGlobEnc(squad_pos_forward_func, embeddings).attribute(
            inputs=ids, additional_forward_args=(types, positions, mask, position)
        )
        torch.testing.assert_close(one.sum(-1), expected, **EXACT)
    several = LayerGlobEnc(
        squad_pos_forward_func,
        [
            embeddings.word_embeddings,
            embeddings.token_type_embeddings,
            embeddings.position_embeddings,
        ],
    )
    given = {
        "inputs": (ids, types, positions),
        "additional_forward_args": (mask, 1),
        "token_index": 2,
    }
    for attributions in several.attribute(**given):
        torch.testing.assert_close(attributions.sum(-1), rollout[:, 2], **EXACT)
    inputs = several.attribute(**given, attribute_to_layer_input=True)
    assert len(inputs) == 3
    for attributions in inputs:
        torch.testing.assert_close(attributions, rollout[:, 2], **EXACT)
    with pytest.raises(
        InputError, match=r"reads token \d of example 1, which is padding"
    ):
        LayerGlobEnc(squad_pos_forward_func, embeddings).attribute(
            IDS, additional_forward_args=(types, positions, MASK, 1)
        )
    assert not left_behind(model)


def test_inputs_of_the_embeddings_by_keyword() -> None:
    model = build("bert")
    embedded = model.get_input_embeddings()(IDS).detach()

    def forward(embeddings, types, mask):
        return model(
            inputs_embeds=embeddings, token_type_ids=types, attention_mask=mask
        ).logits

    expected = GlobEnc(model).attribute(IDS, 1, (MASK,))
    found = LayerGlobEnc(forward, model.bert.embeddings).attribute(
        embedded, 1, (torch.zeros_like(IDS), MASK), attribute_to_layer_input=True
    )
    torch.testing.assert_close(found.sum(-1), expected, **EXACT)
    # Positions are one row for all examples.
    rows = LayerGlobEnc(model, model.bert.embeddings.position_embeddings).attribute(
        IDS, 1, (MASK,), attribute_to_layer_input=True
    )
    torch.testing.assert_close(rows, expected, **EXACT)


def test_captums_second_tutorial() -> None:
    """Layer by layer on embeddings, as Captum's part 2 does with LayerConductance."""
    model = build("bert", head=t.BertForQuestionAnswering)
    ids, MASK = torch.stack([sentence(8), sentence(8, seed=1)]), torch.ones_like(IDS)
    embeddings = model.bert.embeddings(input_ids=ids).detach()
    reference = model.bert.embeddings(input_ids=torch.ones_like(IDS)).detach()

    def squad_pos_forward_func2(input_emb, attention_mask=None, position=0):
        pred = model(inputs_embeds=input_emb, attention_mask=attention_mask)
        pred = (pred.start_logits, pred.end_logits)[position]
        return pred.max(1).values

    for index, layer in enumerate(model.bert.encoder.layer):
        for position in (0, 1):
            found = LayerGlobEnc(squad_pos_forward_func2, layer).attribute(
                inputs=embeddings, additional_forward_args=(MASK, position)
            )
            local = GlobEnc(squad_pos_forward_func2).decompose(embeddings, (MASK,))
            with torch.no_grad():
                output = model(inputs_embeds=embeddings, attention_mask=MASK)
            answer = (output.start_logits, output.end_logits)[position].argmax(-1)
            expected = above(local.local, index + 1)[[0, 1], answer]
            torch.testing.assert_close(found.sum(-1), expected, **EXACT)
        captums = LayerConductance(squad_pos_forward_func2, layer).attribute(
            embeddings,
            baselines=reference,
            additional_forward_args=(MASK, 0),
            n_steps=2,
        )
        assert captums.shape == found.shape
    assert not left_behind(model)


def test_layer_inputs_where_captum_breaks() -> None:
    """Embeddings are called with keywords, which Captum's layer methods do not see."""
    model = build("bert", head=t.BertForQuestionAnswering)

    def forward(ids, mask):
        return model(ids, attention_mask=mask).start_logits[:, 0]

    embeddings = model.bert.embeddings
    with pytest.raises(IndexError):
        LayerIntegratedGradients(forward, embeddings).attribute(
            IDS,
            additional_forward_args=(MASK,),
            attribute_to_layer_input=True,
            n_steps=2,
        )
    expected = GlobEnc(forward).attribute(IDS, None, (MASK,))
    found = LayerGlobEnc(forward, embeddings).attribute(
        IDS, None, (MASK,), attribute_to_layer_input=True
    )
    torch.testing.assert_close(found, expected, **EXACT)
    hidden = LayerGlobEnc(forward, model.bert.encoder.layer[0]).attribute(
        IDS, None, (MASK,), attribute_to_layer_input=True
    )
    torch.testing.assert_close(hidden.sum(-1), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:In order to make embedding layers")
@pytest.mark.parametrize("path", ["bert.embeddings", "bert.embeddings.word_embeddings"])
def test_captums_interpretable_embeddings(path: str) -> None:
    model = build("bert")
    expected = GlobEnc(model).attribute(IDS, 1, (MASK,))
    layer = configure_interpretable_embedding_layer(model, path)
    embedded = layer.indices_to_embeddings(IDS).detach()

    def forward(embeddings, mask):
        if path.endswith("word_embeddings"):
            return model(inputs_embeds=embeddings, attention_mask=mask).logits
        return model(embeddings, attention_mask=mask).logits

    found = GlobEnc(forward).attribute(embedded, 1, (MASK,))
    assert (
        IntegratedGradients(forward)
        .attribute(embedded, target=1, additional_forward_args=(MASK,), n_steps=2)
        .shape
        == found.shape
        == embedded.shape
    )
    torch.testing.assert_close(found.sum(-1), expected, **EXACT)
    remove_interpretable_embedding_layer(model, layer)
    torch.testing.assert_close(
        GlobEnc(model).attribute(IDS, 1, (MASK,)), expected, **EXACT
    )


def test_question_answering_explains_the_token_of_the_target() -> None:
    model = build("bert", head=t.BertForQuestionAnswering)
    rollout = GlobEnc(model).decompose(IDS, (MASK,)).rollout()
    one = GlobEnc(model).attribute(IDS, 4, (MASK,))
    torch.testing.assert_close(one, rollout[:, 4], **EXACT)
    each = GlobEnc(model).attribute(IDS, torch.tensor([6, 2]), (MASK,))
    torch.testing.assert_close(each, rollout[[0, 1], [6, 2]], **EXACT)

    def start(ids, mask):
        return model(ids, attention_mask=mask).start_logits

    def by_hand(ids, mask):
        return model.qa_outputs(model.bert(ids, mask)[0])[..., 0]

    def probabilities(ids, mask):
        return start(ids, mask).masked_fill(mask == 0, -torch.inf).softmax(-1)

    for method in (
        GlobEnc(start),
        GlobEnc(start, encoder=model.bert),
        GlobEnc(model.forward),
        GlobEnc(by_hand),
    ):
        torch.testing.assert_close(method.attribute(IDS, 4, (MASK,)), one, **EXACT)
    # A probability depends on the logits of all tokens.
    found = GlobEnc(probabilities).attribute(IDS, 4, (MASK,))
    states = model.bert(IDS, MASK)[0].detach().requires_grad_()
    chosen = model.qa_outputs(states)[..., 0].masked_fill(MASK == 0, -torch.inf)
    (gradient,) = torch.autograd.grad(chosen.softmax(-1)[:, 4].sum(), states)
    weights = gradient.norm(dim=-1) / gradient.norm(dim=-1).sum(1, keepdim=True)
    expected = (weights[:, None] @ rollout)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    told = GlobEnc(start).attribute(IDS, 1, (MASK,), token_index=4)
    torch.testing.assert_close(told, one, **EXACT)


def test_attention_pooling_with_as_many_classes_as_tokens_is_a_classifier() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build("bert", head=t.BertModel)
            self.weight = nn.Linear(24, 1).double()
            self.head = nn.Linear(24, 8).double()

        def forward(self, ids, mask):
            states = self.encoder(ids, mask).last_hidden_state
            return self.head((self.weight(states).softmax(1) * states).sum(1))

    model = Pooled()
    rollout = GlobEnc(model).decompose(IDS, (MASK,)).rollout()
    # It reads all tokens, padding, too.
    with pytest.raises(InputError, match="which is padding"):
        GlobEnc(model).attribute(IDS, 4, (MASK,))
    ids, mask = IDS[:1], MASK[:1]
    states = model.encoder(ids, mask).last_hidden_state.detach().requires_grad_()
    pooled = (model.weight(states).softmax(1) * states).sum(1)
    (gradient,) = torch.autograd.grad(model.head(pooled)[0, 4], states)
    weights = gradient.norm(dim=-1) / gradient.norm(dim=-1).sum()
    found = GlobEnc(model).attribute(ids, 4, (mask,))
    torch.testing.assert_close(found, weights @ rollout[0], rtol=1e-9, atol=0)
    found = GlobEnc(model).attribute(IDS, 4, (MASK,), token_index=0)
    torch.testing.assert_close(found, rollout[:, 0], **EXACT)


def test_a_discriminator_explains_the_token_of_the_target() -> None:
    model = build("electra", head=t.ElectraForPreTraining)
    rollout = GlobEnc(model).decompose(IDS, (MASK,)).rollout()
    found = GlobEnc(model).attribute(IDS, 3, (MASK,))
    torch.testing.assert_close(found, rollout[:, 3], **EXACT)


def test_a_head_with_as_many_classes_as_tokens() -> None:
    class Homemade(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build("bert", head=t.BertModel)
            self.head = nn.Linear(24, 8).double()

        def forward(self, ids, mask):
            return self.head(self.encoder(ids, mask).last_hidden_state[:, 0])

    model = Homemade()
    rollout = GlobEnc(model).decompose(IDS, (MASK,)).rollout()
    found = GlobEnc(model).attribute(IDS, 4, (MASK,))
    torch.testing.assert_close(found, rollout[:, 0], **EXACT)


def test_as_many_labels_as_tokens_is_still_a_classifier() -> None:
    model = build("bert")  # three labels
    ids = sentence(3)[None]
    rollout = GlobEnc(model).decompose(ids).rollout()
    for forward in (model, lambda ids: model(ids).logits):
        found = GlobEnc(forward).attribute(ids, target=2)
        torch.testing.assert_close(found, rollout[:, 0], **EXACT)


def test_multiple_choice_folds_the_choices_into_the_batch() -> None:
    model = build("bert", head=t.BertForMultipleChoice)
    ids, mask = padded([sentence(n, seed=n) for n in (8, 5, 7, 6, 3, 8)])
    scores = GlobEnc(model).attribute(ids.view(2, 3, 8), 1, (mask.view(2, 3, 8),))
    expected = GlobEnc(model.bert).attribute(ids, None, (mask,))
    torch.testing.assert_close(scores, expected.view(2, 3, 8), **EXACT)

    def on_embeddings(embeddings, mask):
        return model(inputs_embeds=embeddings, attention_mask=mask).logits

    embedded = model.get_input_embeddings()(ids).detach().view(2, 3, 8, 24)
    found = GlobEnc(on_embeddings).attribute(embedded, 1, (mask.view(2, 3, 8),))
    assert found.shape == embedded.shape
    torch.testing.assert_close(found.sum(-1), scores, **EXACT)
    layer = LayerGlobEnc(model, model.bert.embeddings).attribute(
        ids.view(2, 3, 8), 1, (mask.view(2, 3, 8),)
    )
    torch.testing.assert_close(layer.sum(-1), expected, **EXACT)


def test_data_parallel_wrappers() -> None:
    model = build("bert")
    layer = model.bert.encoder.layer[1]
    expected = LayerGlobEnc(model, layer).attribute(IDS, 1, (MASK,))
    wrapped = LayerGlobEnc(nn.DataParallel(model), layer, device_ids=[0])
    torch.testing.assert_close(wrapped.attribute(IDS, 1, (MASK,)), expected, **EXACT)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.filterwarnings("ignore:In order to make embedding layers")
def test_captums_interpretable_parts_of_the_embeddings(family: str) -> None:
    """Each table of embeddings replaced, as older tutorials do."""
    model = build(family)
    expected = GlobEnc(model).attribute(IDS, 1, (MASK,))
    prefix = f"{FAMILIES[family].encoder[0]}.embeddings."
    names = ["word_embeddings", "position_embeddings"]
    if family == "bert":
        names.append("token_type_embeddings")
    tables = [configure_interpretable_embedding_layer(model, prefix + n) for n in names]
    words = tables[0].indices_to_embeddings(IDS).detach()
    places = tables[1].indices_to_embeddings(torch.arange(8))
    places = places.expand(2, -1, -1).detach()

    def forward(words, places, mask):
        if family == "bert":
            types = tables[2].indices_to_embeddings(torch.zeros_like(IDS))
            output = model(
                inputs_embeds=words,
                token_type_ids=types,
                position_ids=places,
                attention_mask=mask,
            )
        else:
            # Ids are looked up by the stand-in, which hands embeddings on.
            model.distilbert.embeddings.position_embeddings.forward = lambda _: places
            output = model(words, attention_mask=mask)
        return output.logits

    found, zeros = GlobEnc(forward).attribute((words, places), 1, (MASK,))
    torch.testing.assert_close(found.sum(-1), expected, **EXACT)
    assert not zeros.any()
    for table in tables:
        remove_interpretable_embedding_layer(model, table)


def test_layers_in_threads() -> None:
    """One model, runs of other shapes beside it: never another run's inputs."""
    model = build("bert")
    few, many = sentence(8).expand(2, -1), sentence(4, seed=1).expand(4, -1)
    method = LayerGlobEnc(model, model.bert.embeddings)
    expected = method.attribute(few, 1, None, True)
    problems: list[str] = []
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            with torch.no_grad():
                model(many)

    def explain(ids: torch.Tensor) -> None:
        for _ in range(20):
            found = method.attribute(ids, 1, None, True)
            if found.shape != ids.shape:
                problems.append(f"{tuple(found.shape)} for {tuple(ids.shape)}")
            elif ids is few and not torch.allclose(found, expected, rtol=1e-10):
                problems.append("scores")

    user = threading.Thread(target=use)
    workers = [threading.Thread(target=explain, args=(ids,)) for ids in (few, many)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in (user, *workers):
            thread.start()
        for worker in workers:
            worker.join()
    finally:
        done.set()
        user.join()
        sys.setswitchinterval(before)
    assert not problems
    assert not left_behind(model)


def test_layers_outside_the_encoder() -> None:
    model = build("bert")
    with pytest.raises(InputError, match=r"BertPooler is not part of the encoder.*3"):
        LayerGlobEnc(model, model.bert.pooler).attribute(IDS, 1, (MASK,))
    other = build("bert")
    with pytest.raises(InputError, match="BertLayer is not part"):
        LayerGlobEnc(model, other.bert.encoder.layer[0]).attribute(IDS, 1, (MASK,))
    embeddings = model.get_input_embeddings()(IDS).detach()

    def forward(embeddings, mask):
        return model(inputs_embeds=embeddings, attention_mask=mask).logits

    with pytest.raises(InputError, match="Embedding did not run"):
        LayerGlobEnc(forward, model.bert.embeddings.word_embeddings).attribute(
            embeddings, 1, (MASK,)
        )
    with pytest.raises(TypeError, match="got str: 'embeddings'"):
        LayerGlobEnc(model, "embeddings")
    with pytest.raises(InputError, match=r"got \[\]"):
        LayerGlobEnc(model, [])
    assert not left_behind(model)


def test_captums_methods_are_not_disturbed() -> None:
    """The same numbers from Captum before and after, on the same model."""
    model = build("bert")

    def forward(ids, mask):
        return model(ids, attention_mask=mask).logits

    integrated = LayerIntegratedGradients(
        forward, model.bert.embeddings.word_embeddings
    )

    def observe() -> torch.Tensor:
        return integrated.attribute(
            IDS, torch.ones_like(IDS), 1, (MASK,), n_steps=5
        ).detach()

    before = observe()
    LayerGlobEnc(forward, model.bert.encoder.layer[1]).attribute(IDS, 1, (MASK,))
    GlobEnc(forward).attribute(IDS, 1, (MASK,))
    assert torch.equal(before, observe())
    with pytest.raises(AssertionError):
        LayerGlobEnc(forward, model.bert.embeddings).attribute(
            IDS, (9999,) * 20, (MASK,)
        )
    assert not left_behind(model)
