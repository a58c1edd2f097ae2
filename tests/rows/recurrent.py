"""Rows of families with recurrent mixers."""

from rows.sizes import EXPERTS, GATED_DELTA, GRANITE, LOCAL_EXPERTS

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
NEMOTRON_H = EXPERTS | {
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 10,
    "n_groups": 3,
    "conv_kernel": 3,
}

ROWS = {
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
}
