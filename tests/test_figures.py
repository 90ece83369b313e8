"""Figures, compared by what they contain."""

from __future__ import annotations

import io
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from captum_globenc import InputError
from captum_globenc.visualization import (
    evidence_flow,
    fonts,
    layer_map,
    method_comparison,
    rollout_flow,
    source_matrix,
    token_strip,
)
from captum_globenc.visualization.colours import SEQUENTIAL, SIGNED, letters_on
from captum_globenc.visualization.fonts import drawable

TOKENS = {
    "one": ["film"],
    "five": ["[CLS]", "lovely", "film", ".", "[SEP]"],
    "many": ["[CLS]", *("film", "unbelievably", "a") * 39, ".", "[SEP]"],
    "hebrew": ["[CLS]", "סרט", "נפלא", "[SEP]"],
    "arabic": ["<s>", "فيلم", "جميل", "</s>"],
    "japanese": ["[CLS]", "こんにちは", "世界", "[SEP]"],
    "chinese": ["[CLS]", *"这部电影很好看", "[SEP]"],
    "emoji": ["😀", "👍🏽", "👨\u200d👩\u200d👧", "🧿"],
    "long": ["a" * 80, "世" * 80, "b"],
    "formulas": ["$", "$x_1^2$", "\\frac{1}", "a_b", "^", "%", "{", "#&~"],
    "control": [
        "\x1b[0m",
        "a\nb",
        "\r",
        "\u2028",
        "\ud800",
        "\ufffe",
        "",
        " ",
        "\u200b",
    ],
}
LAYERS = 3
DRAWN = {
    "token_strip": lambda tokens, **more: token_strip(
        tokens, torch.linspace(-2, 1, len(tokens)), **more
    ),
    "layer_map": lambda tokens, **more: layer_map(
        tokens, torch.rand(LAYERS, len(tokens)), **more
    ),
    "source_matrix": lambda tokens, **more: source_matrix(
        tokens, torch.rand(len(tokens), len(tokens)), **more
    ),
    "rollout_flow": lambda tokens, **more: rollout_flow(
        tokens, torch.rand(LAYERS, len(tokens), len(tokens)), **more
    ),
    "method_comparison": lambda tokens, **more: method_comparison(
        tokens, {"$a_1$": torch.rand(len(tokens)), "b": torch.ones(len(tokens))}, **more
    ),
}


@pytest.fixture(autouse=True)
def _pyplot(monkeypatch) -> Iterator[None]:
    """Figures are pyplot's, and show nothing by themselves."""
    monkeypatch.setattr(pyplot, "show", lambda *args, **options: pytest.fail("shown"))
    yield
    pyplot.close("all")


def rendered(axes):
    """Drawn as PNG, which warns of missing glyphs, and warnings are errors."""
    file = io.BytesIO()
    axes.figure.savefig(file, dpi=50)
    return file.getvalue()


def names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("figure", DRAWN)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_any_text_is_drawn(figure, tokens) -> None:
    axes = DRAWN[figure](tokens)
    assert len(rendered(axes)) > 500
    assert axes.figure in map(pyplot.figure, pyplot.get_fignums())
    expected, _ = drawable(tokens)
    if figure == "token_strip":
        assert [text.get_text() for text in axes.texts[: len(tokens)]] == expected
        return
    across = figure in ("layer_map", "source_matrix")
    shown, _ = drawable(tokens, 16)
    assert names(axes.xaxis if across else axes.yaxis) == shown


@pytest.mark.parametrize("figure", DRAWN)
def test_axes_of_the_user(figure) -> None:
    given = Figure(figsize=(3, 2))
    axes = given.subplots()
    assert DRAWN[figure](TOKENS["many"], ax=axes) is axes
    assert axes.figure is given
    rendered(axes)
    if figure != "token_strip":
        axis = axes.xaxis if figure in ("layer_map", "source_matrix") else axes.yaxis
        # Every n-th, where all would not fit.
        assert 5 < len(names(axis)) < 60
        assert names(axis)[0] == "[CLS]"


@pytest.mark.parametrize("figure", DRAWN)
def test_settings_of_the_user_do_not_break_names(figure) -> None:
    with mpl.rc_context({"font.family": ["monospace", "serif"], "axes.grid": True}):
        rendered(DRAWN[figure](TOKENS["formulas"]))


