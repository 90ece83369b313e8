"""An explanation as a page that needs no other file and no network."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader

from captum_globenc.explanation import Explanation
from captum_globenc.visualization.text import (
    LEAST,
    described,
    direction,
    number,
    strengths,
    title,
    visible,
)


def to_html(explanation: Explanation) -> str:
    """The explanation as a page that needs no other file, script or network.

    Args:
        explanation (Explanation): of ``captum_globenc.explanation.explain``.

    Returns:
        *str*: the HTML.
    """
    environment = Environment(loader=PackageLoader("captum_globenc"), autoescape=True)
    methods = [
        {
            "title": title(method, explanation.local),
            "seconds": method.seconds,
            "tokens": [
                {
                    "text": visible(token),
                    "score": score,
                    "number": number(strength),
                    "strength": strength,
                }
                for token, score, strength in zip(
                    explanation.tokens,
                    method.scores,
                    strengths(method.scores),
                    strict=True,
                )
            ],
        }
        for method in explanation.methods
    ]
    return environment.get_template("explanation.html").render(
        explanation=explanation,
        direction=direction(explanation.text),
        predicted=described(explanation.predicted),
        target=described(explanation.target),
        methods=methods,
        least=round(100 * LEAST),
    )
