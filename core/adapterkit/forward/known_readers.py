"""Modules of well-known libraries whose forward reads the weights of layers below them, by class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# `(layers, classes)`. A class of transformers is known by its name alone, so that code that comes with a checkpoint is
# known too. A class of another package is known by its full name.
_READERS: Sequence[tuple[str, str]] = (
    ("out_proj", "torch.nn.modules.activation.MultiheadAttention"),
    ("q_proj k_proj v_proj out_proj", "WavLMAttention"),
    # Mixers whose convolution is a kernel's or a cache's, and whose last product is the kernel's.
    ("conv1d dt_proj x_proj out_proj", "MambaMixer"),
    ("conv1d dt_proj x_proj out_proj b_layernorm c_layernorm dt_layernorm", "FalconMambaMixer"),
    ("conv1d dt_proj", "JambaMambaMixer"),
    (
        "conv1d norm out_proj",
        "BambaMixer FalconH1Mixer GraniteMoeHybridMambaLayer Mamba2Mixer NemotronHMamba2Mixer Zamba2MambaMixer",
    ),
    (
        "conv1d",
        "BailingHybridDeltaAttention Glm5NextTextLinearAttention Inkling2ShortConvolution InklingShortConvolution "
        "KimiLinearDeltaAttention OlmoHybridGatedDeltaNet Qwen3NextGatedDeltaNet Qwen3_5GatedDeltaNet "
        "Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet ZambaMambaMixer",
    ),
    ("conv", "Lfm2MoeShortConv Lfm2ShortConv Lfm3ShortConv"),
    ("conv_1d", "RecurrentGemmaRecurrentBlock"),
    ("kernel", "TDNNLayer"),
    # Linear layers whose weight is multiplied by, beside others or in parts.
    ("dense decoder", "MobileBertLMPredictionHead"),
    ("dense", "BloomAttention"),
    ("dense_4h_to_h", "BloomMLP"),
    ("in_proj", "DisentangledSelfAttention"),
    ("query_key value", "LSHSelfAttention"),
    ("k_proj", "ConditionalDetrMHAttentionMap DetrMHAttentionMap MaskFormerDetrMHAttentionMap"),
    ("k_linear", "DabDetrMHAttentionMap"),
    ("classifier", "LongcatFlashTopkRouter"),
    ("correction_coefs prediction_coefs", "Gemma3nTextAltUp"),
    ("lm_head", "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM"),
    ("unembedding_projection", "NeoMMEForMaskedLM"),
    ("rel_pos_bias rel_pos_x_bias rel_pos_y_bias", "LayoutLMv2Encoder LayoutLMv3Encoder"),
    ("rel_pos_bias", "PPDocLayoutV2ReadingOrderEncoder"),
    ("qkv", "timm.models.beit.Attention timm.models.eva.EvaAttention timm.models.swin_transformer_v2.WindowAttention"),
    ("qkv_proj", "timm.models.mobilevit.LinearSelfAttention"),
    (
        "qkv proj",
        "torchvision.models.swin_transformer.ShiftedWindowAttention "
        "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
    ),
    ("q_proj k_proj v_proj c_proj", "open_clip.modified_resnet.AttentionPool2d clip.model.AttentionPool2d"),
    # Tables that are used whole.
    (
        "position_embedding",
        "AltCLIPVisionEmbeddings BridgeTowerVisionEmbeddings CLIPSegVisionEmbeddings CLIPVisionEmbeddings "
        "ChineseCLIPVisionEmbeddings Cosmos3EdgeVisionEmbeddings GitVisionEmbeddings Glm4vMoeVisionEmbeddings "
        "Glm4vVisionEmbeddings GlmImageVisionEmbeddings GraniteDoclingVisionEmbeddings HunYuanVLVisionPatchEmbed "
        "JanusVisionEmbeddings Kosmos2VisionEmbeddings MLCDVisionEmbeddings MetaClip2VisionEmbeddings "
        "OwlViTVisionEmbeddings Owlv2VisionEmbeddings Phi4MultimodalVisionEmbeddings Siglip2VisionEmbeddings "
        "SiglipVisionEmbeddings Step3p7VisionEmbeddings UnlimitedOcrVisionEmbeddings XCLIPVisionEmbeddings",
    ),
    ("embed_positions", "AudioFlamingo3Encoder MossTranscribeDiarizeAudioModel Qwen2AudioEncoder VoxtralEncoder"),
    ("relative_attention_bias", "RelativePositionBiasBase"),
    ("rel_embeddings", "DebertaEncoder DebertaV2Encoder SEWDTransformerEncoder"),
    ("ngram_embeddings", "ProphetNetDecoder"),
    ("deberta.embeddings.word_embeddings", "DebertaForMaskedLM DebertaV2ForMaskedLM"),
    ("perceiver.input_preprocessor.embeddings", "PerceiverForMaskedLM"),
    ("language_model.embed_tokens", "Gemma4Model"),
    ("embed_tokens", "DiffusionGemmaDecoderModel"),
    (
        "query_position_embeddings",
        "ConditionalDetrModel DeformableDetrModel DetrModel TableTransformerModel",
    ),
    ("query_position_embeddings reference_points", "GroundingDinoModel MMGroundingDinoModel"),
    ("detr.model.query_position_embeddings", "DetrForSegmentation"),
    ("conditional_detr.model.query_position_embeddings", "ConditionalDetrForSegmentation"),
    ("patterns query_refpoint_embeddings", "DabDetrModel"),
    ("query_feat reference_point_embed", "LwDetrModel RfDetrModel"),
    ("tgt_embed", "OmDetTurboDecoder"),
    ("queries_embedder", "MaskFormerTransformerModule"),
    ("level_embed queries_embedder queries_features", "Mask2FormerTransformerModule"),
    ("level_embed queries_embedder", "OneFormerTransformerModule"),
    ("prompt_ctx", "OneFormerTextMapper"),
    ("query", "EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation VideomtForUniversalSegmentation"),
    ("query_1024_resolution query_768_resolution", "DeepseekOcr2VisionModel"),
    ("cls_embed", "Sam3GeometryEncoder Sam3LiteTextGeometryEncoder"),
    ("presence_token query_embed reference_points", "Sam3DetrDecoder Sam3LiteTextDetrDecoder"),
    ("iou_token mask_tokens hq_token", "SamHQMaskDecoder"),
    ("iou_token mask_tokens", "SamMaskDecoder"),
    (
        "iou_token mask_tokens obj_score_token",
        "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder Sam3TrackerMaskDecoder "
        "Sam3TrackerVideoMaskDecoder",
    ),
    (
        "no_mask_embed not_a_point_embed point_embed",
        "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder Sam2VideoPromptEncoder "
        "Sam3TrackerPromptEncoder Sam3TrackerVideoPromptEncoder",
    ),
    (
        "no_mask_embed not_a_point_embed point_embed.0 point_embed.1 point_embed.2 point_embed.3",
        "SamHQPromptEncoder SamPromptEncoder",
    ),
    ("codebook", "DacVectorQuantize"),
    (
        "embedding",
        "ChameleonVQVAEVectorQuantizer Emu3VQVAEVectorQuantizer GlmImageVQVAEVectorQuantizer JanusVQVAEVectorQuantizer",
    ),
    ("query_embed", "timm.layers.ml_decoder.MLDecoder"),
)

READERS: Mapping[str, tuple[str, ...]] = {
    name: tuple(layers.split()) for layers, names in _READERS for name in names.split()
}
