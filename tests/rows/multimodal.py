"""Rows of multimodal models, whose changes are those of the decoder."""

from rows.experts import LLAMA4
from rows.sizes import EXPERTS, GATED_DELTA

SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT |= {"image_size": 28, "patch_size": 14}
# The configs of whole models by model_type, except for that of the decoder.
WHOLE = {
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
    "gemma4": {
        "vision_config": SIGHT | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        "audio_config": None,
        "image_token_id": 130,
        "video_token_id": 129,
        "audio_token_id": 128,
    },
}
WHOLE["llama4"] = {
    "vision_config": SIGHT
    | {
        "intermediate_size": 16,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "pixel_shuffle_ratio": 0.5,
    },
}
WHOLE["qwen3_5_moe"] = WHOLE["qwen3_5"]
ROWS = {
    "gemma3": (
        "gemma3",
        {
            "head_dim": 10,
            "sliding_window": 9,
            "query_pre_attn_scalar": 18,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral3": ("mistral3", {"model_type": "mistral", "head_dim": 14, "sliding_window": None}),
    "qwen3_5": (
        "qwen3_5",
        {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
        | GATED_DELTA,
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        EXPERTS | GATED_DELTA | {"head_dim": 8, "shared_expert_intermediate_size": 28},
    ),
    "llama4": ("llama4", LLAMA4),
    "gemma4": (
        "gemma4",
        {
            "head_dim": 10,
            "global_head_dim": 14,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "vocab_size_per_layer_input": 131,
            "hidden_size_per_layer_input": 12,
            "num_kv_shared_layers": 0,
        },
    ),
}
