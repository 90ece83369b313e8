"""The table of families: where the parts of their layers are, one row a family.

A family is known by the ``config.model_type`` of its models, or by the name of a class,
for models that have no such config.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from captum_globenc.encoders.architecture import Architecture, Family

_BERT = Architecture(
    embeddings="embeddings",
    positions="embeddings.position_embeddings",
    layers="encoder.layer",
    attention="attention.self",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    feed_forward="output.dense",
    output_norm="output.LayerNorm",
    value="attention.self.value",
)

_DEBERTA = replace(_BERT, value=None)
_DEBERTA_V2 = replace(_BERT, value="attention.self.value_proj")
_ROFORMER = replace(_BERT, positions="encoder.embed_positions")
# Big Bird may put another module in the place of attention.self while it runs.
_BIG_BIRD = replace(_BERT, attention="attention")

_MPNET = replace(
    _BERT,
    attention="attention.attn",
    output="attention.attn.o",
    attention_norm="attention.LayerNorm",
    value="attention.attn.v",
)

_XLNET = Architecture(
    embeddings="word_embedding",
    layers="layer",
    attention="rel_attn",
    output="rel_attn.o",
    attention_norm="rel_attn.layer_norm",
    feed_forward="ff.layer_2",
    output_norm="ff.layer_norm",
    pooling="last",
    batch_first=False,
)

_BART = Architecture(
    embeddings="embed_tokens",
    positions="embed_positions",
    layers="layers",
    attention="self_attn",
    output="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    feed_forward="fc2",
    output_norm="final_layer_norm",
    value="self_attn.v_proj",
    pooling=None,
)
_MBART = replace(
    _BART,
    attention_norm=None,
    output_norm=None,
    input_norm="self_attn_layer_norm",
    feed_forward_norm="final_layer_norm",
    final_norm="layer_norm",
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
    value="attention.v_lin",
)

_ALBERT = Architecture(
    embeddings="embeddings",
    positions="embeddings.position_embeddings",
    layers="encoder.albert_layer_groups.*.albert_layers",
    shared=True,
    attention="attention",
    output="attention.dense",
    attention_norm="attention.LayerNorm",
    feed_forward="ffn_output",
    output_norm="full_layer_layer_norm",
    value="attention.value",
)

_NOMIC_BERT = Architecture(
    embeddings="embeddings",
    layers="layers",
    attention="self_attn",
    output="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    feed_forward="mlp",
    output_norm="post_mlp_layernorm",
    value="self_attn.v_proj",
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
    value="attention.self.value",
    input_norm="attention.self_attn_layer_norm",
)

_ROBERTA_PRELAYERNORM = replace(
    _XLM_ROBERTA_XL,
    feed_forward_norm="intermediate.LayerNorm",
    final_norm="LayerNorm",
    input_norm="attention.LayerNorm",
)

_ESM = replace(
    _XLM_ROBERTA_XL,
    final_norm="encoder.emb_layer_norm_after",
    input_norm="attention.LayerNorm",
)
# With rotary positions there is no table of them.
_ESM_ROTARY = replace(_ESM, positions=None)

_MODERNBERT = Architecture(
    embeddings="embeddings",
    layers="layers",
    attention="attn",
    output="attn.Wo",
    feed_forward_norm="mlp_norm",
    feed_forward="mlp",
    final_norm="final_norm",
    value="attn.Wqkv",
    input_norm="attn_norm",
)

# Llama and what is built like it; EuroBERT attends in both directions.
_LLAMA = Architecture(
    embeddings="embed_tokens",
    layers="layers",
    attention="self_attn",
    output="self_attn.o_proj",
    feed_forward_norm="post_attention_layernorm",
    feed_forward="mlp",
    final_norm="norm",
    pooling="last",
    value="self_attn.v_proj",
    input_norm="input_layernorm",
)
_EUROBERT = replace(_LLAMA, pooling="mean")

_GPT2 = Architecture(
    embeddings="wte",
    positions="wpe",
    layers="h",
    attention="attn",
    output="attn.c_proj",
    feed_forward_norm="ln_2",
    feed_forward="mlp",
    final_norm="ln_f",
    pooling="last",
    value="attn.c_attn",
    input_norm="ln_1",
)

_T5 = Architecture(
    embeddings="embed_tokens",
    layers="block",
    attention="layer.0.SelfAttention",
    output="layer.0.SelfAttention.o",
    feed_forward_norm="layer.1.layer_norm",
    feed_forward="layer.1.DenseReluDense",
    final_norm="final_layer_norm",
    pooling="mean",
    value="layer.0.SelfAttention.v",
    input_norm="layer.0.layer_norm",
)

_VIT = Architecture(
    embeddings="embeddings",
    patches="embeddings.patch_embeddings.projection",
    layers="layers",
    attention="attention",
    output="attention.o_proj",
    feed_forward_norm="layernorm_after",
    feed_forward="mlp",
    final_norm="layernorm",
    value="attention.v_proj",
    input_norm="layernorm_before",
)
# As it was in transformers 5.0.
_VIT_OLD = replace(
    _VIT,
    layers="encoder.layer",
    attention="attention.attention",
    output="attention.output.dense",
    feed_forward="output.dense",
    value="attention.attention.value",
)

_BEIT = replace(
    _VIT, attention_layer_scale="lambda_1", feed_forward_layer_scale="lambda_2"
)
# With mean pooling the norm comes after it, in the head.
_BEIT_MEAN = replace(_BEIT, final_norm=None)

_DINOV2 = replace(
    _VIT,
    layers="encoder.layer",
    attention_layer_scale="layer_scale1.lambda1",
    feed_forward_norm="norm2",
    feed_forward_layer_scale="layer_scale2.lambda1",
    input_norm="norm1",
)
_DINOV2_OLD = replace(
    _DINOV2,
    attention="attention.attention",
    output="attention.output.dense",
    value="attention.attention.value",
)

_CLIP_VISION = Architecture(
    embeddings="embeddings",
    patches="embeddings.patch_embedding",
    layers="encoder.layers",
    attention="self_attn",
    output="self_attn.out_proj",
    feed_forward_norm="layer_norm2",
    feed_forward="mlp",
    value="self_attn.v_proj",
    input_norm="layer_norm1",
)
# Its post_layernorm sees the pooled token alone: a part of the head.
_SIGLIP_VISION = replace(_CLIP_VISION, final_norm="post_layernorm", pooling="mean")
_CLIP_TEXT = replace(
    _CLIP_VISION,
    patches=None,
    positions="embeddings.position_embedding",
    final_norm="final_layer_norm",
    pooling=None,
)
_SIGLIP_TEXT = replace(_CLIP_TEXT, pooling="last")

_TORCHVISION_VIT = Architecture(
    embeddings="encoder.dropout",
    patches="conv_proj",
    layers="encoder.layers",
    attention="self_attention",
    output="self_attention.out_proj",
    input_norm="ln_1",
    feed_forward_norm="ln_2",
    feed_forward="mlp",
    final_norm="encoder.ln",
)


def _torch_layouts(layers: str, norm: str | None) -> tuple[Architecture, ...]:
    """Torch's own layers: norms in front or behind, a final norm or none, ..."""
    layouts = []
    finals = (None,) if norm is None else (norm, None)
    for final, norm_first, batch_first in product(finals, (False, True), (True, False)):
        layouts.append(
            Architecture(
                layers=layers,
                attention="self_attn",
                output="self_attn.out_proj",
                feed_forward="linear2",
                attention_norm=None if norm_first else "norm1",
                output_norm=None if norm_first else "norm2",
                input_norm="norm1" if norm_first else None,
                feed_forward_norm="norm2" if norm_first else None,
                final_norm=final,
                pooling=None,
                batch_first=batch_first,
                only_if={
                    "norm_first": norm_first,
                    "self_attn.batch_first": batch_first,
                },
            )
        )
    return tuple(layouts)


