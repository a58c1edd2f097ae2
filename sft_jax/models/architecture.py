"""The architecture of a decoder as plain data, which a family reads from ``config.json``. Does not import jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_jax.errors import UserError

EMBEDDINGS = ("embed_tokens", "lm_head")  # modules whose weights have one entry per token


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its scaling for long contexts."""

    theta: float
    kind: str = "default"  # default | linear | llama3 | yarn | longrope | proportional
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies sines and cosines
    dims: int | None = None  # the first channels of a head, which are rotated; None: all
    backwards: bool = False  # whether heads are rotated by the negative angles
    interleaved: bool = False  # whether channels 2i and 2i + 1 form a pair, not i and i + dims/2
    share: float = 1.0  # proportional: the share of the pairs of channels that are rotated, the fastest ones
    factors: tuple[float, ...] = ()  # longrope: one divisor per frequency
    long_factors: tuple[float, ...] = ()  # for documents longer than the original context


@dataclass(frozen=True)
class Temperature:
    """Queries are multiplied by ``1 + beta · ln(1 + ⌊(position + offset) / length⌋)``, as in Llama 4."""

    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True)
class Norm:
    """A norm of hidden states.

    Attributes:
        offset: added to the weight; 1 for Gemma, whose files store ``weight - 1``.
        centered: whether the mean is subtracted (LayerNorm, Ba et al. 2016) or not (RMSNorm).
        has_weight, has_bias: its parameters.
        rounded_once: whether an RMSNorm multiplies by the weight before it rounds to the compute dtype; always with an
            offset.
    """

    eps: float
    offset: float = 0.0
    centered: bool = False
    has_weight: bool = True
    has_bias: bool = False
    rounded_once: bool = False


@dataclass(frozen=True)
class Branch:
    """A mixer or an MLP between its norms: ``after(out_scale · module(in_scale · before(x)))``.

    Attributes:
        name: the name of the module in the layer, such as ``self_attn``. If it starts with ``_``, transformers has no
            such module, and the modules in it are those of the layer.
        spec: the spec of the module, such as :class:`~sft_jax.models.attention.module.SelfAttentionSpec`.
        before, after: the module names of the norms; None for no norm. Branches may share a norm.
        in_scale, out_scale: multiply what the module reads, and its output.
        publishes: the name under which mixers of later layers find the keys and values of this one, until another layer
            publishes its own; None if they do not. If all layers of a kind publish, they stay equal and are stacked.
    """

    name: str
    spec: Any
    before: str | None = None
    after: str | None = None
    in_scale: float = 1.0
    out_scale: float = 1.0
    publishes: str | None = None


