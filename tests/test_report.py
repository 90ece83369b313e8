"""The page of an explanation, driven in a browser."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from captum_globenc import demo
from captum_globenc.explanation import explain
from captum_globenc.visualization import report, to_html

TEXT = "Not so funny, but a lovely film."
HOSTILE = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>\u2028&"


@pytest.fixture(scope="module")
def explanation():
    methods = ["saliency", "globenc", "integrated_gradients", "W"]
    return explain(*demo.load_classifier(), TEXT, methods, decompose=True)


@pytest.fixture
def opened(open_html):
    return lambda given, **settings: open_html(to_html(given), **settings)


def tokens(page):
    return page.locator("#tokens button")


def numbers(page):
    return page.locator("#tokens small").all_text_contents()


def told(page):
    text = page.locator("#told").inner_text().replace("\N{NO-BREAK SPACE}", " ")
    return re.sub("[\u2068\u2069]", "", text)


def shares(explanation, local, layer=None):
    """Of each receiver (rows) what it takes from each source, by loops, in percent."""
    layers = explanation.decompositions[local].local[0].tolist()
    count = len(explanation.tokens)
    if layer is None:
        product = layers[0]
        for above in layers[1:]:
            product = [
                [
                    sum(above[i][k] * product[k][j] for k in range(count))
                    for j in range(count)
                ]
                for i in range(count)
            ]
    else:
        product = layers[layer]
    return [[100 * value / sum(row) for value in row] for row in product]


def agree(shown, expected):
    assert len(shown) == len(expected)
    for text, value in zip(shown, expected):
        if value < 0.49:
            assert text == ""
        elif value > 0.51:
            assert float(text) == pytest.approx(value, abs=0.51 if value > 9 else 0.06)


def test_scores_are_shown_at_first(opened, explanation) -> None:
    page = opened(explanation)
    # The first method that has layers.
    assert page.locator("#method option:checked").inner_text() == "globenc (N_ENC)"
    assert page.locator("#layer option").all_inner_texts() == [
        "all layers", "1", "2", "3",
    ]  # fmt: skip
    scores = explanation.methods[1].scores
    expected = [round(100 * score / max(scores)) for score in scores]
    assert numbers(page) == ["" if n < 10 else str(n) for n in expected]
    assert page.locator("section h2 small").count() == 4


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_hover_shows_where_evidence_goes_and_comes_from(
    opened, explanation, layer
) -> None:
    page = opened(explanation)
    matrix = shares(explanation, "N_ENC", layer)
    if layer is not None:
        page.select_option("#layer", label=str(layer + 1))
    word = explanation.tokens.index("lovely")
    tokens(page).nth(word).hover()
    agree(numbers(page), [row[word] for row in matrix])
    reached = shares(explanation, "N_ENC")[0][word]
    (said,) = re.findall(
        r"“lovely”: ([\d.]+) % of the evidence that reaches the", told(page)
    )
    assert float(said) == pytest.approx(reached, abs=0.06)
    (own,) = re.findall(r"([\d.]+) % of what it takes is its own", told(page))
    assert float(own) == pytest.approx(matrix[word][word], abs=0.06)
    where = "Through all layers," if layer is None else f"In layer {layer + 1},"
    assert where in told(page)
    page.get_by_label("where it takes from").check()
    tokens(page).nth(word).hover()
    agree(numbers(page), matrix[word])
    assert "from itself; from others, most from: " in told(page)
    page.mouse.move(0, 0)
    assert told(page).startswith("Point at a token")


def test_the_method_is_switched(opened, explanation) -> None:
    page = opened(explanation)
    page.select_option("#method", "3")
    word = explanation.tokens.index("film")
    tokens(page).nth(word).hover()
    agree(numbers(page), [row[word] for row in shares(explanation, "W")])
    page.select_option("#method", label="integrated_gradients")
    assert page.locator("#layer").is_disabled()
    assert page.get_by_label("where it takes from").is_disabled()
    tokens(page).nth(word).hover()
    score = explanation.methods[2].scores[word]
    assert f"“film”: score {float(f'{score:.4g}'):g}"[:14] in told(page)
    assert page.locator("#tokens .negative").count() == sum(
        score < 0 for score in explanation.methods[2].scores
    )


def test_a_click_holds_a_token_and_another_lets_go(opened, explanation) -> None:
    page = opened(explanation)
    token = tokens(page).nth(3)
    token.click()
    page.mouse.move(0, 0)
    assert token.get_attribute("aria-pressed") == "true"
    assert told(page).startswith(f"“{explanation.tokens[3]}”")
    tokens(page).nth(5).click()
    assert page.locator("[aria-pressed=true]").count() == 1
    tokens(page).nth(5).click()
    assert page.locator("[aria-pressed=true]").count() == 0


def test_a_tap_holds_a_token(opened, explanation) -> None:
    page = opened(explanation, has_touch=True, viewport={"width": 360, "height": 800})
    tokens(page).nth(4).tap()
    assert told(page).startswith(f"“{explanation.tokens[4]}”")
    tokens(page).nth(4).tap()
    assert told(page).startswith("Point at")


def test_keys_move_between_tokens(opened, explanation) -> None:
    page = opened(explanation)
    page.locator("input[value=to]").focus()
    page.keyboard.press("Tab")
    names = explanation.tokens
    last = len(names) - 1
    assert told(page).startswith(f"“{names[0]}”")
    for key, index in [
        ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", last),
        ("ArrowRight", last), ("Home", 0), ("ArrowLeft", 0), ("ArrowUp", 0),
    ]:  # fmt: skip
        page.keyboard.press(key)
        assert told(page).startswith(f"“{names[index]}”")
        assert tokens(page).nth(index).evaluate("b => b === document.activeElement")
    outline = "b => getComputedStyle(b).outlineStyle"
    assert tokens(page).nth(0).evaluate(outline) == "solid"
    # One stop for Tab, and a key that lets go.
    assert page.locator("#tokens [tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    assert told(page).startswith("Point at")
    page.keyboard.press("Enter")
    assert told(page).startswith(f"“{names[0]}”")
    page.keyboard.press("Tab")
    assert page.locator("#tokens button:focus").count() == 0


def test_arrows_follow_the_lines_and_the_direction(opened) -> None:
    given = explain(
        *demo.load_classifier(), "סרט נפלא " * 12, "globenc", decompose=True
    )
    page = opened(given, viewport={"width": 400, "height": 800})
    tokens(page).nth(1).focus()
    page.keyboard.press("ArrowLeft")
    assert tokens(page).nth(2).evaluate("b => b === document.activeElement")
    boxes = [one.bounding_box() for one in tokens(page).all()]
    assert boxes[2]["x"] < boxes[1]["x"]
    page.keyboard.press("ArrowDown")
    below = page.locator("#tokens button:focus").bounding_box()
    assert below["y"] > boxes[2]["y"]
    assert abs(below["x"] - boxes[2]["x"]) < 60
    page.keyboard.press("ArrowUp")
    assert page.locator("#tokens button:focus").bounding_box()["y"] == boxes[2]["y"]


def test_tokens_stay_in_place(opened, explanation) -> None:
    page = opened(explanation, viewport={"width": 420, "height": 800})
    before = [one.bounding_box() for one in tokens(page).all()]
    tokens(page).nth(6).hover()
    assert [one.bounding_box() for one in tokens(page).all()] == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_both_schemes(opened, explanation, scheme) -> None:
    long = replace(explanation, tokens=("a" * 80, *explanation.tokens[1:]))
    page = opened(long, viewport={"width": 360, "height": 800}, color_scheme=scheme)
    tokens(page).nth(0).click()
    width = "element => [element.scrollWidth, element.clientWidth]"
    assert page.locator("html").evaluate(width) == [360, 360]
    colour = "element => getComputedStyle(element).backgroundColor"
    dark = page.locator("body").evaluate(colour) == "rgb(22, 22, 22)"
    assert dark == (scheme == "dark")
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible()
    assert tokens(page).nth(0).is_visible()


def test_nothing_from_outside_runs(opened, explanation) -> None:
    output = replace(explanation.predicted, label=HOSTILE)
    methods = tuple(replace(m, name=HOSTILE) for m in explanation.methods)
    hostile = replace(
        explanation,
        text=HOSTILE,
        model=HOSTILE,
        tokens=(HOSTILE, *explanation.tokens[1:]),
        predicted=output,
        target=output,
        methods=methods,
    )
    page = opened(hostile)
    tokens(page).nth(0).click()
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0
    assert "</script><script>hacked" in told(page)
    assert page.locator("h1").text_content() == HOSTILE


def test_no_other_script_may_run(browser, explanation, tmp_path) -> None:
    html = to_html(explanation).replace("</body>", "<script>hacked = 1</script></body>")
    file = tmp_path / "page.html"
    file.write_text(html, encoding="utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.evaluate("typeof hacked") == "undefined"
    assert told(page).startswith("Point at")
    page.close()


def test_without_layers_there_are_strips_and_no_script(opened, explanation) -> None:
    page = opened(replace(explanation, decompositions={}))
    assert page.locator("script").count() == 0
    assert page.locator("button").count() == 0
    assert page.locator("p.tokens").count() == 4


def test_one_token_and_zero_rows(opened, explanation) -> None:
    found = explanation.decompositions["N_ENC"]
    one = replace(
        explanation,
        tokens=("film",),
        methods=(replace(explanation.methods[1], scores=(0.0,)),),
        decompositions={"N_ENC": replace(found, local=0 * found.local[..., :1, :1])},
    )
    page = opened(one)
    tokens(page).nth(0).hover()
    assert numbers(page) == [""]
    assert "none has 0.5 %" in told(page)


def test_what_does_not_fit_is_left_out_and_named(
    opened, explanation, monkeypatch
) -> None:
    numbers_each = 4 * len(explanation.tokens) ** 2
    monkeypatch.setattr(report, "_MOST_NUMBERS", numbers_each)
    page = opened(explanation)
    assert f"the layers of W, whose {numbers_each} numbers" in page.inner_text("body")
    page.select_option("#method", label="W")
    assert page.locator("#layer").is_disabled()


def test_a_long_sentence_is_a_small_file(explanation) -> None:
    found = explanation.decompositions["N_ENC"]
    local = found.local.new_ones(1, 12, 120, 120).uniform_()
    long = replace(
        explanation,
        tokens=("film",) * 120,
        methods=(replace(explanation.methods[1], scores=(1.0,) * 120),),
        decompositions={"N_ENC": replace(found, local=local)},
    )
    assert len(to_html(long)) < 1_500_000
