"""Where the parts of an encoder are: one table, model type → paths.

A row holds module paths only. What the parts do is checked on every run: parts that do
not rebuild their layer raise
:class:`~captum_globenc.errors.ReconstructionError`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Architecture:
    r"""A family of encoders: paths to its parts, and where its norms are.

    A post-LN layer has norms after both residuals and must compute, with ``z`` the
    output of ``attention_norm``,

    .. code-block:: text

        y = x + output(attention(x))      z  = attention_norm(y)
        o = z + feed_forward(z)           x' = output_norm(o)

    A pre-LN layer has them in front of its two parts and must compute

    .. code-block:: text

        y = x + output(attention(norm(x)))
        x' = y + feed_forward(feed_forward_norm(y))

    Args:
        layers (str): from the encoder: the list of layers.
        attention (str): from a layer: the module that calls the attention function of
            ``transformers.AttentionInterface``.
        output (str): from a layer: the linear map after the heads, :math:`W_O, b_O`.
        feed_forward (str): from a layer: the module whose output is added in the second
            residual.
        attention_norm (str, optional): from a post-LN layer: the LayerNorm after the
            first residual.
        output_norm (str, optional): from a post-LN layer: the LayerNorm after the
            second residual.
        feed_forward_norm (str, optional): from a pre-LN layer: the norm in front of the
            feed-forward part.
        final_norm (str, optional): from a pre-LN encoder: the LayerNorm after the last
            layer.
        embeddings (str): from the encoder: the module that takes ``input_ids``,
            ``inputs_embeds`` or ``pixel_values``.
        positions (str, optional): from the encoder: the table of position embeddings.
        patches (str, optional): from an image encoder: the convolution that cuts an
            image into patches. Patches are its last tokens, row by row.
    """

    layers: str
    attention: str
    output: str
    feed_forward: str
    attention_norm: str | None = None
    output_norm: str | None = None
    feed_forward_norm: str | None = None
    final_norm: str | None = None
    embeddings: str
    positions: str | None = None
    patches: str | None = None

    def __post_init__(self) -> None:
        after = (self.attention_norm, self.output_norm)
        if self.is_pre_norm:
            complete = after == (None, None)
        else:
            complete = None not in after and self.final_norm is None
        if not complete:
            raise ValueError(
                "an Architecture has either attention_norm and output_norm (post-LN) "
                "or feed_forward_norm and, where there is one, final_norm (pre-LN), "
                f"got {self}."
            )

    @property
    def is_pre_norm(self) -> bool:
        """Whether the norms are in front of the layer's parts."""
        return self.feed_forward_norm is not None


_BERT = Architecture(
    embeddings="embeddings",
    positions="embeddings.position_embeddings",
    layers="encoder.layer",
    attention="attention.self",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    feed_forward="output.dense",
    output_norm="output.LayerNorm",
)

_DISTILBERT = Architecture(
    embeddings="embeddings",
    positions="embeddings.position_embeddings",
    layers="transformer.layer",
    attention="attention",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    feed_forward="ffn.lin2",
    output_norm="output_layer_norm",
)

_XLM_ROBERTA_XL = Architecture(
    embeddings="embeddings",
    positions="embeddings.position_embeddings",
    layers="encoder.layer",
    attention="attention.self",
    output="attention.output.dense",
    feed_forward_norm="LayerNorm",
    feed_forward="output.dense",
    final_norm="encoder.LayerNorm",
)

_ROBERTA_PRELAYERNORM = replace(
    _XLM_ROBERTA_XL,
    feed_forward_norm="intermediate.LayerNorm",
    final_norm="LayerNorm",
)

_ESM = replace(_XLM_ROBERTA_XL, final_norm="encoder.emb_layer_norm_after")
# With rotary positions there is no table of them.
_ESM_ROTARY = replace(_ESM, positions=None)

_VIT = Architecture(
    embeddings="embeddings",
    patches="embeddings.patch_embeddings.projection",
    layers="layers",
    attention="attention",
    output="attention.o_proj",
    feed_forward_norm="layernorm_after",
    feed_forward="mlp",
    final_norm="layernorm",
)

# As it was in transformers 5.0.
_VIT_OLD = replace(
    _VIT,
    layers="encoder.layer",
    attention="attention.attention",
    output="attention.output.dense",
    feed_forward="output.dense",
)

# The layouts of each family, of which a model has the first that fits: releases of
# transformers differ (newest first), and some parts are optional.
_TABLE: dict[str, tuple[Architecture, ...]] = {
    "bert": (_BERT,),
    "camembert": (_BERT,),
    "data2vec-text": (_BERT,),
    "distilbert": (_DISTILBERT,),
    "electra": (_BERT,),
    "ernie": (_BERT,),
    "esm": (_ESM, _ESM_ROTARY),
    "layoutlm": (_BERT,),
    "roberta": (_BERT,),
    "roberta-prelayernorm": (_ROBERTA_PRELAYERNORM,),
    "vit": (_VIT, _VIT_OLD),
    "xlm-roberta": (_BERT,),
    "xlm-roberta-xl": (_XLM_ROBERTA_XL,),
}


def supported_model_types() -> tuple[str, ...]:
    """The registered values of ``config.model_type``, in alphabetical order."""
    return tuple(sorted(_TABLE))


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Teach the package a model family.

    Args:
        model_type (str): the ``config.model_type`` of the family's models.
        architecture (Architecture): where the parts of the encoder are. An earlier
            entry for the same model type is replaced.

    Examples::

        >>> from captum_globenc import Architecture, register_architecture
        >>> register_architecture(
        ...     "their-bert",
        ...     Architecture(
        ...         embeddings="embeddings",
        ...         positions="embeddings.position_embeddings",
        ...         layers="encoder.layer",
        ...         attention="attention.self",
        ...         output="attention.output.dense",
        ...         attention_norm="attention.output.LayerNorm",
        ...         feed_forward="output.dense",
        ...         output_norm="output.LayerNorm",
        ...     ),
        ... )
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(
            "architecture must be a captum_globenc.Architecture, got "
            f"{type(architecture).__name__}"
        )
    _TABLE[model_type] = (architecture,)


def layouts_of(model_type: str | None) -> tuple[Architecture, ...]:
    """The layouts registered for a model type; of a model, the first that fits."""
    return _TABLE.get(model_type or "", ())
