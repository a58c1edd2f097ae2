"""Rows of dense families with attention."""

from rows.sizes import GRANITE

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

ROWS = {
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
    "nanochat": ("NanoChat", {"head_dim": 10}),
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
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3-tied": (
        "Qwen3",
        {"head_dim": 6, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
}
