from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colors, pyplot, rc_context

pd = pytest.importorskip("pandas")

from captum_globenc.evaluation.figures import (  # noqa: E402
    aopc_curves,
    correlation_per_layer,
    quality_against_cost,
    to_svg,
)

FRACTIONS = np.arange(1, 10) / 10
LONG = "a name that is much longer than any figure has room for"


def curves_of(methods):
    rows = [
        (method, fraction, fraction * (1 + index), -0.1, 0.3 + index)
        for index, method in enumerate(methods)
        for fraction in FRACTIONS
    ]
    return pd.DataFrame(rows, columns=["method", "fraction", "mean", "low", "high"])


def layers_of(scores, kinds=("rollout", "single"), count=4):
    rows = [
        (score, kind, layer, 0.1 * layer + index, 0.1, index, index + 0.5, 20)
        for index, score in enumerate(scores)
        for kind in kinds
        for layer in range(1, count + 1)
    ]
    columns = ["local", "kind", "layer", "mean", "std", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def table_of(means, measure="aopc"):
    rows = [(mean, 0.1, mean - 0.1, mean + 0.2, 20) for mean in means.values()]
    index = pd.MultiIndex.from_product([means, [measure]], names=["method", "measure"])
    return pd.DataFrame(rows, index, columns=["mean", "std", "low", "high", "n"])


def cost_of(ratios):
    return pd.DataFrame({"ratio": ratios}, dtype=float)


def lines(axes):
    found = {line.get_label(): line for line in axes.lines}
    return {k: v for k, v in found.items() if k not in ("_key", "zero")}


def texts(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def drawn(figure):
    """Renders, which finds what only drawing does, and returns the SVG's texts."""
    root = ElementTree.fromstring(to_svg(figure))
    return [
        "".join(element.itertext())
        for element in root.iter("{http://www.w3.org/2000/svg}text")
    ]


def overlapping(figure):
    figure.draw_without_rendering()
    boxes = [
        text.get_window_extent()
        for axes in figure.axes
        for text in axes.texts
        if text.get_text()
    ]
    inside = [
        box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for box in boxes
    ]
    assert all(inside)
    # The line's height has room above and below the letters.
    return [
        (a, b)
        for index, a in enumerate(boxes)
        for b in boxes[:index]
        if a.shrunk(1, 0.8).overlaps(b.shrunk(1, 0.8))
    ]


# AOPC


def test_aopc_lines_have_the_values_and_bands():
    curves = curves_of(["globenc", "saliency"])
    (axes,) = aopc_curves(curves.sample(frac=1, random_state=0)).axes
    assert set(lines(axes)) == {"globenc", "saliency"}
    np.testing.assert_allclose(lines(axes)["globenc"].get_xdata(), FRACTIONS)
    np.testing.assert_allclose(lines(axes)["saliency"].get_ydata(), 2 * FRACTIONS)
    extents = [band.get_datalim(axes.transData) for band in axes.collections]
    assert sorted(extent.y1 for extent in extents) == pytest.approx([0.3, 1.3])
    assert [extent.y0 for extent in extents] == pytest.approx([-0.1, -0.1])


def test_aopc_axes_are_labelled_and_show_zero():
    figure = aopc_curves(curves_of(["globenc"]))
    shown = drawn(figure)
    assert "Highest-scored tokens masked" in shown
    assert "Drop of the class's probability" in shown
    assert "50%" in shown or "40%" in shown
    zero = [line for line in figure.axes[0].lines if line.get_label() == "zero"]
    assert len(zero) == 1


@pytest.mark.parametrize("count", [1, 2, 12, 24])
def test_aopc_names_each_line_without_overlap(count):
    names = [f"method_{index}" for index in range(count)]
    curves = curves_of(names)
    curves["mean"] = curves["fraction"]  # all ends in one place
    figure = aopc_curves(curves)
    assert sorted(texts(figure.axes[0])) == sorted(names)
    assert overlapping(figure) == []


def test_names_stand_in_the_order_of_the_ends():
    (axes,) = aopc_curves(curves_of(["low", "middle", "high"])).axes
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert places["low"] < places["middle"] < places["high"]


def test_methods_are_told_apart_by_more_than_colour():
    (axes,) = aopc_curves(curves_of([f"m{index}" for index in range(24)])).axes
    styles = [(line.get_color(), line.get_marker()) for line in lines(axes).values()]
    assert len(set(styles)) == 24
    # Yellow and other pale colours would vanish on white.
    for colour, _ in styles:
        assert min(colors.to_rgb(colour)) < 0.5


def test_a_method_looks_the_same_in_every_figure():
    names = ["globenc", "saliency", "random"]
    (curve,) = aopc_curves(curves_of(["random"]), names=names).axes
    (points,) = quality_against_cost(
        table_of({"random": 0.1, "saliency": 0.2}),
        cost_of({"random": 1, "saliency": 3}),
        names=names,
    ).axes
    point = next(c for c in points.containers if c.get_label() == "random")[0]
    line = lines(curve)["random"]
    assert (line.get_color(), line.get_marker()) == (
        point.get_color(),
        point.get_marker(),
    )


# Correlation per layer


def test_correlation_has_a_panel_for_rollout_and_one_for_single_layers():
    layers = layers_of(["N_ENC", "W"])
    layers.loc[layers["kind"] == "single", "mean"] -= 0.4
    rollout, single = correlation_per_layer(layers).axes
    assert [axes.get_title("left") for axes in (rollout, single)] == [
        "Rollout up to the layer",
        "Single layer",
    ]
    for axes, less in ((rollout, 0), (single, 0.4)):
        assert set(lines(axes)) == {"N_ENC", "W"}
        line = lines(axes)["W"]
        np.testing.assert_allclose(line.get_xdata(), [1, 2, 3, 4])
        np.testing.assert_allclose(
            line.get_ydata(), np.array([1.1, 1.2, 1.3, 1.4]) - less
        )
        assert len(axes.collections) == 2
        assert axes.get_xlabel() == "Layer"
        assert "Spearman" in axes.get_ylabel()


def test_a_score_looks_the_same_in_both_panels():
    layers = layers_of(["N_ENC", "W"])
    layers = layers[(layers["kind"] == "single") | (layers["local"] == "W")]
    rollout, single = correlation_per_layer(layers).axes
    assert lines(rollout)["W"].get_color() == lines(single)["W"].get_color()


def test_layers_are_whole_numbers():
    for count in (1, 2, 12):
        figure = correlation_per_layer(layers_of(["N_ENC"], count=count))
        figure.draw_without_rendering()
        ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
        assert ticks
        assert all(tick.isdigit() for tick in ticks)


def test_a_missing_panel_says_so():
    figure = correlation_per_layer(layers_of(["N_ENC"], kinds=["single"]))
    rollout, single = figure.axes
    assert texts(rollout) == ["Not measured"]
    assert not lines(rollout)
    assert texts(single) == ["N_ENC"]


# Quality and cost


def test_points_are_at_the_ratio_and_mean_with_the_interval():
    table = table_of({"globenc": 0.4, "saliency": 0.2})
    (axes,) = quality_against_cost(
        table, cost_of({"globenc": 2.5, "saliency": 30})
    ).axes
    assert axes.get_xscale() == "log"
    points = {c.get_label(): c for c in axes.containers}
    point, _, (bar,) = points["globenc"]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (2.5, 0.4)
    np.testing.assert_allclose(bar.get_segments()[0], [(2.5, 0.3), (2.5, 0.6)])
    assert sorted(texts(axes)) == ["globenc", "saliency"]
    assert axes.get_xlim() == (1, 100)
    assert axes.get_ylabel() == "aopc"


def test_ticks_are_numbers_without_formulas():
    table = table_of({"globenc": 0.4, "saliency": 0.2})
    shown = drawn(
        quality_against_cost(table, cost_of({"globenc": 1.5, "saliency": 2.5}))
    )
    assert {"1", "10"} <= set(shown)
    assert not any("$" in text for text in shown)


def test_another_measure_and_label():
    table = pd.concat(
        [table_of({"globenc": 0.4}), table_of({"globenc": -2.0}, "log_odds")]
    )
    cost = cost_of({"globenc": 2})
    (axes,) = quality_against_cost(table, cost, "log_odds", label="Log-odds").axes
    ((point, *_),) = axes.containers
    assert point.get_ydata()[0] == -2
    assert axes.get_ylabel() == "Log-odds"


def test_points_without_a_place_are_left_out():
    means = dict.fromkeys(("ok", "free", "endless", "unmeasured", "missing"), 0.1)
    table = table_of({**means, "undefined": np.nan})
    ratios = {"ok": 2, "free": 0, "endless": np.inf, "unmeasured": np.nan}
    (axes,) = quality_against_cost(table, cost_of({**ratios, "undefined": 2})).axes
    assert texts(axes) == ["ok"]


@pytest.mark.parametrize("count", [12, 24])
def test_labels_of_points_in_one_place_do_not_overlap(count):
    names = [f"method_{index}" for index in range(count)]
    figure = quality_against_cost(
        table_of(dict.fromkeys(names, 0.3)), cost_of(dict.fromkeys(names, 2.0))
    )
    assert overlapping(figure) == []


def test_an_undefined_interval_leaves_the_point():
    table = table_of({"globenc": 0.4})
    table[["low", "high"]] = np.nan
    figure = quality_against_cost(table, cost_of({"globenc": 2}))
    ((point, _, (bar,)),) = figure.axes[0].containers
    assert point.get_ydata()[0] == 0.4
    np.testing.assert_allclose(bar.get_segments()[0], [(2, 0.4), (2, 0.4)])
    drawn(figure)


# Any


@pytest.mark.parametrize(
    "figure",
    [
        lambda: aopc_curves(curves_of([])),
        lambda: aopc_curves(pd.DataFrame()),
        lambda: aopc_curves(curves_of(["m"]).assign(mean=np.nan)),
        lambda: correlation_per_layer(layers_of([])),
        lambda: correlation_per_layer(pd.DataFrame()),
        lambda: quality_against_cost(table_of({}), cost_of({})),
        lambda: quality_against_cost(table_of({"m": 1.0}), pd.DataFrame()),
    ],
)
def test_nothing_measured_is_said_and_drawn(figure):
    figure = figure()
    assert all(texts(axes) == ["Not measured"] for axes in figure.axes)
    assert "Not measured" in drawn(figure)


def test_values_that_are_not_defined_are_left_out():
    curves = curves_of(["some", "none"])
    curves.loc[curves["method"] == "none", "mean"] = np.nan
    curves.loc[0, ["mean", "low", "high"]] = np.nan
    figure = aopc_curves(curves)
    assert set(lines(figure.axes[0])) == {"some"}
    np.testing.assert_allclose(lines(figure.axes[0])["some"].get_xdata(), FRACTIONS[1:])
    drawn(figure)


def test_names_are_shown_as_they_are():
    names = ["_hidden", "$x_{", "<script>&", "日本", "a\x00b", "\uffff"]
    shown = drawn(aopc_curves(curves_of([*names, LONG])))
    assert {"_hidden", "$x_{", "<script>&", "日本", "a�b", "�"} <= set(shown)
    (cut,) = (text for text in shown if text.endswith("…"))
    assert LONG.startswith(cut[:-1])
    assert len(cut) < 30


def test_svg_is_deterministic_text():
    table, cost = table_of({"a": 0.4, "b": 0.2}), cost_of({"a": 2, "b": 3})
    first, second = (to_svg(quality_against_cost(table, cost)) for _ in range(2))
    assert first == second
    assert "<dc:date>" not in first
    assert "<text" in first


def test_the_users_style_does_not_matter():
    expected = to_svg(aopc_curves(curves_of(["a", "b"])))
    with rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        assert to_svg(aopc_curves(curves_of(["a", "b"]))) == expected


def test_no_window_is_opened():
    """Nor a figure kept alive by pyplot's list of them."""
    before = pyplot.get_fignums()
    to_svg(aopc_curves(curves_of(["a", "b"])))
    assert pyplot.get_fignums() == before
