"""GlobEnc as a Captum attribution method."""

from __future__ import annotations

from captum_globenc.attribution.class_aware import LocalScoreRollout


class GlobEnc(LocalScoreRollout):
    r"""Global token attribution for transformer encoders, in one forward pass.

    A local score measures how much each token of an encoder layer takes from every
    other token: through attention, the value vectors, both residual connections and
    both LayerNorms. Rollout combines the layers. More details in the paper:

    Modarressi, Fayyaz, Yaghoobzadeh and Pilehvar, *GlobEnc: Quantifying Global Token
    Attribution by Incorporating the Whole Encoder Layer in Transformers*, NAACL 2022,
    https://arxiv.org/abs/2205.03286

    With :math:`n^l_{ij}` the local score of layer :math:`l`, the scores are
    :math:`w\, n^L \cdots n^1`. The row vector :math:`w` holds the weights of the tokens
    that the head reads: the share of each token in the norm of the gradient of the
    selected output with respect to the last hidden states. A head that reads one token
    gives it the weight 1, and the scores do not depend on the class. A head that reads
    several tokens may weight them differently for each class. A head that also reads
    lower layers is explained for all hidden states that it reads.

    With ``class_aware=True`` the scores are signed and for the selected output
    :math:`y`: the top layer's vectors are projected on its gradient at the tokens that
    are read, and that row takes the place of the top layer,

    .. math::
        r\, n^{L-1} \cdots n^1, \qquad
        r_j = \sum_i \langle \partial y / \partial x^L_i,\; g_{ij} \rangle ,

    :math:`g_{ij}` the vectors whose length is N_ENC, through all norms up to the last
    hidden states :math:`x^L`. The layers below spread :math:`r_j` over the tokens by
    their unsigned scores. ``decompose`` has no class. This is an extension of this
    project, at the cost of the head's backward pass.

    The model runs once, with its own attention, and is observed in the calling thread.
    It runs a second time where something is not as it was in the last call of the same
    object: another kind of head, or weights that were changed through ``.data``.
    Nothing is changed that another thread could notice, with two exceptions: the
    encoder of a model in training mode is in evaluation mode while it is recorded, and
    compiled code runs uncompiled while a compiled model is recorded. Both are restored.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        encoder (nn.Module, optional): the model or the part of it to explain, if
            ``forward_func`` runs several. Default: the one found in ``forward_func``.
        local (str, optional): the score of one layer, a key of
            ``captum_globenc.LOCAL_SCORES``: ``"W"``, ``"W_FIXED_RES"``, ``"W_RES"``,
            ``"N"``, ``"N_FIXED_RES"``, ``"N_RES"``, ``"N_RES_LN"`` or ``"N_ENC"``.
            Default: ``"N_ENC"``, the method of the paper.
        normalize (bool, optional): scale the scores of each example so that their
            sizes sum to 1. For images, the sum includes the special tokens. Default:
            False.
        readout (str, optional): how to weight the tokens that the head reads:
            ``"gradient"`` as above, or ``"pooling"`` for the usual pooling of the
            model's family ([CLS] for BERT), whatever the class. Default:
            ``"gradient"``.
        class_aware (bool, optional): signed scores for the selected output, as above.
            It needs ``local="N_ENC"``, ``readout="gradient"``, a target that selects
            one output of each example, and a head that reads the last hidden states
            alone, with a gradient. With ``token_index``, only the gradient at that
            token counts. Default: False.

    Examples::

        >>> from captum_globenc import GlobEnc, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> globenc = GlobEnc(model)
        >>> scores = globenc.attribute(
        ...     batch["input_ids"],
        ...     target=1,
        ...     additional_forward_args=(batch["attention_mask"],),
        ... )
        >>> scores.shape == batch["input_ids"].shape
        True
    """