# Strips


def test_strip_has_the_colour_and_the_number_of_each_score() -> None:
    scores = [4.0, -2.0, 1.0, 0.0, 0.1]
    axes = token_strip(TOKENS["five"], torch.tensor(scores))
    assert len(axes.patches) == 5
    for patch, score in zip(axes.patches, scores):
        assert patch.get_facecolor() == SIGNED(0.5 + score / 8)
    texts = [text.get_text() for text in axes.texts]
    assert texts[5:10] == ["100", "-50", "25", "", ""]
    assert "orange: negative" in texts[10]
    for word, patch in zip(axes.texts, axes.patches):
        x, y = word.get_position()
        assert patch.get_x() < x < patch.get_x() + patch.get_width()
        assert patch.get_y() < y < patch.get_y() + patch.get_height()
        assert word.get_color() == letters_on(patch.get_facecolor())


def test_scores_without_a_sign_have_one_hue() -> None:
    axes = token_strip(["a", "b"], [0.0, 3.0])
    assert axes.patches[0].get_facecolor() == SEQUENTIAL(0.0)
    assert axes.patches[1].get_facecolor() == SEQUENTIAL(1.0)
    assert "orange" not in axes.texts[-1].get_text()


def test_scores_that_are_all_zero() -> None:
    axes = token_strip(["a", "b"], [0, 0])
    assert {patch.get_facecolor() for patch in axes.patches} == {SEQUENTIAL(0.0)}


def test_strip_wraps_and_nothing_overlaps() -> None:
    axes = token_strip(TOKENS["many"], torch.rand(120))
    rows = {}
    for patch in axes.patches:
        rows.setdefault(patch.get_y(), []).append(patch)
    assert 5 < len(rows) < 25
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    for top, row in rows.items():
        assert top + 2 < bottom
        ends = [patch.get_x() + patch.get_width() for patch in row]
        assert ends[-1] <= right
        assert all(end < after.get_x() for end, after in zip(ends, row[1:]))
    box = axes.get_window_extent()
    for text in axes.texts:
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0
        assert extent.x1 <= box.x1
        assert extent.y1 <= box.y1 + 1


@pytest.mark.parametrize(
    ("name", "from_right"), [("hebrew", True), ("arabic", True), ("five", False)]
)
def test_direction(name, from_right) -> None:
    tokens = TOKENS[name]
    assert token_strip(tokens, [1.0] * len(tokens)).xaxis_inverted() == from_right
    scores = torch.rand(2, len(tokens))
    assert layer_map(tokens, scores).xaxis_inverted() == from_right


# Maps


@pytest.mark.parametrize("count", [1, 5, 120])
def test_maps_hold_the_scores(count) -> None:
    tokens = ["film"] * count
    local = torch.rand(count, count)
    (image,) = source_matrix(tokens, local).images
    np.testing.assert_allclose(image.get_array(), local)
    assert image.get_clim() == (0, pytest.approx(float(local.max())))
    signed = torch.randn(12, count)
    axes = layer_map(tokens, signed)
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), signed)
    most = float(signed.abs().max())
    assert image.get_clim() == (pytest.approx(-most), pytest.approx(most))
    assert image.get_cmap() == SIGNED
    # The first layer at the bottom.
    assert names(axes.yaxis) == [str(layer) for layer in range(1, 13)]
    assert not axes.yaxis_inverted()


def test_names_stand_upright_where_there_is_no_room() -> None:
    few = layer_map(TOKENS["five"], torch.rand(2, 5))
    many = layer_map(TOKENS["many"], torch.rand(2, 120))
    assert few.xaxis.get_ticklabels()[0].get_rotation() == 0
    assert many.xaxis.get_ticklabels()[0].get_rotation() == 90
    assert len(names(many.xaxis)) == 120
    assert min(label.get_size() for label in many.xaxis.get_ticklabels()) >= 6


# Flow


