"""The table of families that tests go through: a new family adds a row."""

import torch
import transformers

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 42,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FALCON_H1 = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "mamba_d_ssm": 40,
    "mamba_n_heads": 4,
    "mamba_d_head": 10,
    "mamba_d_state": 12,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "embedding_multiplier": 5.0,
    "lm_head_multiplier": 0.5,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.9,
    "key_multiplier": 0.4,
    "mlp_multipliers": [0.8, 0.7],
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.6,
    "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7],
}
# torch's grouped products want multiples of 4.
EXPERTS = {"hidden_size": 48, "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"hidden_size": 48, "intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2}
GRANITE = {
    "hidden_size": 48,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
}
GRANITE_HYBRID = GRANITE | {
    "shared_intermediate_size": 28,
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 10,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "mamba_conv_bias": False,
    "mamba_proj_bias": True,
}
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 7,
}
NEMOTRON_H = EXPERTS | {
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 10,
    "n_groups": 3,
    "conv_kernel": 3,
}
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT |= {"image_size": 28, "patch_size": 14}
# Multimodal models by model_type, and their configs except for that of the decoder.
MULTIMODAL = {
    "gemma3": {"vision_config": SIGHT, "mm_tokens_per_image": 1},
    "mistral3": {"vision_config": SIGHT | {"model_type": "pixtral", "head_dim": 8}, "tie_word_embeddings": False},
    "qwen3_5": {
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 42,
            "num_position_embeddings": 16,
        },
        "tie_word_embeddings": True,
    },
}
# A row for each family, and for each kind of it: the class of transformers, and changes of SHAPE. Multimodal
# models have their model_type there, and the changes are those of the decoder.
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 6, "head_dim": 8}),
    "llama3": ("Llama", {"head_dim": 10, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "Llama",
        {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-yarn": ("Llama", {"head_dim": 16, "rope_parameters": YARN_ROPE}),
    "llama-yarn-as-deepseek": (
        "Llama",
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e5,
                "factor": 8.0,
                "original_max_position_embeddings": 50,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        },
    ),
    "llama-dynamic-rope": (
        "Llama",
        {"head_dim": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-biases": ("Llama", {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 14, "sliding_window": 9}),
    "mistral-no-window": ("Mistral", {"head_dim": 10, "sliding_window": None}),
    "qwen2": ("Qwen2", {"hidden_size": 48, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2",
        {"hidden_size": 48, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "gemma3_text": (
        "Gemma3Text",
        {
            "head_dim": 10,
            "num_hidden_layers": 8,
            "sliding_window": 9,
            "query_pre_attn_scalar": 18,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma4_text": (
        "Gemma4Text",
        {
            "head_dim": 10,
            "global_head_dim": 14,
            "num_hidden_layers": 7,
            "num_global_key_value_heads": 3,
            "attention_k_eq_v": True,
            "sliding_window": 9,
            "vocab_size_per_layer_input": 137,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma4_text-shared": (
        "Gemma4Text",
        {
            "head_dim": 10,
            "global_head_dim": 16,
            "num_hidden_layers": 6,  # each layer amplifies the rounding of those before
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "sliding_window": 9,
            "vocab_size_per_layer_input": 137,
            "hidden_size_per_layer_input": 12,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "head_dim": 10,
            "sliding_window": 9,
            "query_pre_attn_scalar": 18,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma": ("Gemma", {"head_dim": 10, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 10, "sliding_window": 9, "query_pre_attn_scalar": 18, "tie_word_embeddings": True},
    ),
    "olmo": ("Olmo", {"hidden_size": 48}),
    "olmo2": ("Olmo2", {"hidden_size": 48}),
    "olmo3": ("Olmo3", {"hidden_size": 48, "num_hidden_layers": 5, "sliding_window": 9}),
    "exaone4": (
        "Exaone4",
        {"hidden_size": 48, "num_hidden_layers": 5, "sliding_window": 9, "sliding_window_pattern": 4},
    ),
    "smollm3": (
        "SmolLM3",
        {"hidden_size": 48, "num_hidden_layers": 5, "no_rope_layers": [1, 1, 0, 1, 0], "pad_token_id": 0},
    ),
    "granite": ("Granite", GRANITE),
    "cohere2": ("Cohere2", {"hidden_size": 48, "num_hidden_layers": 5, "sliding_window": 9, "logit_scale": 0.7}),
    "stablelm": ("StableLm", {"hidden_size": 48, "partial_rotary_factor": 0.5}),
    "stablelm-parallel": ("StableLm", {"hidden_size": 48, "use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2", {"hidden_size": 48, "sliding_window": 9, "tie_word_embeddings": True}),
    "seed_oss": ("SeedOss", {"head_dim": 10}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 10, "tie_word_embeddings": True}),
    "arcee": ("Arcee", {"head_dim": 10}),
    "nemotron": ("Nemotron", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "helium": ("Helium", {"hidden_size": 48, "head_dim": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 10}),
    "ministral": ("Ministral", {"head_dim": 10, "sliding_window": 9}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 10,
            "rope_parameters": {
                **YARN_ROPE,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
    ),
    "mistral3-ministral3": ("mistral3", {"model_type": "ministral3", "head_dim": 10}),
    "mistral3": ("mistral3", {"model_type": "mistral", "head_dim": 14, "sliding_window": None}),
    "phi": ("Phi", {"hidden_size": 48, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {"hidden_size": 48, "sliding_window": 9, "pad_token_id": 0}),
    "phi3-longrope": (
        "Phi3",
        {
            "hidden_size": 48,
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2],
                "long_factor": [2.0, 2.3, 3.0],
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "gpt_neox": ("GPTNeoX", {"hidden_size": 48, "num_key_value_heads": None, "rotary_pct": 0.5}),
    "gpt_neox-serial": ("GPTNeoX", {"hidden_size": 48, "num_key_value_heads": None, "use_parallel_residual": False}),
    "gpt2": ("GPT2", {"hidden_size": 48, "num_key_value_heads": None}),
    "glm": ("Glm", {"head_dim": 12, "pad_token_id": 0}),
    "glm4": ("Glm4", {"head_dim": 12, "pad_token_id": 0}),
    "apertus": ("Apertus", {"hidden_size": 48}),
    "mixtral": ("Mixtral", LOCAL_EXPERTS | {"head_dim": 10, "sliding_window": None}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 28}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 12, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "olmoe": ("Olmoe", EXPERTS | {"intermediate_size": 20, "pad_token_id": 0}),
    "phimoe": ("Phimoe", LOCAL_EXPERTS | {"attention_bias": True, "lm_head_bias": True}),
    "granitemoe": ("GraniteMoe", GRANITE | LOCAL_EXPERTS),
    "glm4_moe": (
        "Glm4Moe",
        EXPERTS
        | {
            "head_dim": 12,
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        EXPERTS | {"head_dim": 12, "moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 2},
    ),
    "minimax_m2": ("MiniMaxM2", LOCAL_EXPERTS | {"head_dim": 12, "rotary_dim": 6}),
    "qwen3_5_text": (
        "Qwen3_5Text",
        {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
        | GATED_DELTA,
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeText",
        EXPERTS | GATED_DELTA | {"head_dim": 8, "shared_expert_intermediate_size": 28},
    ),
    "qwen3_next": (
        "Qwen3Next",
        EXPERTS | GATED_DELTA | {"head_dim": 8, "shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
    ),
    "qwen3_5": (
        "qwen3_5",
        {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
        | GATED_DELTA,
    ),
    "olmo_hybrid-nope": (
        "OlmoHybrid",
        {
            "hidden_size": 48,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "rope_parameters": None,
            "pad_token_id": 0,
            "linear_allow_neg_eigval": False,
        },
    ),
    "olmo_hybrid": (
        "OlmoHybrid",
        {
            "hidden_size": 48,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "pad_token_id": 0,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 13,
        },
    ),
    "lfm2": (
        "Lfm2",
        {
            "hidden_size": 48,
            "num_hidden_layers": 5,
            "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
            "conv_L_cache": 4,
            "conv_bias": True,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.3,
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        EXPERTS
        | {
            "layer_types": ["conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        GRANITE_HYBRID
        | {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            "num_local_experts": 0,
            "position_embedding_type": "rope",
        },
    ),
    "granitemoehybrid-experts": (
        "GraniteMoeHybrid",
        GRANITE_HYBRID | LOCAL_EXPERTS | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "falcon_h1": ("FalconH1", FALCON_H1),
    "falcon_h1-norm": (
        "FalconH1",
        FALCON_H1 | {"mamba_rms_norm": True, "time_step_limit": (0.05, 1.4), "projectors_bias": True},
    ),
    "falcon_h1-norm-after-gate": ("FalconH1", FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "nemotron_h": (
        "NemotronH",
        NEMOTRON_H
        | {
            "head_dim": 10,
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
            "use_bias": True,
        },
    ),
    "nemotron_h-experts": (
        "NemotronH",
        NEMOTRON_H
        | {
            "head_dim": 8,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "moe_latent_size": 20,
            "moe_shared_expert_intermediate_size": 28,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3-tied": (
        "Qwen3",
        {"head_dim": 6, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
}


def reference(name: str, folder, shard: str | None = None):
    """The random model of a row, of transformers, saved in a folder."""
    kind, changes = FAMILIES[name]
    if kind in MULTIMODAL:
        config = transformers.AutoConfig.for_model(kind, text_config=SHAPE | changes, **MULTIMODAL[kind])
        auto = transformers.AutoModelForImageTextToText
    else:
        config = getattr(transformers, f"{kind}Config")(**(SHAPE | changes))
        auto = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for path, parameter in model.named_parameters():
        mean, stddev = (1.0, 0.3) if parameter.ndim == 1 else (0.0, 0.1)
        if path.endswith("A_log"):  # a recurrence that remembers; norms of what one token leaves would amplify rounding
            mean = -3.0
        if path.endswith("norm.weight") and not parameter.any():  # 1 is added to it
            mean = 0.0
        torch.nn.init.normal_(parameter, mean, stddev)
    for path, buffer in model.named_buffers():
        if path.endswith("bias"):  # corrections of routers
            torch.nn.init.normal_(buffer, 0.0, 0.1)
        if path.endswith("layer_scalar"):
            torch.nn.init.normal_(buffer, 1.0, 0.3)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model
