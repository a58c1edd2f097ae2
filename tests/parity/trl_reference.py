"""Twenty steps of TRL's SFTTrainer (with PEFT for LoRA): ``trl_reference.py MODEL DATA OUT full|lora``.

Writes the loss of every step to ``OUT/losses.json`` and, for LoRA, the adapter it starts from to ``OUT/adapter``.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

STEPS, BATCH, RATE, RANK, ALPHA = 20, 4, 3e-3, 4, 8


def main(folder: str, data: str, out: str, mode: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if mode == "lora":
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # not at zero, so that A is trained from the first step
                torch.nn.init.normal_(parameter, 0.0, 0.05)
        model.save_pretrained(f"{out}/adapter")
    arguments = SFTConfig(
        output_dir=f"{out}/trainer",
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=128,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        seed=0,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataset_num_proc=None,
    )
    rows = load_dataset("json", data_files=data, split="train")
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    Path(out, "losses.json").write_text(json.dumps(losses))


main(*sys.argv[1:])
