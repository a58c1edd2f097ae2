"""The table of families that tests go through: a new family adds a row to a file in tests/rows.

A row has the class of transformers, or the ``model_type`` of a multimodal model, and changes of ``SHAPE``.
"""

import numpy as np
import pytest
import torch
import transformers
from rows import dense, experts, multimodal, recurrent
from rows.multimodal import WHOLE
from rows.sizes import SHAPE

from sft_jax.tree import flatten

FAMILIES = dense.ROWS | experts.ROWS | recurrent.ROWS | multimodal.ROWS


def compare_gradients(split, grads, model, rel=1e-3):
    """The norm of the gradient of each tensor of the decoder beside that of transformers."""
    expected = {name: float(one.grad.norm()) for name, one in model.named_parameters() if one.grad is not None}
    prefix, compared = split.arch.in_modules(split.arch.prefix), set()
    for path, leaf in flatten(grads).items():
        stored = split.stored[path]
        found = {split.arch.in_modules(name): stored.tensor(leaf, i) for i, name in enumerate(stored.names)}
        if path[0] == "layers" and not found.keys() <= expected.keys():  # transformers has all experts in one parameter
            module = ".".join(path[2:])
            found = {
                f"{prefix}layers.{layer}.{module}": one for layer, one in zip(split.layers(path), leaf, strict=True)
            }
            found = {name if name in expected else name.removesuffix(".weight"): one for name, one in found.items()}
        for name, gradient in found.items():
            if name in expected:
                assert float(np.linalg.norm(np.asarray(gradient))) == pytest.approx(expected[name], rel=rel), name
                compared.add(name)
    left = {name for name in expected.keys() - compared if not split.arch.is_part or name.startswith(prefix)}
    if split.arch.family == "olmo_hybrid":  # modules with other names than in files, three convolutions in one
        left = {name for name in left if not name.endswith(("layernorm.weight", "conv1d.weight"))}
    assert not left


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