#: Lists of torch's encoder layers have no class of their own.
TORCH_STACK = "a stack of torch.nn.TransformerEncoderLayer"

_MEAN_NOTE = "Without a head the tokens' mean is explained."
_DECODER_NOTE = "A decoder's head reads tokens beside the encoder: pass token_index."
#: model type, or name of a class → the family.
FAMILIES: dict[str, Family] = {
    "albert": Family(
        title="ALBERT",
        layouts=(_ALBERT,),
        positions="learned",
        note="One module serves as several layers.",
    ),
    "bert": Family(title="BERT", layouts=(_BERT,), positions="learned"),
    "transformers.models.bart.modeling_bart.BartEncoder": Family(
        title="BART, encoder",
        layouts=(_BART,),
        positions="learned",
        note=_DECODER_NOTE,
    ),
    "beit": Family(
        title="BEiT",
        layouts=(_BEIT, _BEIT_MEAN),
        positions="relative bias",
        since="5.9",
        note="With mean pooling the patches' mean is read.",
    ),
    "big_bird": Family(
        title="Big Bird",
        layouts=(_BIG_BIRD,),
        positions="learned",
        note='With attention_type="original_full"; sparse blocks are refused.',
    ),
    "camembert": Family(title="CamemBERT", layouts=(_BERT,), positions="learned"),
    "clip_text_model": Family(
        title="CLIP, text",
        layouts=(_CLIP_TEXT,),
        positions="learned",
        causal=True,
        note="The end-of-text token is read.",
    ),
    "clip_vision_model": Family(
        title="CLIP, vision",
        layouts=(_CLIP_VISION,),
        positions="learned",
        note="The norm after the pooled token counts to the head.",
    ),
    "data2vec-text": Family(
        title="Data2VecText", layouts=(_BERT,), positions="learned"
    ),
    "deberta": Family(
        title="DeBERTa",
        layouts=(_DEBERTA, replace(_DEBERTA, positions=None)),
        positions="disentangled",
        note="Attention weights are kept.",
    ),
    "deberta-v2": Family(
        title="DeBERTa v2 and v3",
        layouts=(_DEBERTA_V2, replace(_DEBERTA_V2, positions=None)),
        positions="disentangled",
        note="Attention weights are kept. A convolution after the first layer (xlarge) "
        "is refused.",
    ),
    "deit": Family(
        title="DeiT",
        layouts=(_VIT, _VIT_OLD),
        positions="learned",
        note="Heads for class and distillation token: both are explained.",
    ),
    "dinov2": Family(
        title="DINOv2",
        layouts=(_DINOV2, _DINOV2_OLD),
        positions="learned",
        note="A classifier reads the class token and the patches' mean.",
    ),
    "dinov2_with_registers": Family(
        title="DINOv2 with registers",
        layouts=(_DINOV2, _DINOV2_OLD),
        positions="learned",
        note="A classifier reads the class token and the patches' mean.",
    ),
    "distilbert": Family(
        title="DistilBERT", layouts=(_DISTILBERT,), positions="learned"
    ),
    "electra": Family(title="ELECTRA", layouts=(_BERT,), positions="learned"),
    "ernie": Family(title="ERNIE", layouts=(_BERT,), positions="learned"),
    "esm": Family(
        title="ESM", layouts=(_ESM, _ESM_ROTARY), positions="learned or rotary"
    ),
    "eurobert": Family(
        title="EuroBERT",
        layouts=(_EUROBERT,),
        positions="rotary",
        since="5.3",
        rms_norm=True,
        note="Grouped queries. " + _MEAN_NOTE,
    ),
    "gpt2": Family(title="GPT-2", layouts=(_GPT2,), positions="learned", causal=True),
    "layoutlm": Family(title="LayoutLM", layouts=(_BERT,), positions="learned"),
    "llama": Family(
        title="Llama",
        layouts=(_LLAMA,),
        positions="rotary",
        causal=True,
        rms_norm=True,
        note="Grouped queries.",
    ),
    "transformers.models.mbart.modeling_mbart.MBartEncoder": Family(
        title="mBART, encoder",
        layouts=(_MBART,),
        positions="learned",
        note=_DECODER_NOTE,
    ),
    "mistral": Family(
        title="Mistral",
        layouts=(_LLAMA,),
        positions="rotary",
        causal=True,
        rms_norm=True,
        note="Grouped queries, sliding window.",
    ),
    "modernbert": Family(
        title="ModernBERT",
        layouts=(_MODERNBERT,),
        positions="rotary",
        since="5.1",
        note="Local and global layers.",
    ),
    "mpnet": Family(
        title="MPNet",
        layouts=(_MPNET,),
        positions="learned and relative bias",
        note="Attention weights are kept.",
    ),
    "nomic_bert": Family(
        title="NomicBERT", layouts=(_NOMIC_BERT,), positions="rotary", since="5.5"
    ),
    "qwen2": Family(
        title="Qwen2",
        layouts=(_LLAMA,),
        positions="rotary",
        causal=True,
        rms_norm=True,
        note="Grouped queries.",
    ),
    "qwen3": Family(
        title="Qwen3",
        layouts=(_LLAMA,),
        positions="rotary",
        causal=True,
        rms_norm=True,
        note="Grouped queries; queries and keys are normed, too.",
    ),
    "roberta": Family(title="RoBERTa", layouts=(_BERT,), positions="learned"),
    "roberta-prelayernorm": Family(
        title="RoBERTa-PreLayerNorm",
        layouts=(_ROBERTA_PRELAYERNORM,),
        positions="learned",
    ),
    "roformer": Family(
        title="RoFormer",
        layouts=(
            replace(_ROFORMER, only_if={"attention.self.rotary_value": False}),
            # Values that are rotated are not what the map of values makes.
            replace(_ROFORMER, value=None),
        ),
        positions="rotary",
        note="Attention weights are kept.",
    ),
    "siglip_text_model": Family(
        title="SigLIP, text",
        layouts=(_SIGLIP_TEXT,),
        positions="learned",
        note="The last token is read.",
    ),
    "siglip_vision_model": Family(
        title="SigLIP, vision",
        layouts=(_SIGLIP_VISION,),
        positions="learned",
        note="The head attends to all patches.",
    ),
    "t5": Family(
        title="T5, encoder",
        layouts=(_T5,),
        positions="relative bias",
        since="5.15",
        rms_norm=True,
        note="Logits are not scaled. " + _MEAN_NOTE,
    ),
    "vit": Family(title="ViT", layouts=(_VIT, _VIT_OLD), positions="learned"),
    "xlm-roberta": Family(title="XLM-R", layouts=(_BERT,), positions="learned"),
    "xlm-roberta-xl": Family(
        title="XLM-R-XL", layouts=(_XLM_ROBERTA_XL,), positions="learned"
    ),
    "xlnet": Family(
        title="XLNet",
        layouts=(_XLNET,),
        positions="relative bias",
        note="Attention weights are kept. Without memories and target mapping.",
    ),
    "torch.nn.modules.transformer.TransformerEncoder": Family(
        title="torch.nn.TransformerEncoder",
        layouts=_torch_layouts("layers", "norm"),
        positions="any",
        note="Post-LN or norm_first.",
    ),
    TORCH_STACK: Family(
        title="torch.nn.TransformerEncoderLayer, alone or in a list",
        layouts=_torch_layouts("", None),
        positions="any",
        note="Post-LN or norm_first.",
    ),
    "torchvision.models.vision_transformer.VisionTransformer": Family(
        title="torchvision's VisionTransformer",
        layouts=(_TORCHVISION_VIT,),
        positions="learned",
    ),
}

#: Families that are known not to fit, each with the reason.
REFUSED: dict[str, str] = {
    "convbert": "mixes attention with convolutions over spans of tokens, so a layer's "
    "output is no sum of values weighted by attention",
    "fnet": "mixes tokens by Fourier transforms and has no attention weights",
    "funnel": "pools tokens between its blocks, so that its layers have different "
    "tokens and no rollout exists",
    "longformer": "attends within windows, with global tokens that have values of "
    "their own, so that what a token gives depends on who takes it",
    "squeezebert": "is made of grouped convolutions, with tokens in the last dimension",
}
