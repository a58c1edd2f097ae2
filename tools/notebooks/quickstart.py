"""The quickstart as a script: no ``if __name__`` is needed.

python tools/notebooks/quickstart.py
"""

import sft_jax

config = sft_jax.load_config("configs/quickstart.yaml", ["training.output_dir=runs/script", "evaluation.at_end=false"])


def stop_when_good(event: sft_jax.Event) -> str | None:
    """Saves a checkpoint and stops the run once the held-out loss is low enough."""
    return "stop" if event.kind == "evaluation" and event.metrics["eval_loss"] < 0.5 else None


run = sft_jax.train(config, callbacks=[stop_when_good])
print(run.metrics[-1])
print(run.model.chat([{"role": "user", "content": "What is the capital of Kyrgyzstan?"}]))
print(run.export("runs/script-merged", format="merged"))
