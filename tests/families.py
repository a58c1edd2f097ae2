"""The table of families that tests go through: a new family adds a row to a file in tests/rows.

A row has the class of transformers, or the ``model_type`` of a multimodal model, and changes of ``SHAPE``.
"""

import torch
import transformers
from rows import dense, experts, multimodal, recurrent
from rows.multimodal import WHOLE
from rows.sizes import SHAPE

FAMILIES = dense.ROWS | experts.ROWS | recurrent.ROWS | multimodal.ROWS


def reference(name: str, folder, shard: str | None = None):
    """The random model of a row, of transformers, saved in a folder."""
    kind, changes = FAMILIES[name]
    if kind in WHOLE:
        config = transformers.AutoConfig.for_model(kind, text_config=SHAPE | changes, **WHOLE[kind])
        auto = transformers.AutoModelForImageTextToText
    else:
        config = getattr(transformers, f"{kind}Config")(**(SHAPE | changes))
        auto = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for path, parameter in model.named_parameters():
        mean, stddev = (1.0, 0.3) if parameter.ndim == 1 else (0.0, 0.1)
        if path.endswith("A_log"):  # a recurrence that remembers; norms of what one token leaves would amplify rounding
            mean = -3.0
        if path.endswith("norm.weight") and not parameter.any():  # 1 is added to it
            mean = 0.0
        torch.nn.init.normal_(parameter, mean, stddev)
    for path, buffer in model.named_buffers():
        if path.endswith("bias"):  # corrections of routers
            torch.nn.init.normal_(buffer, 0.0, 0.1)
        if path.endswith("layer_scalar"):
            torch.nn.init.normal_(buffer, 1.0, 0.3)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if kind == "llama4":
        model.forward = model.language_model.forward  # that of the whole model of transformers 5.24 needs images
    return model