def flow_by_loops(local, token_index):
    """The evidence of each edge, from the products along all ways, in float64."""
    layers, count, _ = local.shape
    reached = [float(index == token_index) for index in range(count)]
    edges = np.zeros(local.shape)
    for layer in reversed(range(layers)):
        below = [0.0] * count
        for i in range(count):
            for j in range(count):
                edges[layer, i, j] = reached[i] * float(local[layer, i, j])
                below[j] += edges[layer, i, j]
        reached = below
        edges[layer] /= sum(below)
    return edges


@pytest.mark.parametrize("token_index", [0, 2, -1])
def test_flow_carries_the_evidence_of_the_explained_token(token_index) -> None:
    local = torch.rand(4, 5, 5, dtype=torch.float64)
    expected = flow_by_loops(local, token_index % 5)
    np.testing.assert_allclose(evidence_flow(local, token_index), expected)
    axes = rollout_flow(TOKENS["five"], local, token_index, lines_per_token=5)
    collections = [c for c in axes.collections if isinstance(c, LineCollection)]
    for layer, collection in enumerate(collections):
        drawn = {}
        for segment, width in zip(
            collection.get_segments(), collection.get_linewidths()
        ):
            (start, source), (end, receiver) = segment
            assert (start, end) == (layer, layer + 1)
            drawn[int(receiver), int(source)] = width
        strongest = expected[layer].max()
        kept = {
            (i, j): 4 * expected[layer, i, j] / strongest
            for i in range(5)
            for j in range(5)
            if expected[layer, i, j] >= strongest / 50
        }
        assert drawn == pytest.approx(kept)
    assert axes.texts[0].get_text() == TOKENS["five"][token_index]


def test_flow_drops_thin_lines() -> None:
    local = torch.rand(12, 120, 120)
    axes = rollout_flow(TOKENS["many"], local)
    counts = [len(lines.get_segments()) for lines in axes.collections[:12]]
    assert max(counts) == 240
    assert counts[-1] <= 120
    edges = torch.from_numpy(flow_by_loops(local[-2:], 0))
    carried = [float(layer.flatten().topk(240).values.sum()) for layer in edges]
    assert f"to {max(carried):.0%}" in axes.get_xlabel() or "to 9" in axes.get_xlabel()


def test_flow_of_numbers_that_products_cannot_hold() -> None:
    local = torch.eye(3).expand(40, 3, 3) * 1e30
    assert evidence_flow(local)[0, 0, 0] == 1
    assert rollout_flow(["a", "b", "c"], local).get_xlabel().count("100%") == 1


def test_flow_of_nothing() -> None:
    axes = rollout_flow(["a", "b"], torch.zeros(2, 2, 2))
    rendered(axes)
    assert [len(lines.get_segments()) for lines in axes.collections[:2]] == [0, 0]


# Comparison


