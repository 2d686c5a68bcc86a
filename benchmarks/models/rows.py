"""Which models the sweep builds: causal language models of transformers, wrappers around one, published conditions."""

from __future__ import annotations


def _names(text: str) -> list[str]:
    return text.split()


FIRST = _names(  # in order of use in 2025-2026
    """
    qwen3 qwen3_moe qwen3_5+vl qwen3_5_moe+vl qwen3_next llama gpt_oss deepseek_v3 deepseek_v32 deepseek_v4
    kimi_k25+vl kimi_linear glm4_moe glm4_moe_lite glm_moe_dsa glm5_next+vl minimax_m2 minimax_m3_vl+vl gemma3+vl
    gemma3_text gemma4+vl gemma4_text mistral3+vl mistral ministral3 qwen2 qwen2_5_vl+vl qwen2_vl+vl qwen3_vl+vl
    qwen3_vl_moe+vl phi3 llama4+vl llama4_text nemotron_h nemotron_h_omni+vl granitemoehybrid granite lfm2 lfm2_moe
    lfm3 ernie4_5_moe ernie4_5 hunyuan_v1_moe hunyuan_v1_dense hy_v3 hy_v4 dots1 dots3_note step3p7+vl seed_oss olmo3
    smollm3 exaone4 exaone_moe qwen3_omni_moe_thinker+vl glm4 glm4v+vl glm4v_moe+vl internvl+vl llava+vl gemma3n+vl
    gemma3n_text mixtral phimoe cohere2 cohere2_moe falcon_h1 bamba jamba dbrx qwen2_moe olmoe olmo2 mimo_v2_flash
    longcat_flash bailing_hybrid minimax qwen3_5_text qwen3_5_moe_text qwen4_exp_text mistral4+vl mistral_large4+vl
    gemma2 gemma phi deepseek_v2 minicpm3 apertus afmoe laguna solar_open arcee
    """
)

MULTIMODAL = _names(  # "NAME+vl": wrappers with a decoder that people quantize
    """
    gemma3 gemma3n gemma4 gemma4_unified qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp
    qwen3_omni_moe_thinker qwen2_5_omni_thinker mistral3 mistral4 mistral_large4 llava llava_next llava_onevision
    internvl llama4 mllama glm4v glm46v glm4v_moe glm5_next glm_ocr kimi_k25 step3p7 minimax_m3_vl nemotron_h_omni
    ernie4_5_vl_moe exaone4_5 aya_vision cohere2_vision cohere_compass deepseek_vl deepseek_vl_hybrid deepseek_ocr2
    granite4_vision hunyuan_vl idefics3 smolvlm lfm2_vl lfm3_vl minicpmv4_6 minicpmv4_7 molmo2 muse_glimmer muse_spark
    ovis2 paddleocr_vl paligemma perception_lm aria dots3_note inkling2 inkling_mm_model qianfan_ocr video_llama_3
    fast_vlm janus chameleon emu3 idefics2 lighton_ocr got_ocr2 hyperclovax_vision_v2 qwen2_audio voxtral
    granite_speech phi4_multimodal
    """
)

CONDITIONS = _names(  # checkpoints as their makers publish them
    """
    deepseek_v3@fp8 deepseek_v3@mtp glm4_moe@mtp qwen3@fp8 qwen3_moe@fp8 minimax_m2@fp8 gpt_oss@mxfp4 qwen3_next@mtp
    mistral@fp8tensor deepseek_v3@kimi_k2 qwen3_moe@4bit qwen3_moe@sharded llama@bin gemma3_text@vlprefix
    qwen3_moe@fused qwen3_5_moe_text@fused gemma4_text@moe gemma4_text@nople granitemoehybrid@dense
    """
)
VARIANTS = {  # the same model type, another configuration
    "gemma4_text@moe": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4_text@nople": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid@dense": {"num_local_experts": 0},
}


def rows() -> list[str]:
    """Every row: the most used models, then the conditions, then whatever else transformers builds."""
    from transformers.models.auto import modeling_auto as auto

    every = list(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + [f"{name}+vl" for name in MULTIMODAL]
    return list(dict.fromkeys([name for name in FIRST if name in every] + list(CONDITIONS) + every))
