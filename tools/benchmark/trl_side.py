"""Runs TRL's side of a comparison."""

from __future__ import annotations

import importlib.util
import resource
import tempfile
import time
from typing import Any

from benchmark.kit import rows_of


class NotAvailable(Exception):
    """A side cannot run a case at all."""


def run_trl(options: dict[str, Any]) -> dict[str, Any]:
    """Trains on the same conversations in file order with TRL's ``SFTTrainer`` and PEFT."""
    import torch  # pyright: ignore[reportMissingImports]
    from datasets import load_dataset
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports]

    steps, warmup, per_step = options["steps"], options["warmup"], options["conversations"]
    on_gpu = torch.cuda.is_available()
    attention = _fastest_attention() if on_gpu else "sdpa"
    tokenizer = AutoTokenizer.from_pretrained(options["kit"])
    model = AutoModelForCausalLM.from_pretrained(
        options["kit"],
        dtype=getattr(torch, options["dtype"]),
        attn_implementation=attention,
        **_quantized(options),
    )
    packs = attention != "sdpa"  # without a segment-aware kernel, packing attends over the whole sequence
    rows: Any = load_dataset("json", data_files=rows_of(options), split="train")
    times: list[float] = []
    began: list[float] = []
    seen: list[tuple[int, int, int]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            began.append(time.time())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.time() - began[-1])

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model,
            args=_trl_arguments(options, out, packs, on_gpu),
            train_dataset=rows if packs else rows.select(range(min(len(rows), per_step * (warmup + steps)))),
            processing_class=tokenizer,
            peft_config=lora if options["mode"] != "full" else None,
            callbacks=[Clock()],
        )
        collate: Any = trainer.data_collator

        def counting(examples: Any) -> Any:
            batch = collate(examples)
            total = batch["input_ids"].numel()
            real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else total
            seen.append((real, int((batch["labels"] != -100).sum()), total))
            return batch

        trainer.data_collator = counting
        trainer.train()
    measured = seen[warmup : warmup + steps]
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "step_seconds": times[warmup:],
        "real_tokens": [real for real, _, _ in measured],
        "target_tokens": [targets for _, targets, _ in measured],
        "all_tokens": [total for _, _, total in measured],
        "first_step_at": began[0] + times[0],
        "attention": attention,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _quantized(options: dict[str, Any]) -> dict[str, Any]:
    """Returns what loads a base in nf4 as QLoRA does, with quantized scales."""
    if options["quantization"] is None:
        return {}
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotAvailable("bitsandbytes is not installed")
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, options["dtype"]),
        )
    }


def _trl_arguments(options: dict[str, Any], out: str, packs: bool, on_gpu: bool) -> Any:
    """Returns the ``SFTConfig`` of a measured run."""
    from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]

    return SFTConfig(
        output_dir=out,
        per_device_train_batch_size=options["batch_size"] if packs else options["conversations"],
        max_steps=options["warmup"] + options["steps"],
        logging_steps=1,
        report_to="none",
        bf16=on_gpu and options["dtype"] == "bfloat16",
        use_cpu=not on_gpu,
        max_length=options["row_length"],
        assistant_only_loss=True,
        gradient_checkpointing=options["checkpointing"],
        packing=packs,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )


def _fastest_attention() -> str:
    """Returns FlashAttention 2 for packed sequences, from its package or from PyTorch, and otherwise ``sdpa``."""
    from transformers import AttentionInterface
    from transformers.utils.import_utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return "flash_attention_2"
    try:
        from torch.nn.attention.varlen import varlen_attn  # type: ignore[import-not-found]
    except ImportError:
        return "sdpa"

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **kwargs: Any) -> Any:
        q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))  # [1, heads, tokens, H]: TRL concatenates the sequences
        starts, longest = kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"])
        out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0))
        return out[None], None

    AttentionInterface.register("torch_varlen", attend)
    return "torch_varlen"
