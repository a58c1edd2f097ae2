"""Runs an attention module beside the one of transformers, on two documents in one sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from sft_jax.models.attention.backend import XLA
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer
from sft_jax.models.rope import sin_cos

TWO = (23, 17)  # the lengths of two documents


def positions_of(lengths):
    """The positions of packed documents ``[1, T]``."""
    return np.concatenate([np.arange(length) for length in lengths])[None]


def hidden_states(lengths, dim):
    """Random hidden states ``[1, T, D]``."""
    return np.random.default_rng(0).normal(size=(1, sum(lengths), dim)).astype(np.float32)


def reference(make, config, mask, rotary=None, lengths=TWO):
    """A module of transformers with random parameters and their gradients, and its output.

    Args:
        make: makes the module.
        mask: the function of transformers that makes its mask.
        rotary: the module of its rotary embedding.
        lengths: those of the documents.
    """
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, positions = torch.tensor(hidden_states(lengths, config.hidden_size)), torch.tensor(positions_of(lengths))
    hidden = mask(config=config, inputs_embeds=x, attention_mask=None, cache=None, position_ids=positions)
    out = module(x, None if rotary is None else rotary(x, positions), hidden)[0]
    out.sin().sum().backward()
    return module, out.detach().numpy()


def load(spec, dim, module):
    """Our module with the parameters of the one of transformers; their names are equal."""
    ours = spec.module(dim, Initializer(jax.random.key(0), 1.0), ())
    params = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(ours, nnx.Param))}
    assert params.keys() == dict(module.named_parameters()).keys()
    for name, value in module.named_parameters():
        params[name][...] = _as_ours(value)
    nnx.update(ours, nnx.from_flat_state([(tuple(name.split(".")), param) for name, param in params.items()]))
    return ours


def _as_ours(value):
    value = value.detach().numpy()
    return jnp.asarray(value.T if value.ndim == 2 else value)


def _context(ropes, positions, segment_ids=None, **more):
    positions = jnp.asarray(positions, jnp.int32)
    angles = {rope: sin_cos(positions, rope, dims, segment_ids) for rope, dims in ropes.items()}
    return Context(positions, segment_ids, angles, XLA, **more)


def run(module, x, ropes, lengths):
    """The output of the packed documents."""
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    return module(jnp.asarray(x), _context(ropes, positions_of(lengths), jnp.asarray(segment_ids, jnp.int32)))[0]


def decode(module, x, ropes):
    """The outputs of one document: a prefill of its first five tokens, then one token after the other."""
    first, num = 5, x.shape[1]
    positions = np.arange(num)[None]
    segment_ids = jnp.ones((1, first), jnp.int32)
    out, cache = module(jnp.asarray(x[:, :first]), _context(ropes, positions[:, :first], segment_ids))
    cache = jax.tree.map(lambda entries: entries[None], cache).resize(num + 2)

    @jax.jit
    def step(x, position, cache):
        layer = jax.tree.map(lambda entries: entries[0], cache)
        out, new = module(x, _context(ropes, position, weight_stationary=True, cache=layer))
        return out, cache.update(jax.tree.map(lambda entries: entries[None], new), position[:, 0])

    outs = [out]
    for t in range(first, num):
        out, cache = step(jnp.asarray(x[:, t : t + 1]), jnp.asarray(positions[:, t : t + 1]), cache)
        outs.append(out)
    return np.concatenate(outs, axis=1)


def assert_equal(spec, dim, reference, ropes, lengths=TWO):
    """Equal outputs and gradients of parameters; decoding equals the full pass."""
    module, expected = reference
    ours = load(spec, dim, module)
    x = hidden_states(lengths, dim)
    graph, params = nnx.split(ours)

    @jax.jit
    def outputs_and_gradients(params):
        def total(params):
            out = run(nnx.merge(graph, params), x, ropes, lengths)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(total, has_aux=True)(params)

    gradients, out = outputs_and_gradients(params)
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=1e-5)
    found = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(found[name], _as_ours(parameter.grad), atol=2e-4, rtol=2e-4, err_msg=name)
    decoded = decode(ours, x[:, : lengths[0]], ropes)
    np.testing.assert_allclose(decoded, expected[:, : lengths[0]], atol=2e-5, rtol=1e-5)