def test_comparison_is_relative_to_each_methods_strongest() -> None:
    scores = {"globenc": [1.0, 4.0, 0.2], "ig": torch.tensor([-10.0, 5.0, 0.0])}
    axes = method_comparison(["a", "b", "c"], scores)
    expected = [[0.25, -1.0], [1.0, 0.5], [0.05, 0.0]]
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert axes.images[0].get_clim() == (-1, 1)
    assert names(axes.xaxis) == ["globenc", "ig"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert [cells[0, row] for row in range(3)] == ["25", "100", ""]
    assert [cells[1, row] for row in range(3)] == ["-100", "50", ""]


# Colours and letters


def luminance(colour):
    return np.dot([0.2126, 0.7152, 0.0722], np.square(to_rgb(colour)))


def test_colours_darken_with_strength_and_letters_stand_out() -> None:
    shades = np.linspace(0, 1, 21)
    sides = [
        (SEQUENTIAL, shades),
        (SIGNED, 0.5 + shades / 2),
        (SIGNED, 0.5 - shades / 2),
    ]
    for cmap, side in sides:
        light = [luminance(cmap(shade)[:3]) for shade in side]
        assert light == sorted(light, reverse=True)
    assert letters_on(SIGNED(0.5)) == "black"
    assert letters_on(SIGNED(1.0)) == letters_on(SIGNED(0.0)) == "white"


def test_characters_that_no_font_has_are_spelled(monkeypatch) -> None:
    monkeypatch.setattr(fonts, "_installed", lambda characters: {})
    fonts._fonts.cache_clear()
    shown, properties = drawable(["世", "a\u4e16b", "👍🏽", "e\u0301", "\u200d"])
    fonts._fonts.cache_clear()
    assert shown[:3] == ["U+4E16", "aU+4E16b", ":thumbs up sign:"]
    assert shown[4] == "\N{OPEN BOX}"
    assert not properties["parse_math"]
    assert not properties["usetex"]


def test_what_cannot_be_seen_is_shown() -> None:
    shown, _ = drawable(["\x1b", "", "  ", "a\nb", "x" * 80, "\u200b"])
    assert shown == ["�", "␣", "␣", "a�b", "x" * 23 + "…", "␣"]


def test_fonts_are_found_for_what_the_usual_ones_lack(monkeypatch) -> None:
    having = {"One Sans": "世", "Two Sans": "世界", "Three Sans": "😀"}
    monkeypatch.setattr(fonts, "_installed", lambda characters: {f: f for f in having})
    monkeypatch.setattr(
        fonts,
        "_having",
        lambda path, characters: frozenset(having.get(str(path), "abc")) & characters,
    )
    fonts._fonts.cache_clear()
    _, properties = drawable(["世界", "a", "😀"])
    fonts._fonts.cache_clear()
    usual = mpl.rcParams["font.family"]
    assert properties["fontfamily"] == [*usual, "Two Sans", "Three Sans"]


def test_a_strip_has_room_for_a_title() -> None:
    axes = token_strip(TOKENS["five"], [0.1, 1.0, 0.5, 0.0, 0.2])
    title = axes.set_title("GlobEnc")
    axes.figure.canvas.draw()
    box = title.get_window_extent()
    assert box.y0 >= axes.get_window_extent().y1
    assert box.y1 <= axes.figure.bbox.y1


def test_a_strip_of_zeros_says_so() -> None:
    axes = token_strip(["a", "b"], [0.0, 0.0])
    assert axes.texts[-1].get_text() == "All scores are 0."


def test_many_tokens_in_little_room_take_less_ink() -> None:
    def widest(size) -> float:
        axes = Figure(figsize=size).subplots()
        rollout_flow(["a"] * 60, torch.rand(2, 60, 60), ax=axes)
        return max(axes.collections[0].get_linewidths())

    assert widest((6, 3)) < widest((6, 12)) / 2


# Errors


SQUARE = torch.ones(2, 1, 1)
WRONG = [
    (
        token_strip,
        (["a", "b"], [1.0]),
        r"must be \(tokens\) for 2 tokens, got shape \(1,",
    ),
    (
        token_strip,
        (["a"], torch.ones(1, 1)),
        r"a batch, draw one by one, as scores\[0\]",
    ),
    (token_strip, (["a"], [float("nan")]), "scores must be finite"),
    (token_strip, (["a"], ["x"]), "scores must be numbers"),
    (token_strip, ([], []), "no token to draw"),
    (token_strip, ("film", [1.0] * 4), "sequence of str, got 'film'"),
    (token_strip, ([1], [1.0]), "see tokenizer.convert_ids_to_tokens"),
    (layer_map, (["a"], [1.0]), r"\(layers, tokens\) for 1 tokens"),
    (layer_map, (["a"], torch.ones(0, 1)), r"got shape \(0, 1\)"),
    (source_matrix, (["a"], [[-1.0]]), "local must be at least 0, got -1"),
    (source_matrix, (["a", "b"], torch.ones(2, 3)), r"\(receivers, sources\)"),
    (rollout_flow, (["a"], SQUARE[0]), r"\(layers, receivers, sources\)"),
    (rollout_flow, (["a"], SQUARE, 1), "one of the 1 tokens, got 1"),
    (method_comparison, (["a"], {}), "no method to compare"),
    (method_comparison, (["a"], {"ig": [1, 2]}), r"scores\['ig'\] must be"),
]


@pytest.mark.parametrize(("draw", "given", "message"), WRONG)
def test_what_cannot_be_drawn(draw, given, message) -> None:
    with pytest.raises(InputError, match=message):
        draw(*given)


def test_no_lines() -> None:
    with pytest.raises(InputError, match="lines_per_token must be at least 1, got 0"):
        rollout_flow(["a"], SQUARE, lines_per_token=0)
