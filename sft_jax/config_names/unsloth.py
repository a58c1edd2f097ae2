"""Arguments of Unsloth's functions."""

KEYS: dict[str, tuple[str, str]] = {
    "model_name": ("model.path", ""),
    "full_finetuning": ("lora=null", ""),
    "use_gradient_checkpointing": ("model.remat", "auto is the default"),
    "random_state": ("training.seed", ""),
    "instruction_part": ("data.train_on=assistant", "the default; the turns are found by rendering the template"),
    "response_part": ("data.train_on=assistant", "the default; the turns are found by rendering the template"),
    "finetune_language_layers": ("lora.target_modules", ""),
    "finetune_vision_layers": ("", "only the text decoder is trained"),
    "finetune_attention_modules": ("lora.target_modules", "such as [q_proj, k_proj, v_proj, o_proj]"),
    "finetune_mlp_modules": ("lora.target_modules", "such as [gate_proj, up_proj, down_proj]"),
    "embedding_learning_rate": ("optimizer.learning_rate", "all trained weights have the same rate"),
    "save_method": ("", "use sft-jax export --format adapter or merged"),
    "quantization_method": ("", "llama.cpp converts what sft-jax export --format merged writes"),
}
