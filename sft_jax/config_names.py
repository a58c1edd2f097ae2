"""Config keys of other tools and of earlier versions, and the keys that replace them here."""

from __future__ import annotations

# Maps a key of another tool to the key used here, and to a note where the meaning differs.
NAMES: dict[str, tuple[str, str]] = {
    # earlier versions
    "gradient_accumulation_steps": (
        "training.num_microbatches",
        "it splits training.batch_size, which stays the global batch",
    ),
    "weights": ("model.param_dtype", ""),
    "token_table": ("lora.train_embeddings", ""),
    # TRL, transformers, PEFT
    "model_name_or_path": ("model.path", ""),
    "torch_dtype": ("model.dtype", ""),
    "bf16": ("model.dtype=bfloat16", "the default"),
    "fp16": ("model.dtype=bfloat16", "the default; float16 has too small a range"),
    "attn_implementation": ("model.attention", ""),
    "load_in_4bit": ("model.quantization=nf4", ""),
    "load_in_8bit": ("model.quantization=int8", ""),
    "gradient_checkpointing": ("model.remat", "auto is the default"),
    "r": ("lora.rank", ""),
    "lora_r": ("lora.rank", ""),
    "lora_alpha": ("lora.alpha", ""),
    "lora_dropout": ("lora.dropout", ""),
    "lora_target_modules": ("lora.target_modules", ""),
    "use_dora": ("lora.method=dora", ""),
    "modules_to_save": ("lora.train_embeddings=true", "for embed_tokens and lm_head"),
    "dataset_name": ("data.train", "a list of sources, each with a path"),
    "dataset_text_field": ("data.train.0.columns={text: COLUMN}", ""),
    "max_seq_length": ("data.max_length", ""),
    "assistant_only_loss": ("data.train_on=assistant", "the default"),
    "completion_only_loss": ("data.train_on=assistant", "the default"),
    "eos_token": ("data.stop_token", ""),
    "lr": ("optimizer.learning_rate", ""),
    "lr_scheduler_type": ("optimizer.schedule", ""),
    "adam_beta1": ("optimizer.b1", ""),
    "adam_beta2": ("optimizer.b2", ""),
    "adam_epsilon": ("optimizer.eps", ""),
    "gradient_clipping": ("optimizer.max_grad_norm", ""),
    "warmup_steps": ("optimizer.warmup_ratio", "a fraction of all steps"),
    "per_device_train_batch_size": ("training.batch_size", "sequences per step over all devices"),
    "train_batch_size": ("training.batch_size", "sequences per step over all devices"),
    "eval_steps": ("training.eval_every", ""),
    "save_steps": ("training.save_every", ""),
    "logging_steps": ("training.log_every", ""),
    "save_total_limit": ("training.keep_checkpoints", ""),
    "router_aux_loss_coef": (
        "training.router_aux_loss",
        "a mean over layers; balanced experts have the number per token",
    ),
    "output_router_logits": ("training.router_aux_loss", "0 leaves the load-balancing loss out"),
    "report_to": (
        "training.tensorboard, training.wandb_project, training.mlflow_experiment, training.trackio_project",
        "",
    ),
    "logging_dir": ("training.output_dir", "TensorBoard's files are in its folder tensorboard"),
    # Axolotl, LLaMA-Factory, Unsloth
    "base_model": ("model.path", ""),
    "adapter": ("lora", "null is full fine-tuning, model.quantization makes it QLoRA"),
    "finetuning_type": ("lora", "null is full fine-tuning, model.quantization makes it QLoRA"),
    "lora_rank": ("lora.rank", ""),
    "lora_target": ("lora.target_modules", ""),
    "lora_target_linear": ("lora.target_modules=all-linear", ""),
    "datasets": ("data.train", "a list of sources, each with a path"),
    "dataset": ("data.train", "a list of sources, each with a path"),
    "sequence_len": ("data.max_length", ""),
    "cutoff_len": ("data.max_length", ""),
    "sample_packing": ("data.packing", ""),
    "train_on_inputs": ("data.train_on=all", ""),
    "template": ("data.chat_template", "a Jinja file"),
    "micro_batch_size": ("training.batch_size", "sequences per step over all devices, split into num_microbatches"),
    "num_epochs": ("training.num_train_epochs", ""),
    "epochs": ("training.num_train_epochs", ""),
}
# Names that also exist here, but in a section.
for _section, _names in {
    "optimizer": ("learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio", "optim"),
    "training": ("num_train_epochs", "max_steps", "batch_size", "output_dir", "seed", "num_microbatches", "run_name"),
    "data": ("packing", "max_length", "chat_template", "train_on", "streaming"),
    "model": ("dtype", "attention", "quantization", "remat"),
    "lora": ("rank", "alpha", "target_modules"),
}.items():
    for _name in _names:
        NAMES.setdefault(_name, (f"{_section}.{_name}", ""))
# Keys whose work is that of a command, and the command.
_PUSH = "sft-jax export RUN OUT --push USER/REPO"
COMMANDS = {
    "push_to_hub": _PUSH,
    "hub_model_id": _PUSH,
    "hub_strategy": _PUSH,
    "hub_private_repo": f"{_PUSH}, which creates private repositories unless --public is given",
    "hub_token": "hf auth login, or set HF_TOKEN; no token belongs into a config",
}
# What a section is taken for if it is given a single value.
SECTIONS = {"model": "model.path", "data": "data.train", "lora": "lora.rank", "optimizer": "optimizer.name"}
NAMES["optim"] = ("optimizer.name", "adamw; optimizer.moments for 8 bits and less")


def suggest_key(key: str) -> str | None:
    """The key to use instead of an unknown one, looked up by its last part; None if no known tool has it.

    >>> suggest_key("training.per_device_train_batch_size")
    'use training.batch_size, sequences per step over all devices'
    """
    name = key.rpartition(".")[2]
    if name in COMMANDS:
        return f"after training, run {COMMANDS[name]}"
    if name not in NAMES or NAMES[name][0] == key:
        return None
    replacement, note = NAMES[name]
    return f"use {replacement}" + (f", {note}" if note else "")
