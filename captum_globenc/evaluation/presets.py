"""Named settings of the benchmark, the paper's own experiments among them."""

from __future__ import annotations

from dataclasses import dataclass

from captum_globenc.comparison.methods import METHODS
from captum_globenc.contributions.norm_scores import LOCAL_SCORES
from captum_globenc.evaluation.scoring import DEFAULT_MEASURES


@dataclass(frozen=True)
class Preset:
    """What to run.

    Args:
        methods (tuple[str, ...]): keys of ``captum_globenc.methods.METHODS``.
        measures (tuple[str, ...]): of ``captum_globenc.evaluation.MEASURES``.
        per_layer (bool): also the rank correlation of every local score in every layer,
            rolled out up to it and alone.
        model (str or None): a model on the hub; None: the embedded classifier.
        data (str or None): a data set on the hub; None: the shipped sentences.
        text_column (str): where its texts are.
        pair_column (str or None): where its second sentences are.
        label_column (str or None): where its labels are.
    """

    methods: tuple[str, ...]
    measures: tuple[str, ...] = DEFAULT_MEASURES
    per_layer: bool = False
    model: str | None = None
    data: str | None = None
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str | None = "label"


# Modarressi et al. 2022 (arXiv:2205.03286), section 4: every local score, as a rollout
# and layer by layer, against gradient × input.
_PAPER = {
    "methods": tuple(LOCAL_SCORES),
    "measures": ("rank_correlation",),
    "per_layer": True,
}

#: Every preset by its name.
PRESETS: dict[str, Preset] = {
    "default": Preset(
        (
            "globenc",
            "attnlrp",
            "decompx",
            "integrated_gradients",
            "saliency",
            "random",
        )
    ),
    "paper": Preset(**_PAPER),  # type: ignore[arg-type]
    "paper-sst2": Preset(
        **_PAPER,  # type: ignore[arg-type]
        model="TehranNLP-org/bert-base-uncased-cls-sst2",
        data="hub:nyu-mll/glue:sst2:validation",
        text_column="sentence",
    ),
    "paper-mnli": Preset(
        **_PAPER,  # type: ignore[arg-type]
        model="TehranNLP-org/bert-base-uncased-cls-mnli",
        data="hub:nyu-mll/glue:mnli:validation_matched",
        text_column="premise",
        pair_column="hypothesis",
    ),
    "paper-hatexplain": Preset(
        **_PAPER,  # type: ignore[arg-type]
        model="TehranNLP-org/bert-base-uncased-cls-hatexplain",
        data="hub:Hate-speech-CNERG/hatexplain:test",
        # A word per element: they are joined with blanks. The labels are the votes of
        # several people, not one class.
        text_column="post_tokens",
        label_column=None,
    ),
    "full": Preset(
        tuple(name for name in METHODS if name not in ("globenc", "attention_rollout")),
        per_layer=True,
    ),
}
