"""Rows of families with experts and attention."""

from rows.sizes import EXPERTS, GRANITE, LOCAL_EXPERTS

WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

LLAMA4 = LOCAL_EXPERTS | {
    "num_experts_per_tok": 1,
    "head_dim": 12,
    "intermediate_size_mlp": 36,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 16,
    "floor_scale": 20,
    "no_rope_layers": [1, 0, 1],
}

ROWS = {
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
    "dots1": (
        "Dots1",
        EXPERTS
        | {
            "head_dim": 12,
            "sliding_window": 9,
            "max_window_layers": 2,
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        EXPERTS | {"head_dim": 12, "moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 2},
    ),
    "minimax_m2": ("MiniMaxM2", LOCAL_EXPERTS | {"head_dim": 12, "rotary_dim": 6}),
    "gemma4_text-experts": (
        "Gemma4Text",
        {
            "hidden_size": 48,
            "head_dim": 10,
            "global_head_dim": 14,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "vocab_size_per_layer_input": 137,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 20,
        },
    ),
    "gpt_oss": ("GptOss", LOCAL_EXPERTS | {"head_dim": 12, "sliding_window": 9, "layer_types": WINDOWS}),
    "llama4_text": ("Llama4Text", LLAMA4),
    "deepseek_v3": (
        "DeepseekV3",
        EXPERTS
        | {
            "num_key_value_heads": 6,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 6,
            "v_head_dim": 10,
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
}
