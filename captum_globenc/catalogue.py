"""What is chosen by name: methods, local scores, measures and presets, in one place.

Nothing here needs torch, so that the command line lists and checks names at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from captum_globenc.errors import InputError, named

#: The local scores: what GlobEnc rolls out.
LOCAL_SCORES = (
    "W",
    "W_FIXED_RES",
    "W_RES",
    "N",
    "N_FIXED_RES",
    "N_RES",
    "N_RES_LN",
    "N_ENC",
)
#: The local score of ``globenc``.
DEFAULT_LOCAL = "N_ENC"
#: Methods that are GlobEnc with a local score, and which.
ROLLOUTS = {
    "globenc": DEFAULT_LOCAL,
    **{name: name for name in LOCAL_SCORES},
    "attention_rollout": "W_FIXED_RES",
}

#: Points on the path of integrated gradients.
STEPS = 50
#: Points on the path of AttnLRP and DecompX.
POINTS = 3
#: Samples of gradient SHAP and of kernel SHAP.
GRADIENT_SHAP_SAMPLES = 5
KERNEL_SHAP_SAMPLES = 200
#: Tokens in a window of occlusion.
WINDOW = 3


def rollout_of(local: str) -> str:
    """What the rollout of this local score is, in a line."""
    return f"rollout of {local}: how much of each token reaches the head"


_BASELINE = "from a baseline of pad tokens between [CLS] and [SEP]"

#: Every method by its name: what is computed and how it becomes one score per token.
METHODS: dict[str, str] = {
    "globenc": rollout_of(DEFAULT_LOCAL),
    **{name: rollout_of(name) for name in LOCAL_SCORES},
    "attention_last": "attention from [CLS] in the last layer, mean over heads",
    "attention_rollout": rollout_of(ROLLOUTS["attention_rollout"]),
    "alti": "rollout of how close each token's vector is to the layer's state (L1)",
    "value_zeroing": (
        "rollout of how much each layer's output turns without a token's values"
    ),
    "globenc_class_aware": (
        "rollout of N_ENC, the top layer's vectors projected on the class's gradient; "
        "signed"
    ),
    "attnlrp": "relevance at the embedding block's output, signed",
    "decompx": "relevance at the embedding block's output, without biases, signed",
    "decompx_absdot": (
        "the same with biases, shared by absdot: sums to the output, signed"
    ),
    "integrated_attnlrp": f"AttnLRP at {POINTS} points {_BASELINE}, signed",
    "integrated_decompx": f"DecompX at {POINTS} points {_BASELINE}, signed",
    "integrated_gradients": (
        f"{STEPS} steps {_BASELINE}, on the word embeddings; sum over hidden, signed"
    ),
    "saliency": ("gradient at the word embeddings; sum of absolute values over hidden"),
    "input_x_gradient": "word embeddings times gradient; L2 norm over hidden",
    "input_x_gradient_sum": "word embeddings times gradient; sum over hidden, signed",
    "gradient_shap": (
        f"{GRADIENT_SHAP_SAMPLES} samples {_BASELINE}, on the word embeddings; sum "
        "over hidden, signed"
    ),
    "deep_lift": f"{_BASELINE}, on the word embeddings; sum over hidden, signed",
    "feature_ablation": "each token in turn replaced by the pad token; signed",
    "occlusion": f"windows of {WINDOW} tokens replaced by pad tokens; signed",
    "kernel_shap": f"{KERNEL_SHAP_SAMPLES} samples {_BASELINE}, on the ids; signed",
    "random": "uniform random numbers: what chance gives",
}
#: What ``explain`` shows where no method is asked for.
DEFAULT_METHODS = ("globenc", "attnlrp", "decompx", "integrated_gradients")

#: Every measure; the last two attribute each text several times over.
MEASURES = (
    "rank_correlation",
    "aopc",
    "comprehensiveness",
    "sufficiency",
    "log_odds",
    "leave_one_out_tau",
    "infidelity",
    "sensitivity",
)
DEFAULT_MEASURES = MEASURES[:6]


@dataclass(frozen=True)
class Preset:
    """What a benchmark runs.

    Args:
        methods (tuple[str, ...]): keys of ``captum_globenc.methods.METHODS``.
        summary (str): what that is, in a line.
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
    summary: str
    measures: tuple[str, ...] = DEFAULT_MEASURES
    per_layer: bool = False
    model: str | None = None
    data: str | None = None
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str | None = "label"


# Modarressi et al. 2022 (arXiv:2205.03286), section 4: every local score, as a rollout
# and layer by layer, against gradient × input.
_PAPER = Preset(
    LOCAL_SCORES,
    "every local score, layer by layer",
    measures=("rank_correlation",),
    per_layer=True,
)
_HUB = "that on {}, model and data from the hub"

#: Every preset by its name.
PRESETS: dict[str, Preset] = {
    "default": Preset(
        (*DEFAULT_METHODS, "saliency", "random"),
        "six methods, chance among them",
    ),
    "paper": _PAPER,
    "paper-sst2": replace(
        _PAPER,
        summary=_HUB.format("SST-2"),
        model="TehranNLP-org/bert-base-uncased-cls-sst2",
        data="hub:nyu-mll/glue:sst2:validation",
        text_column="sentence",
    ),
    "paper-mnli": replace(
        _PAPER,
        summary=_HUB.format("MNLI"),
        model="TehranNLP-org/bert-base-uncased-cls-mnli",
        data="hub:nyu-mll/glue:mnli:validation_matched",
        text_column="premise",
        pair_column="hypothesis",
    ),
    "paper-hatexplain": replace(
        _PAPER,
        summary=_HUB.format("HateXplain"),
        model="TehranNLP-org/bert-base-uncased-cls-hatexplain",
        data="hub:Hate-speech-CNERG/hatexplain:test",
        # A word per element: they are joined with blanks. The labels are the votes of
        # several people, not one class.
        text_column="post_tokens",
        label_column=None,
    ),
    "full": Preset(
        tuple(name for name in METHODS if name not in ("globenc", "attention_rollout")),
        "every method",
        per_layer=True,
    ),
}


def check_methods(
    names: str | Iterable[str],
    local: str = DEFAULT_LOCAL,
    known: Mapping[str, object] = METHODS,
) -> list[str]:
    """The names of methods, in this order, each once.

    Args:
        names (str or iterable of str): one or several.
        local (str, optional): the local score of ``globenc``. Default: ``"N_ENC"``.
        known (Mapping, optional): what there is, by name. Default: ``METHODS``.

    Raises:
        InputError: no name, an unknown name or an unknown local score.
    """
    named(dict.fromkeys(LOCAL_SCORES), local, "local score")
    chosen = list(dict.fromkeys([names] if isinstance(names, str) else names))
    for name in chosen:
        named(known, name, "method")
    if not chosen:
        raise InputError(f"no method asked for; known: {', '.join(known)}.")
    return chosen


def check_measures(names: str | Iterable[str]) -> list[str]:
    """The names of measures.

    Raises:
        InputError: an unknown name.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        named(dict.fromkeys(MEASURES), name, "measure")
    return chosen
