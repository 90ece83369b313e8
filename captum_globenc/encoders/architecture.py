"""What a row of the architecture table says: where the parts of an encoder are.

A row holds paths only. What the parts do is checked on every run: parts that do not
rebuild their layer raise :class:`~captum_globenc.errors.ReconstructionError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: Which tokens of the last layer heads of a family read.
Pooling = Literal["first", "last", "mean"]


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

        y = x + attention_layer_scale * output(attention(input_norm(x)))
        x' = y + feed_forward_layer_scale * feed_forward(feed_forward_norm(y))

    where a layer scale that is not named is 1. Norms may be LayerNorms or RMSNorms.

    Args:
        layers (str): from the encoder: the list of layers; a ``*`` stands for all
            parts of a list on the way, and ``""`` is the encoder itself.
        attention (str): from a layer: the module inside which the layer attends, by
            ``torch.nn.functional.scaled_dot_product_attention`` or by a product of
            attention weights and values.
        output (str): from a layer: the linear map after the heads, :math:`W_O, b_O`, or
            its matrix, a parameter of shape (hidden, heads, head size).
        feed_forward (str): from a layer: the module whose output is added in the second
            residual.
        attention_norm (str, optional): from a post-LN layer: the norm after the first
            residual.
        output_norm (str, optional): from a post-LN layer: the norm after the second
            residual.
        feed_forward_norm (str, optional): from a pre-LN layer: the norm in front of the
            feed-forward part.
        final_norm (str, optional): from the encoder: the norm after the last layer.
        value (str, optional): from a layer: the linear map that makes the values,
            alone or as the last of queries, keys and values. Where it is named, every
            run checks that the values are made of the layer's own input.
        input_norm (str, optional): from a pre-LN layer: the norm in front of attention;
            needed where ``value`` is named.
        attention_layer_scale (str, optional): from a pre-LN layer: the vector that
            multiplies the attention branch (LayerScale).
        feed_forward_layer_scale (str, optional): likewise the feed-forward branch.
        embeddings (str, optional): from the encoder: the module that takes
            ``input_ids``, ``inputs_embeds`` or ``pixel_values``.
        positions (str, optional): from the encoder: the table of position embeddings.
        patches (str, optional): from an image encoder: the convolution that cuts an
            image into patches. Patches are its last tokens, row by row.
        pooling (str, optional): which token heads of the family read: the ``"first"``
            or ``"last"`` attended one, or the ``"mean"`` of all. It counts with
            ``readout="pooling"``, and where a head has no gradient. None: ask for
            ``token_index``. Default: ``"first"``.
        shared (bool, optional): one module serves as several layers (ALBERT). Default:
            False.
        batch_first (bool, optional): hidden states are (batch, tokens, hidden), not
            (tokens, batch, hidden). Default: True.
        only_if (Mapping[str, object], optional): from the first layer: attributes and
            the values with which this description holds. Default: none.
    """

    layers: str
    attention: str
    output: str
    feed_forward: str
    attention_norm: str | None = None
    output_norm: str | None = None
    feed_forward_norm: str | None = None
    final_norm: str | None = None
    value: str | None = None
    input_norm: str | None = None
    attention_layer_scale: str | None = None
    feed_forward_layer_scale: str | None = None
    embeddings: str | None = None
    positions: str | None = None
    patches: str | None = None
    pooling: Pooling | None = "first"
    shared: bool = False
    batch_first: bool = True
    only_if: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        after = (self.attention_norm, self.output_norm)
        scales = (self.attention_layer_scale, self.feed_forward_layer_scale)
        if self.is_pre_norm:
            complete = after == (None, None)
        else:
            complete = None not in after and scales == (None, None)
        if not complete:
            raise ValueError(
                "an Architecture has either attention_norm and output_norm (post-LN) "
                "or feed_forward_norm and, where there are any, attention_layer_scale "
                f"and feed_forward_layer_scale (pre-LN), got {self}."
            )
        if self.pooling not in ("first", "last", "mean", None):
            raise ValueError(
                'pooling must be "first", "last", "mean" or None, got '
                f"{self.pooling!r}."
            )

    @property
    def is_pre_norm(self) -> bool:
        """Whether the norms are in front of the layer's parts."""
        return self.feed_forward_norm is not None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Args:
        title (str): what people call the family.
        layouts (tuple[Architecture, ...]): of which a model has the first that fits:
            releases of transformers differ (newest first), and parts are optional.
        positions (str): how attention knows of positions: ``"learned"`` tables that are
            added to the embeddings, ``"rotary"``, a ``"relative bias"`` on the logits,
            or any, as the model's configuration or author chose (``"any"``).
        causal (bool, optional): no token attends to later ones. Default: False.
        rms_norm (bool, optional): its norms are RMSNorms. Default: False, LayerNorms.
        since (str, optional): the first release of transformers in which the family's
            attention can be recorded. Default: ``"5.0"``.
        note (str, optional): what a user should know, one sentence.
    """

    title: str
    layouts: tuple[Architecture, ...]
    positions: str
    causal: bool = False
    rms_norm: bool = False
    since: str = "5.0"
    note: str = ""
