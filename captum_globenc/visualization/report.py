"""An explanation as a page that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import torch
from jinja2 import Environment, PackageLoader

from captum_globenc.comparison.explanation import Explanation, MethodScores
from captum_globenc.contributions.rollout import Decomposition
from captum_globenc.visualization.text import (
    LEAST,
    described,
    direction,
    number,
    strengths,
    title,
    unknown_tokens,
    visible,
)

# Shares of all layers and methods together: about 4 MB.
_MOST_NUMBERS = 1_000_000
_WHOLE = 10_000


def to_html(explanation: Explanation) -> str:
    """The explanation as a page that needs no other file and no network.

    It shows the scores of every method. Where the explanation has decompositions
    (``explain(..., decompose=True)``), it lets the reader follow a token through the
    layers: which receivers take from it, which sources it takes from, and how much of
    it reaches the classifier. It holds a million shares, such as those of 12 layers and
    277 tokens; decompositions that do not fit are left out, and the page says so.

    Args:
        explanation (Explanation): of ``captum_globenc.explanation.explain``.

    Returns:
        *str*: the HTML, in which nothing of the explanation is markup.

    Examples::

        >>> from captum_globenc import demo
        >>> from captum_globenc.explanation import explain
        >>> from captum_globenc.visualization import to_html
        >>> model, tokenizer = demo.load_classifier()
        >>> explanation = explain(model, tokenizer, "Fine.", "globenc", decompose=True)
        >>> "Follow a token" in to_html(explanation)
        True
    """
    environment = Environment(loader=PackageLoader("captum_globenc"), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    kept, left_out = _that_fit(explanation.decompositions)
    methods = [_method(explanation, method) for method in explanation.methods]
    followed = [
        i for i, method in enumerate(explanation.methods) if method.local in kept
    ]
    script = environment.get_template("explanation.js").render()
    digest = hashlib.sha256(script.encode()).digest()
    shares = {name: _shares(decomposition) for name, decomposition in kept.items()}
    return environment.get_template("explanation.html").render(
        explanation=explanation,
        direction=direction(explanation.text),
        predicted=described(explanation.predicted),
        target=described(explanation.target),
        unknown=unknown_tokens(explanation),
        methods=methods,
        least=round(100 * LEAST),
        follow=bool(followed),
        first=followed[0] if followed else None,
        layers=next((len(matrices) - 1 for matrices in shares.values()), 0),
        shares=shares,
        script=script,
        script_hash=base64.b64encode(digest).decode(),
        left_out=list(left_out),
        numbers=max(left_out.values(), default=0),
        most_numbers=_MOST_NUMBERS,
    )


def _method(explanation: Explanation, method: MethodScores) -> dict[str, Any]:
    relative = strengths(method.scores)
    return {
        "title": title(method, explanation.local),
        "seconds": method.seconds,
        "local": method.local,
        "tokens": [
            {
                "text": visible(token),
                "score": score,
                "number": number(strength),
                "strength": strength,
            }
            for token, score, strength in zip(
                explanation.tokens, method.scores, relative, strict=True
            )
        ],
    }


def _that_fit(
    decompositions: dict[str, Decomposition],
) -> tuple[dict[str, Decomposition], dict[str, int]]:
    """Those that the page has room for, and how many numbers the others have."""
    kept, left_out, room = {}, {}, _MOST_NUMBERS
    for name, decomposition in decompositions.items():
        _, layers, tokens, _ = decomposition.local.shape
        numbers = (layers + 1) * tokens**2
        if numbers <= room:
            kept[name] = decomposition
            room -= numbers
        else:
            left_out[name] = numbers
    return kept, left_out


def _shares(decomposition: Decomposition) -> list[list[list[int]]]:
    """What each receiver takes from each source, of a sum of 10,000 per receiver.

    Per layer, and at last the rollout of all. Whole numbers are short to write.
    """
    scores = torch.cat([decomposition.local[0], decomposition.rollout()]).double()
    totals = scores.sum(-1, keepdim=True)
    shares = _WHOLE * scores / totals.masked_fill(totals == 0, 1)
    return shares.round().int().tolist()
