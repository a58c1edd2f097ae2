"""Keys of earlier versions of this package."""

KEYS: dict[str, tuple[str, str]] = {
    "gradient_accumulation_steps": (
        "training.num_microbatches",
        "it splits training.batch_size, which stays the global batch",
    ),
    "weights": ("model.param_dtype", ""),
    "token_table": ("lora.train_embeddings", ""),
}
