from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from captum_globenc.evaluation.page import to_html  # noqa: E402

EXAMPLES = 20
# In no order, neither of names nor of values.
VALUES = {
    "globenc": {"rank_correlation": 0.7, "aopc": 0.31, "log_odds": -1.5},
    "reference": {"rank_correlation": 1.0, "aopc": -0.25, "log_odds": -0.5},
    "lime": {"rank_correlation": 0.1, "aopc": np.nan, "log_odds": -2.25},
    "a_method": {"rank_correlation": 0.5, "aopc": 0.1234, "log_odds": -0.75},
}
HOSTILE = '"><script>hacked = 1</script><img src=x onerror="hacked = 1">'


def results(values=VALUES, **others):
    rows = {
        (method, measure): (mean, 0.2, mean - 0.05, mean + 0.05, EXAMPLES)
        for method, measures in values.items()
        for measure, mean in measures.items()
    }
    index = pd.MultiIndex.from_tuples(rows, names=["method", "measure"])
    table = pd.DataFrame(
        list(rows.values()), index, columns=["mean", "std", "low", "high", "n"]
    )
    table.loc[table["mean"].isna(), :] = [np.nan, np.nan, np.nan, np.nan, 0]
    fractions = np.arange(1, 10) / 10
    curves = [(m, f, f, f - 0.1, f + 0.1) for m in values for f in fractions]
    layers = [
        (local, kind, layer, 0.1 * layer, 0.1, 0.05, 0.6, EXAMPLES)
        for local in ("N_ENC", "W")
        for kind in ("rollout", "single")
        for layer in (1, 2, 3)
    ]
    cost = {
        method: (0.01 * ratio, ratio, ratio, 0, 12.5)
        for ratio, method in enumerate(["forward pass", *values], 1)
    }
    return {
        "table": table,
        "curves": pd.DataFrame(
            curves, columns=["method", "fraction", "mean", "low", "high"]
        ),
        "layers": pd.DataFrame(
            layers,
            columns=["local", "kind", "layer", "mean", "std", "low", "high", "n"],
        ),
        "cost": pd.DataFrame.from_dict(
            cost,
            orient="index",
            columns=["seconds", "ratio", "forwards", "backwards", "memory"],
            dtype=float,
        ),
        "methods": {method: f"How {method} is reduced." for method in values},
        "settings": {"model": "some/bert", "data": "sst2", "seed": 3, "mask": None},
        "accuracy": 0.925,
        "examples": EXAMPLES,
        **others,
    }


def empty():
    """No rows at all; the frames as bare as they can be."""
    frames = dict.fromkeys(("curves", "layers", "cost"), pd.DataFrame())
    index = pd.MultiIndex.from_arrays([[], []], names=["method", "measure"])
    columns = ["mean", "std", "low", "high", "n"]
    return {**frames, "table": pd.DataFrame([], index, columns=columns)}


@pytest.fixture
def opened(open_html):
    return lambda given, **settings: open_html(to_html(**given), **settings)


def names(page, table="measures"):
    return page.locator(f"#{table} tbody th").all_text_contents()


