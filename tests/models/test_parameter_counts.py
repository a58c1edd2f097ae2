"""Parameters of published models, counted in the abstract network: the family reads the config as its authors did."""

import json
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from flax import nnx

from sft_jax.hf.config import read_architecture
from sft_jax.models.layers import Projection
from sft_jax.sharding import make_mesh
from sft_jax.training.weights import build

ARCHITECTURES = Path(__file__).parents[2] / "configs" / "architectures"
# Other parts of the files: vision towers with their projectors, layers that predict a further token, and a copy of the
# embeddings.
GEMMA_3_4B_VISION, GEMMA_3_27B_VISION, QWEN_3_5_VISION, QWEN_3_5_MTP = 419816304, 423060336, 456010480, 243290624
MISTRAL_SMALL_VISION, MINISTRAL_3_VISION = 438958080, 428472320
GLM_4_5_AIR_MTP, QWEN_3_LM_HEAD = 3616573568, 155582464


class Published(NamedTuple):
    """Counts as published: exact, or rounded or truncated, such as ``"36.1e9"``.

    Attributes:
        total: of the text decoder.
        active: per token, where only some experts are.
        looked_up: whether ``active`` includes embeddings that are not ``lm_head``.
    """

    total: int | str
    active: str | None = None
    looked_up: bool = True


# By name in configs/architectures.
FILES = {
    "deepseek-v3": Published("671e9", "37e9"),
    "gemma-2-9b-it": Published(9_241_705_984),
    "gemma-3-27b-it": Published(27_432_406_640 - GEMMA_3_27B_VISION),
    "gemma-3-4b-it": Published(4_300_079_472 - GEMMA_3_4B_VISION),
    "glm-4.5-air": Published(110_468_824_832 - GLM_4_5_AIR_MTP, "12e9", looked_up=False),
    "gpt-oss-120b": Published("116.83e9", "5.13e9", looked_up=False),
    "gpt-oss-20b": Published("20.91e9", "3.61e9", looked_up=False),
    "granite-3.3-8b": Published(8_170_864_640),
    "granite-4.0-h-micro": Published(3_191_396_096),
    "lfm2-1.2b": Published(1_170_340_608),
    "llama-3.1-70b": Published(70_553_706_496),
    "llama-3.1-8b": Published(8_030_261_248),
    "llama-3.2-1b": Published(1_235_814_400),
    "llama-3.2-3b": Published(3_212_749_824),
    "minimax-m2": Published("2.3e11", "10e9", looked_up=False),
    "ministral-3-8b-2512": Published(8_918_026_240 - MINISTRAL_3_VISION),
    "mistral-7b-v0.3": Published(7_248_023_552),
    "mistral-small-3.1-24b-2503": Published(24_011_361_280 - MISTRAL_SMALL_VISION),
    "mixtral-8x7b-v0.1": Published(46_702_792_704, "12.9e9"),
    "nvidia-nemotron-nano-9b-v2": Published(8_888_227_328),
    "olmo-2-1124-7b": Published(7_298_617_344),
    "olmo-3-7b": Published(7_298_011_136),
    "olmoe-1b-7b-0924": Published(6_919_161_856, "1.3e9"),
    "phi-4": Published(14_659_507_200),
    "qwen2.5-32b": Published(32_763_876_352),
    "qwen2.5-7b": Published(7_615_616_512),
    "qwen3-0.6b": Published(751_632_384 - QWEN_3_LM_HEAD),
    "qwen3-30b-a3b": Published(30_532_122_624, "3.3e9"),
    "qwen3-8b": Published(8_190_735_360),
    "qwen3.5-9b": Published(9_653_104_368 - QWEN_3_5_VISION - QWEN_3_5_MTP),
    "smollm3-3b": Published(3_075_098_624),
}


def config(kind, vocab, dim, mlp, layers, heads, kv_heads, tied=False, **more):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(names, (vocab, dim, mlp, layers, heads), strict=True))
    return {"model_type": kind, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied} | sizes | more


