"""Modules of well-known libraries whose forward reads the weights of layers below them, by the end of the class's name.

A class of transformers is known by its name alone, so that code that comes with a checkpoint is known too. A class of
another package is known by its full name. A layer that is listed and only called does no harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

READERS: Mapping[str, str] = {
    "torch.nn.modules.activation.MultiheadAttention": "out_proj",
    "WavLMAttention": "q_proj k_proj v_proj out_proj",
    # Mixers whose convolution is a kernel's or a cache's, and whose last product is the kernel's.
    "MambaMixer": "conv1d norm dt_proj x_proj out_proj b_layernorm c_layernorm dt_layernorm",
    "BambaMixer FalconH1Mixer GraniteMoeHybridMambaLayer Mamba2Mixer": "conv1d norm out_proj",
    "DeltaAttention GatedDeltaNet LinearAttention ShortConvolution": "conv1d",
    "ShortConv": "conv",
    "RecurrentGemmaRecurrentBlock": "conv_1d",
    "TDNNLayer": "kernel",
    # Linear layers whose weight is multiplied by, beside others or in parts.
    "MobileBertLMPredictionHead": "dense decoder",
    "BloomAttention BloomMLP": "dense dense_4h_to_h",
    "DisentangledSelfAttention": "in_proj",
    "LSHSelfAttention": "query_key value",
    "DetrMHAttentionMap": "k_proj k_linear",
    "LongcatFlashTopkRouter": "classifier",
    "Gemma3nTextAltUp": "correction_coefs prediction_coefs",
    "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM": "lm_head",
    "NeoMMEForMaskedLM": "unembedding_projection",
    "LayoutLMv2Encoder LayoutLMv3Encoder ReadingOrderEncoder": "rel_pos_bias rel_pos_x_bias rel_pos_y_bias",
    "timm.models.beit.Attention timm.models.eva.EvaAttention": "qkv",
    "timm.models.swin_transformer_v2.WindowAttention": "qkv",
    "timm.models.mobilevit.LinearSelfAttention": "qkv_proj",
    "torchvision.models.swin_transformer.ShiftedWindowAttention": "qkv proj",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": "qkv proj",
    "open_clip.modified_resnet.AttentionPool2d clip.model.AttentionPool2d": "q_proj k_proj v_proj c_proj",
    # Tables that are used whole.
    "VisionEmbeddings VisionPatchEmbed": "position_embedding",
    "AudioFlamingo3Encoder MossTranscribeDiarizeAudioModel Qwen2AudioEncoder VoxtralEncoder": "embed_positions",
    "RelativePositionBiasBase": "relative_attention_bias",
    "DebertaEncoder DebertaV2Encoder SEWDTransformerEncoder": "rel_embeddings",
    "ProphetNetDecoder": "ngram_embeddings",
    "DebertaForMaskedLM DebertaV2ForMaskedLM": "deberta.embeddings.word_embeddings",
    "PerceiverForMaskedLM": "perceiver.input_preprocessor.embeddings",
    "Gemma4Model DiffusionGemmaDecoderModel": "language_model.embed_tokens embed_tokens",
    "ConditionalDetrModel DeformableDetrModel DetrModel TableTransformerModel": "query_position_embeddings",
    "GroundingDinoModel MMGroundingDinoModel": "query_position_embeddings reference_points",
    "DetrForSegmentation": "detr.model.query_position_embeddings conditional_detr.model.query_position_embeddings",
    "DabDetrModel LwDetrModel RfDetrModel": "patterns query_refpoint_embeddings query_feat reference_point_embed",
    "OmDetTurboDecoder": "tgt_embed",
    "FormerTransformerModule": "level_embed queries_embedder queries_features",
    "OneFormerTextMapper": "prompt_ctx",
    "EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation VideomtForUniversalSegmentation": "query",
    "DeepseekOcr2VisionModel": "query_1024_resolution query_768_resolution",
    "Sam3GeometryEncoder Sam3LiteTextGeometryEncoder": "cls_embed",
    "Sam3DetrDecoder Sam3LiteTextDetrDecoder": "presence_token query_embed reference_points",
    "MaskDecoder": "iou_token mask_tokens hq_token obj_score_token",
    "PromptEncoder": "no_mask_embed not_a_point_embed point_embed point_embed.0 point_embed.1 point_embed.2 "
    "point_embed.3",
    "DacVectorQuantize": "codebook",
    "VQVAEVectorQuantizer": "embedding",
    "timm.layers.ml_decoder.MLDecoder": "query_embed",
}


@cache
def known(name: str) -> tuple[str, ...]:
    """The layers that a class of this name reads: paths below it."""
    found = [layers for ends, layers in READERS.items() if name.endswith(tuple(ends.split()))]
    return tuple(layer for layers in found for layer in layers.split())