@dataclass(frozen=True)
class Sublayer:
    """An addition to the hidden states: ``x + scale · after(branch(x) + …)``.

    Attributes:
        branches: one module, or several that read the same hidden states.
        after: the module name of a norm over their sum; None for no norm.
    """

    branches: tuple[Branch, ...]
    after: str | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Layer:
    """A decoder layer: its sublayers in order.

    Attributes:
        norm: the kind of its norms.
        scalar: the name of a buffer that multiplies the hidden states after the layer; None for none.
    """

    sublayers: tuple[Sublayer, ...]
    norm: Norm
    scalar: str | None = None

    @property
    def branches(self) -> list[Branch]:
        """All branches, in order."""
        return [branch for sublayer in self.sublayers for branch in sublayer.branches]

    def published(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the layer publishes, by name, of the cache entries of its mixers by name."""
        return {one.publishes: entries[one.name] for one in self.branches if one.publishes is not None}

    @property
    def norms(self) -> list[str]:
        """The module names of the norms, each once."""
        names = [name for branch in self.branches for name in (branch.before, branch.after)]
        names += [sublayer.after for sublayer in self.sublayers]
        return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class PerLayer:
    """Inputs of each layer besides the hidden states: ``size`` channels per token and layer.

    The sum of an embedding of the token, from a table ``[vocab_size, L · size]``, and a projection of its embedding.
    """

    vocab_size: int
    size: int


@dataclass(frozen=True)
class Architecture:
    """A decoder: embeddings, layers, norm, ``lm_head``.

    Attributes:
        family: ``model_type`` of ``config.json``.
        norm: the final norm.
        embedding_scale: multiplies embeddings; rounded to the compute dtype.
        embedding_norm: a norm of embeddings, before the layers; None for none.
        lm_head_bias: whether ``lm_head`` has a bias.
        learned_positions: whether an embedding of its position is added to that of each token.
        per_layer: inputs of each layer besides the hidden states; None for none.
        logits_scale: multiplies logits.
        logits_softcap: ``c`` of the soft cap; logits become ``c · tanh(logit / c)``; None for no cap.
        prefix: the start of all tensor names in the files except that of ``lm_head``.
        module_prefix: the same for the modules of transformers, which adapters name; None if it is ``prefix``.
        conv1d: whether the linear layers are stored as ``[in, out]``, as in the ``Conv1D`` of transformers.
        tensors: pairs of our name and the name in the files, where the two differ, for a module or parameter of the
            model (``norm``) or of a layer (``mlp.gate.weight``). ``{expert}`` stands for the index of an expert. A
            tuple of names: tensors that are concatenated along the outputs.
        layouts: pairs of ``prefix`` and the name of ``lm_head`` in checkpoints that have other names.
        outside: prefixes of tensors that are not part of the decoder, such as those of a vision tower. They are not
            loaded, and exported as they are.
        aliases: pairs of token ids, of which the first is read as the second, whose embedding gets no gradient.
        is_part: whether it is the decoder of a multimodal model, whose other parts are in ``outside``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    tie_word_embeddings: bool
    max_positions: int = 2048
    initializer_range: float = 0.02
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    lm_head_bias: bool = False
    learned_positions: bool = False
    per_layer: PerLayer | None = None
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    prefix: str = "model."
    module_prefix: str | None = None
    conv1d: bool = False
    tensors: tuple[tuple[str, str | tuple[str, ...]], ...] = field(default=())
    layouts: tuple[tuple[str, str], ...] = ()
    outside: tuple[str, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()
    is_part: bool = False

    def __post_init__(self) -> None:
        if self.per_layer is not None and self.vocab_size > self.per_layer.vocab_size:
            raise UserError(
                f"a vocabulary of {self.vocab_size} tokens, but the embeddings for the layers have "
                f"{self.per_layer.vocab_size} (vocab_size_per_layer_input); data.added_tokens is not supported for "
                f"{self.family}"
            )

    def names_in_files(self, name: str) -> tuple[str, ...]:
        """Returns the names in the files, without prefix, of a parameter or module of the model or of a layer."""
        for ours, theirs in self.tensors:
            if name == ours or name.startswith(f"{ours}."):
                rest = name.removeprefix(ours)
                return tuple(one + rest for one in ((theirs,) if isinstance(theirs, str) else theirs))
        return (name,)

    @property
    def embeddings_tensor(self) -> str:
        """The name of the embeddings in the files."""
        return self.prefix + self.names_in_files("embed_tokens.weight")[0]

    @property
    def lm_head_tensor(self) -> str:
        """The name of ``lm_head`` in the files."""
        return self.names_in_files("lm_head.weight")[0]

    def in_modules(self, name: str) -> str:
        """Returns the name of a tensor of the embeddings or ``lm_head`` in the modules of transformers."""
        module, _, parameter = name.rpartition(".")
        if module == self.lm_head_tensor.rpartition(".")[0]:
            own = [theirs for ours, theirs in self.tensors if ours == "lm_head"]  # that of a layout comes first
            return f"{own[-1] if own else 'lm_head'}.{parameter}"
        prefix = self.prefix if self.module_prefix is None else self.module_prefix
        return prefix + name.removeprefix(self.prefix)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def has_routers(self) -> bool:
        """Whether a layer has experts."""
        return any(hasattr(branch.spec, "router") for layer in self.layers for branch in layer.branches)

    @property
    def attention_specs(self) -> list[Any]:
        """Returns the distinct attention specs, in order of appearance."""
        specs = [branch.spec for layer in self.layers for branch in layer.branches]
        return list(dict.fromkeys(spec for spec in specs if hasattr(spec, "num_kv_heads")))