# Configs with the sizes only, some of them transformers' defaults.
MAMBA = {"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
EXPERTS_OF_GRANITE = {"num_local_experts": 32, "num_experts_per_tok": 8}
EXPERTS_OF_QWEN3 = {"moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8}
OTHERS = {
    "arcee": (config("arcee", 128004, 2560, 18432, 36, 20, 4, head_dim=128), Published("4.62e9")),
    "command-r7b": (config("cohere2", 256000, 4096, 14336, 32, 32, 8, tied=True), Published("8.03e9")),
    "ernie-4.5-0.3b": (config("ernie4_5", 103424, 1024, 3072, 18, 16, 2, tied=True), Published(360_748_032)),
    "ernie-4.5-21b-a3b": ({"model_type": "ernie4_5_moe"}, Published(21_825_437_888, "3e9")),
    "exaone-4.0-32b": (config("exaone4", 102400, 5120, 27392, 64, 40, 8, head_dim=128), Published("32.0e9")),
    "falcon-h1-0.5b": (config("falcon_h1", 32784, 1024, 2048, 36, 8, 2, head_dim=64, **MAMBA), Published(521_411_104)),
    "gemma-3-1b": (config("gemma3_text", 262144, 1152, 6912, 26, 4, 1, tied=True), Published(999_885_952)),
    "gemma-7b": (config("gemma", 256000, 3072, 24576, 28, 16, 16, tied=True), Published(8_537_680_896)),
    "glm-4-9b-0414": ({"model_type": "glm4"}, Published(9_400_279_040)),
    "gpt2": ({"model_type": "gpt2"}, Published(124_439_808)),
    "granite-3.1-1b-a400m": (
        config("granitemoe", 49155, 1024, 512, 24, 16, 8, tied=True, **EXPERTS_OF_GRANITE),
        Published("1.33e9", "4e8"),
    ),
    "llama-2-70b": (config("llama", 32000, 8192, 28672, 80, 64, 8), Published(68_976_648_192)),
    "llama-3.1-405b": (config("llama", 128256, 16384, 53248, 126, 128, 8), Published(405_853_388_800)),
    "llama-4-scout": ({"model_type": "llama4_text"}, Published("107.8e9", "17e9")),
    "minitron-8b": (config("nemotron", 256000, 4096, 16384, 32, 48, 8, head_dim=128), Published("8.27e9")),
    "olmo-1b": (config("olmo", 50304, 2048, 8192, 16, 16, 16, tied=True), Published(1_176_764_416)),
    "phi-2": (config("phi", 51200, 2560, 10240, 32, 32, 32), Published(2_779_683_840)),
    "phi-3.5-moe": (
        {"model_type": "phimoe", "attention_bias": True, "lm_head_bias": True},
        Published(41_873_153_344, "6.6e9"),
    ),
    "phi-4-mini": (config("phi3", 200064, 3072, 8192, 32, 24, 8, tied=True, pad_token_id=0), Published(3_836_021_760)),
    "pythia-6.9b": (config("gpt_neox", 50432, 4096, 16384, 32, 32, 32), Published(6_857_302_016)),
    "qwen1.5-moe-a2.7b": ({"model_type": "qwen2_moe"}, Published(14_315_784_192, "2.7e9")),
    "qwen3-235b-a22b": (
        config("qwen3_moe", 151936, 4096, 12288, 94, 64, 4, head_dim=128, **EXPERTS_OF_QWEN3),
        Published(235_093_634_560, "22e9"),
    ),
    "seed-oss-36b": ({"model_type": "seed_oss", "hidden_size": 5120}, Published(36_151_104_512)),
    "stablelm-3b-4e1t": (config("stablelm", 50304, 2560, 6912, 32, 32, 32), Published(2_795_443_200)),
    "starcoder2-3b": (config("starcoder2", 49152, 3072, 12288, 30, 24, 2, tied=True), Published(3_030_371_328)),
}


class Counts(NamedTuple):
    total: int
    active: float  # with the embeddings of all tokens
    looked_up: int  # embeddings that are not lm_head


def count(folder):
    """Counts the parameters of the decoder of a ``config.json``; no weight is allocated."""
    arch = read_architecture(folder)
    split = build(arch, make_mesh(devices=jax.devices()[:1]), None, "bfloat16", full=False)
    leaves = {path: leaf.size for path, leaf in split.base().items()}
    # Biases of experts are beside the projections, so that all leaves of a mixture's experts have their share.
    shares = {
        tuple(map(str, path[:-1])): node.share
        for path, node in nnx.iter_graph(split.abstract())
        if isinstance(node, Projection) and node.share != 1.0
    }

    def share(path):
        return next((one for prefix, one in shares.items() if path[: len(prefix)] == prefix), 1.0)

    active = sum(size * share(path) for path, size in leaves.items())
    return Counts(sum(leaves.values()), active, 0 if arch.tie_word_embeddings else leaves["embed_tokens", "weight"])


def check(found, published):
    """Checks a count: the same, or less than one unit of the last published digit away."""
    if isinstance(published, int):
        assert found == published
    else:
        exact = Decimal(published)
        assert abs(Decimal(found) - exact) < Decimal(10) ** exact.as_tuple().exponent, f"{found:,.0f}"


@pytest.mark.parametrize("name", [*FILES, *OTHERS])
def test_parameters_are_as_many_as_published(name, tmp_path):
    if name in FILES:
        text, published = (ARCHITECTURES / f"{name}.json").read_text(), FILES[name]
    else:
        text, published = json.dumps(OTHERS[name][0]), OTHERS[name][1]
    (tmp_path / "config.json").write_text(text)
    found = count(tmp_path)
    check(found.total, published.total)
    if published.active is None:
        assert found.active == found.total
    else:
        check(found.active - (0 if published.looked_up else found.looked_up), published.active)


def test_every_architecture_is_counted():
    assert {path.stem for path in ARCHITECTURES.glob("*.json")} == set(FILES)


def test_counts_are_compared_to_their_last_digit():
    check(3_353_032_704, "3.3e9")
    check(228_689_764_864, "2.3e11")
    for found, published in ((3_400_000_001, "3.3e9"), (240_000_000_000, "2.3e11"), (9, 8)):
        with pytest.raises(AssertionError):
            check(found, published)