def plain(text):
    """In one line, with the characters of a keyboard."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "none")
    return re.sub(r"\s+", " ", text).strip()


def cells(page, method, table="measures"):
    name = page.locator(f'[data-value="{method}"]')
    row = page.locator(f"#{table} tbody tr", has=name)
    return [plain(text) for text in row.locator("td").all_inner_texts()]


def header(page, name, table="measures"):
    return page.locator(f"#{table} thead th", has_text=name)


# What it says


def test_summary_names_what_was_measured(opened):
    text = opened(results()).locator("h1 + p").inner_text()
    for part in (
        "4 methods",
        "some/bert",
        "20 examples",
        "sst2",
        "3 measures",
        "92.5 %",
    ):
        assert part in text


def test_summary_without_model_data_and_accuracy(opened):
    page = opened(results(accuracy=None, settings={}))
    text = page.locator("h1 + p").inner_text()
    assert "None" not in text
    assert "accuracy" not in text
    assert page.locator("details").count() == 0


def test_table_has_a_row_per_method_and_a_column_per_measure(opened):
    page = opened(results())
    assert names(page) == list(VALUES)
    headers = page.locator("#measures thead th").all_inner_texts()
    assert [text.split("\n")[0].strip() for text in headers] == [
        "Method",
        "Rank correlation",
        "AOPC",
        "Log-odds",
    ]
    assert ["lower is better" in text for text in headers] == [
        False,
        False,
        False,
        True,
    ]
    assert ["higher is better" in text for text in headers] == [
        False,
        True,
        True,
        False,
    ]


def test_cells_have_mean_deviation_and_interval(opened):
    page = opened(results())
    assert cells(page, "a_method") == [
        "0.500 ± 0.200 [0.450, 0.550]",
        "0.123 ± 0.200 [0.073, 0.173]",
        "-0.750 ± 0.200 [-0.800, -0.700]",
    ]
    assert cells(page, "lime")[1] == "none"


def test_the_number_of_examples_is_given_where_some_are_missing(opened):
    given = results()
    given["table"].loc[("globenc", "aopc"), "n"] = 17
    page = opened(given)
    assert "n = 17" in cells(page, "globenc")[1]
    assert page.locator("#measures td", has_text="n =").count() == 1


def test_small_numbers_keep_their_digits(opened):
    values = {"a": {"infidelity": 1.234e-5}, "b": {"infidelity": 0.25}}
    page = opened(results(values))
    assert cells(page, "a")[0].startswith("★ 1.23e-05 ± 0.2 [")


def test_undefined_deviation_and_interval_are_left_out(opened):
    given = results()
    given["table"].loc[("globenc", "aopc"), ["std", "low", "high"]] = np.nan
    assert cells(opened(given), "globenc")[1] == "★ 0.310"


def test_the_best_are_bold_and_the_reference_is_no_rival(opened):
    page = opened(results())
    best = page.locator("#measures td:has(strong)")
    assert [plain(text).split(" [")[0] for text in best.all_inner_texts()] == [
        "★ 0.700 ± 0.200",
        "★ 0.310 ± 0.200",
        "★ -2.250 ± 0.200",
    ]
    assert page.get_by_role("img", name="best").count() == 3
    weight = "element => getComputedStyle(element.querySelector('strong')).fontWeight"
    assert best.evaluate_all(f"all => all.map({weight})") == ["700"] * 3
    assert cells(page, "reference")[0].endswith("the reference")
    assert page.locator("td", has_text="the reference").count() == 1


def test_ties_are_all_best(opened):
    values = {"a": {"aopc": 0.5}, "b": {"aopc": 0.5}, "c": {"aopc": 0.1}}
    assert opened(results(values)).locator("td strong").count() == 2


def test_an_unknown_measure_is_shown_without_a_best(opened):
    values = {"a": {"surprise": 0.5}, "b": {"surprise": 0.25}}
    page = opened(results(values))
    assert cells(page, "b") == ["0.25 ± 0.2 [0.2, 0.3]"]
    assert page.locator("td strong").count() == 0
    assert "built-in" in page.locator("#glossary dd").inner_text()


def test_every_measure_is_defined(opened):
    measures = (
        "rank_correlation",
        "aopc",
        "comprehensiveness",
        "sufficiency",
        "log_odds",
        "leave_one_out_tau",
        "infidelity",
        "sensitivity",
    )
    page = opened(results({"a": dict.fromkeys(measures, 0.5)}))
    terms = page.locator("#glossary dt").all_inner_texts()
    better = [re.search("(higher|lower) is better", term)[1] for term in terms]
    assert better == ["higher"] * 3 + ["lower"] * 2 + ["higher"] + ["lower"] * 2
    definitions = page.locator("#glossary dd").all_inner_texts()
    assert len(definitions) == len(measures)
    assert all(len(definition) > 40 for definition in definitions)
    assert not any("built-in" in definition for definition in definitions)


def test_costs_are_listed(opened):
    page = opened(results())
    assert names(page, "costs") == ["forward pass", *VALUES]
    assert cells(page, "globenc", "costs") == ["0.02", "2", "2", "0", "12.5"]


def test_memory_that_was_not_measured_is_a_dash(opened):
    given = results()
    given["cost"]["memory"] = np.nan
    assert cells(opened(given), "lime", "costs")[-1] == "none"


def test_cautions_methods_and_settings(opened):
    page = opened(results())
    caution = page.locator(".caution").inner_text()
    for part in ("agreement with another explanation", "trained on", "by construction"):
        assert part in caution
    assert page.locator("#methods dt").all_inner_texts() == list(VALUES)
    assert "How lime is reduced." in page.locator("#methods").inner_text()
    settings = page.locator("#settings")
    assert not settings.is_visible()
    page.locator("summary").click()
    assert settings.is_visible()
    assert settings.locator("dd").all_inner_texts() == [
        "some/bert",
        "sst2",
        "3",
        "null",
    ]


# Figures


def test_figures_are_visible_and_have_words(opened):
    page = opened(results())
    figures = page.locator("figure svg")
    assert figures.count() == 3
    for figure in figures.all():
        assert figure.is_visible()
        box = figure.bounding_box()
        assert min(box["width"], box["height"]) > 200
        assert figure.locator("path").count() > 5
    for caption in page.locator("figcaption").all_inner_texts():
        assert page.get_by_role("img", name=caption).count() == 1
    assert page.locator("figure svg text", has_text="a_method").count() == 2


def test_ids_are_unique_and_references_resolve(opened):
    page = opened(results())
    ids = page.locator("[id]").evaluate_all("all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', page.content())
    assert used
    assert set(used) <= set(ids)
    assert page.locator("svg style").count() == 0


def test_the_cost_figure_shows_another_measure_without_aopc(opened):
    page = opened(results({"a": {"log_odds": -1.0}}))
    assert page.locator("svg text", has_text="Log-odds (lower is better)").count() == 1


def test_figures_are_on_white_in_the_dark(opened):
    page = opened(results(), color_scheme="dark")
    colour = "element => getComputedStyle(element).backgroundColor"
    assert page.locator("body").evaluate(colour) == "rgb(22, 22, 22)"
    assert page.locator(".card").first.evaluate(colour) == "rgb(255, 255, 255)"


# Sorting

DESCENDING = {
    "Rank correlation": ["reference", "globenc", "a_method", "lime"],
    "AOPC": ["globenc", "a_method", "reference", "lime"],
    "Log-odds": ["reference", "a_method", "globenc", "lime"],
}


@pytest.mark.parametrize("measure", DESCENDING)
def test_a_click_sorts_descending_and_another_ascending(opened, measure):
    page = opened(results())
    button = header(page, measure).get_by_role("button")
    button.click()
    assert names(page) == DESCENDING[measure]
    assert header(page, measure).get_attribute("aria-sort") == "descending"
    button.click()
    ascending = DESCENDING[measure][::-1]
    if measure == "AOPC":  # The undefined one stays last.
        ascending = [*ascending[1:], "lime"]
    assert names(page) == ascending
    assert header(page, measure).get_attribute("aria-sort") == "ascending"


def test_only_one_column_is_sorted_at_a_time(opened):
    page = opened(results())
    assert page.locator("[aria-sort]").count() == 0
    header(page, "AOPC").get_by_role("button").click()
    header(page, "Log-odds").get_by_role("button").click()
    assert page.locator("[aria-sort]").count() == 1
    assert header(page, "Log-odds").get_attribute("aria-sort") == "descending"
    assert cells(page, "globenc")[1].startswith("★ 0.310")


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_keys_sort(opened, key):
    page = opened(results())
    page.keyboard.press("Tab")  # the table's container, which scrolls
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press(key)
    assert names(page) == DESCENDING["Rank correlation"]
    page.keyboard.press(key)
    assert names(page) == DESCENDING["Rank correlation"][::-1]


def test_names_sort_alphabetically_first(opened):
    page = opened(results())
    button = header(page, "Method").get_by_role("button")
    button.click()
    assert names(page) == sorted(VALUES)
    assert header(page, "Method").get_attribute("aria-sort") == "ascending"
    button.click()
    assert names(page) == sorted(VALUES, reverse=True)


def test_costs_sort_by_themselves(opened):
    page = opened(results())
    header(page, "Seconds", "costs").get_by_role("button").click()
    assert names(page, "costs") == [*reversed(VALUES), "forward pass"]
    assert names(page) == list(VALUES)


# Everywhere


@pytest.mark.parametrize("long", [False, True])
def test_a_phone_scrolls_the_tables_and_not_the_page(opened, long):
    word = "Antidisestablishmentarianism" * 5
    values = {f"{word if long else 'method'}_{i}": VALUES["lime"] for i in range(12)}
    settings = {"model": word, word: word} if long else {}
    given = results(values, settings=settings)
    page = opened(given, viewport={"width": 360, "height": 800})
    for details in page.locator("summary").all():
        details.click()
    width = "element => [element.scrollWidth, element.clientWidth]"
    scroll, client = page.locator("html").evaluate(width)
    assert (scroll, client) == (360, 360)
    scroll, client = page.locator(".scroll").first.evaluate(width)
    assert scroll > client
    assert page.locator("#measures tbody th").first.bounding_box()["width"] < 180


def test_print_shows_all(opened):
    page = opened(results())
    assert not page.locator("#settings").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#settings").is_visible()
    colour = "element => getComputedStyle(element).backgroundColor"
    assert page.locator("body").evaluate(colour) == "rgb(255, 255, 255)"


def test_nothing_from_outside_runs(opened):
    values = {HOSTILE: VALUES["globenc"], "lime": {HOSTILE: 0.5, "aopc": 0.1}}
    given = results(values, settings={HOSTILE: HOSTILE, "model": HOSTILE})
    given["methods"] = {HOSTILE: HOSTILE}
    given["settings"]["data"] = [HOSTILE]
    given["layers"]["local"] = HOSTILE
    page = opened(given)
    page.locator("summary").click()
    for button in page.locator("thead button").all():
        button.click()
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("script").count() == 1
    assert page.locator("body img").count() == 0
    assert HOSTILE in names(page)
    assert page.locator("#settings dt").first.text_content() == HOSTILE
    assert page.locator("svg text", has_text=HOSTILE[:20]).count() == 4


@pytest.mark.parametrize(
    "given",
    [
        results({"only": {"aopc": 0.5}}),
        results({"only": {"aopc": np.nan}}),
        results({f"method_{i}": VALUES["globenc"] for i in range(18)}),
        results({}, **empty(), methods={}, settings={}, accuracy=None, examples=0),
        results(curves=pd.DataFrame(), layers=pd.DataFrame(), cost=pd.DataFrame()),
    ],
    ids=["one", "undefined", "many", "nothing", "table alone"],
)
def test_any_amount_is_shown(opened, given):
    page = opened(given)
    assert page.locator("h1").is_visible()
    methods = list(dict.fromkeys(given["table"].index.get_level_values(0)))
    assert names(page) == methods
    frames = [name for name in ("curves", "layers", "cost") if len(given[name])]
    assert page.locator("figure").count() == len(frames)


def test_svg_is_well_formed_and_the_page_deterministic():
    first, second = to_html(**results()), to_html(**results())
    assert first == second
    for svg in re.findall("<svg.*?</svg>", first, flags=re.DOTALL):
        ElementTree.fromstring(svg)
