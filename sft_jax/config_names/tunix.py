"""Fields of Tunix's TrainingConfig and of Qwix's LoraProvider."""

KEYS: dict[str, tuple[str, str]] = {
    "eval_every_n_steps": ("training.eval_every", ""),
    "checkpoint_root_directory": ("training.output_dir", ""),
    "checkpointing_options": ("training.save_every", "and keep_checkpoints"),
    "save_interval_steps": ("training.save_every", ""),
    "max_to_keep": ("training.keep_checkpoints", ""),
    "metrics_logging_options": ("training.log_every", "and tensorboard, wandb_project"),
    "profiler_options": ("", "jax.profiler works around sft_jax.train"),
    "data_sharding_axis": ("mesh", "the axes data, fsdp, sequence and tensor"),
    "max_inflight_computations": ("", "the loop runs one step ahead of the device"),
    "module_path": ("lora.target_modules", "names instead of a regular expression"),
    "weight_qtype": ("model.quantization", "nf4 or int8"),
    "tile_size": ("model.quantization", "the block size is fixed"),
    "loss_fn": ("", "cross-entropy of the supervised tokens"),
}
