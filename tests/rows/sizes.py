"""Sizes that rows share; they are unusual on purpose."""

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 42,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
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
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 7,
}
