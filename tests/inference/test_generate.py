"""Generation: the cache computes what training computes, drawing follows the settings, every kind of model opens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kit import exchanged, load_model, logits, make_model, one_device

from sft_jax.assembly import open_model
from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.evaluation.score import score
from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader
from sft_jax.inference.generator import Generator
from sft_jax.inference.sampling import Sampling, filter_logits, sample
from sft_jax.models.attention.backend import attention
from sft_jax.models.attention.cached import cached_attention
from sft_jax.models.cache import KeyValues
from sft_jax.models.decoder import resize_cache, update_cache
from sft_jax.sharding import make_mesh
from sft_jax.training.weights import build, load_weights

SHAPES = {
    "llama": {},
    "window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "qwen3-windows": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "tie_word_embeddings": False,
    },
}
PROMPTS = [[5, 9, 200, 31], list(range(60, 99)), [7], list(range(100, 117))]


@pytest.mark.smoke
@pytest.mark.parametrize("window", [None, 4])
def test_cached_attention_is_the_last_row_of_attention(window):
    rng = np.random.default_rng(0)
    length, cache_length = 9, 16
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 6)), jnp.float32) for heads in (4, 2, 2))
    whole = attention(q, k, v, jnp.ones((2, length), jnp.int32), window)
    for position in (0, 3, length - 1):
        junk = jnp.full((2, cache_length, 2, 6), 1e3)  # positions from this one on are never read
        cache = KeyValues(junk.at[:, :position].set(k[:, :position]), junk.at[:, :position].set(v[:, :position]))
        here = slice(position, position + 1)
        one = cached_attention(q[:, here], k[:, here], v[:, here], cache, jnp.full((2, 1), position), window)
        np.testing.assert_allclose(one[:, 0], whole[:, position], atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_cache_gives_the_logits_of_training(shape, tmp_path):
    """Rows of unequal length in one padded batch, continued token by token."""
    model, _, _ = load_model(make_model(tmp_path / "model", **SHAPES[shape]))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 380, size).tolist() for size in (3, 21, 11)]
    num_prompt = [1, 14, 9]
    padded, cache_length = 16, 32
    ids = np.zeros((3, padded), np.int32)
    for r, (row, n) in enumerate(zip(rows, num_prompt, strict=True)):
        ids[r, :n] = row[:n]
    where = jnp.broadcast_to(jnp.arange(padded), ids.shape)
    hidden, cache = model.prefill(ids, (where < jnp.asarray(num_prompt)[:, None]).astype(jnp.int32), where)
    first = model.logits(hidden)
    cache = resize_cache(cache, cache_length)
    step = jax.jit(lambda token, position, cache: model.decode(token[:, None], position[:, None], cache))
    for r, (row, n) in enumerate(zip(rows, num_prompt, strict=True)):
        expected = logits(model, np.asarray([row]))[0]
        np.testing.assert_allclose(first[r, :n], expected[:n], atol=1e-4)
    position = jnp.asarray(num_prompt)
    for _ in range(3):
        token = jnp.asarray([row[min(p, len(row) - 1)] for row, p in zip(rows, position.tolist(), strict=True)])
        hidden, new = step(token, position, cache)
        cache = update_cache(cache, new, position)
        for r, row in enumerate(rows):
            at = int(position[r])
            if at < len(row):
                expected = logits(model, np.asarray([row[: at + 1]]))[0, -1]
                np.testing.assert_allclose(model.logits(hidden)[r, 0], expected, atol=1e-4)
        position = position + 1


def test_greedy_text_is_transformers_text(data_dir):
    """256 tokens of a really trained model, from prompts of unequal length, end of text ignored."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = data_dir / "models" / "stories260K"
    opened = open_model(str(folder), devices=one_device())
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = ["Once upon a time", "Lily and Tom went to the", "One day, a big dog"]
    prompts = [opened.tokenizer(text)["input_ids"] for text in texts]
    num = min(256, opened.arch.max_positions - max(map(len, prompts)))
    assert num == 256
    ours = Generator(opened.split, [])(opened.params, opened.frozen, prompts, num)
    for prompt, one in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        assert len(one.ids) == num
        assert one.ids == theirs


def test_filter_is_that_of_transformers():
    import torch
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(0)
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.5, 7, 0.6), (2.0, 1, 0.01)):
        scores = rng.normal(size=(20, 40)).astype(np.float32) * 3
        expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(scores))
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        numbers = Sampling(temperature, top_k, top_p).numbers
        ours = jax.vmap(lambda row, numbers=numbers: filter_logits(row, *numbers))(scores)
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


@pytest.mark.smoke
def test_what_is_drawn_follows_the_probabilities():
    scores = jnp.asarray([[0.0, 1.0, 2.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(sample(jnp.tile(scores, (4000, 1)), keys, *Sampling(1.0).numbers))
    expected = jax.nn.softmax(scores[0])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, expected, atol=0.03)
    assert set(np.asarray(sample(jnp.tile(scores, (400, 1)), keys[:400], *Sampling(1.0, top_k=2).numbers))) == {1, 2}
    assert set(np.asarray(sample(jnp.tile(scores, (400, 1)), keys[:400], *Sampling(0.0).numbers))) == {2}


@pytest.fixture(scope="module")
def opened(tiny):
    return open_model(str(tiny), devices=one_device())


def ids_of(opened, prompts, num=20, sampling=None, **options):
    return [one.ids for one in opened.generator(opened.params, opened.frozen, prompts, num, sampling, **options)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_neighbours(opened, temperature):
    sampling = Sampling(temperature, seed=3)
    together = ids_of(opened, PROMPTS, sampling=sampling)
    assert together == ids_of(opened, PROMPTS, sampling=sampling, batch_size=2)
    if temperature == 0:
        assert together == [ids_of(opened, [prompt])[0] for prompt in PROMPTS]
    else:
        assert together != ids_of(opened, PROMPTS, sampling=Sampling(temperature, seed=4))
    assert together[0] != together[1]


@pytest.mark.smoke
def test_one_program_a_bucket(opened):
    generator = Generator(opened.split, opened.stop_ids)
    for length in (5, 9, 14):  # a prompt of up to 16 tokens, and up to 32 with the answer
        generator(opened.params, opened.frozen, [list(range(20, 20 + length))] * 3, 12)
    generator(opened.params, opened.frozen, [[5, 6, 7, 8, 9]] * 4, 12, Sampling(0.9, 3, 0.7, 1))
    assert (generator._start._cache_size(), generator._decode._cache_size()) == (1, 1)


@pytest.mark.smoke
def test_devices_do_not_matter(tiny, opened):
    assert len(jax.devices()) == 8
    assert ids_of(open_model(str(tiny)), PROMPTS) == ids_of(opened, PROMPTS)


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 2, 1, 2)])
def test_meshes_do_not_matter(tiny, opened, sizes):
    """Prompts in parts on the devices of the sequence axis, the cache whole on each; rows apart on that of data."""
    mesh = make_mesh(*sizes)
    split = build(opened.arch, mesh, None, "float32", full=False)
    _, frozen = load_weights(split, TensorReader(tiny))
    generator = Generator(split, opened.stop_ids)
    assert [one.ids for one in generator({}, frozen, PROMPTS, 20)] == ids_of(opened, PROMPTS)


@pytest.mark.smoke
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_weights_are_not_gathered_for_a_token(tmp_path, quantization):
    """Eight rows with parts of weights on each device: what devices exchange for a token is as large as tokens are."""
    sizes = {"hidden_size": 512, "intermediate_size": 640, "head_dim": 64, "tie_word_embeddings": False}
    arch, mesh = read_architecture(make_model(tmp_path / "model", **sizes)), make_mesh(1, 4, 1, 2)
    split = build(arch, mesh, LoraConfig(rank=4, alpha=8.0), "bfloat16", quantization=quantization)
    generator = Generator(split, [2])
    weights = split.trainable, split.frozen
    ids, keys, numbers = np.ones((8, 16), np.int32), jax.random.split(jax.random.key(0), 8), Sampling().numbers
    with jax.set_mesh(mesh):
        state = generator._start.eval_shape(*weights, ids, ids[:, 0], keys, numbers, cache_length=32)
        program = generator._decode.lower(*weights, state, 4, keys, numbers).compile().as_text()
    largest = max(math.prod(shape) for _, shape in exchanged(program))
    spec = arch.attention_specs[0]
    smallest = 512 * spec.num_kv_heads * spec.head_dim // 2  # of the weights, what a device computes with
    assert largest <= 8 * 640 < smallest


def test_stopping_and_streaming(opened):
    free = ids_of(opened, PROMPTS, 30)
    at = 7
    stop = free[1][at]
    first = free[1].index(stop)
    generator = Generator(opened.split, [stop])
    answers = generator(opened.params, opened.frozen, PROMPTS, 30)
    assert answers[1].ids == free[1][:first]
    assert answers[1].finish_reason == "stop"
    for one, whole in zip(answers, free, strict=True):
        assert one.ids == (whole[: whole.index(stop)] if stop in whole else whole)
        assert one.stopped == (stop in whole)
    assert list(generator.stream(opened.params, opened.frozen, PROMPTS[1], 30)) == [*answers[1].ids, stop]
    for prompt, whole in zip(PROMPTS, free, strict=True):
        assert list(opened.generator.stream(opened.params, opened.frozen, prompt, 9)) == whole[:9]
    sampling = Sampling(1.0, seed=5)
    drawn = ids_of(opened, PROMPTS[:1], 9, sampling)[0]
    assert list(opened.generator.stream(opened.params, opened.frozen, PROMPTS[0], 9, sampling)) == drawn


@pytest.mark.smoke
def test_the_context_ends(opened):
    long = (list(range(4, 380)) * 2)[:500]  # of 512
    short, cut = ids_of(opened, [[5, 6], long], 40)
    assert (len(short), len(cut)) == (40, 12)
    assert cut == ids_of(opened, [long], 12)[0]
    with pytest.raises(UserError, match="prompt 2 has 512 tokens; the model's context has 512"):
        ids_of(opened, [[5, 6], (list(range(4, 380)) * 2)[:512]])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        ids_of(opened, [[]])


def test_logits_that_are_not_finite_are_no_answer(opened):
    params, frozen = jax.tree.map(lambda leaf: leaf * jnp.nan, (opened.params, opened.frozen))
    with pytest.raises(UserError, match=r"prompt 1: the model's logits are not finite .*try --dtype float32"):
        opened.generator(params, frozen, [[5, 6, 7]], 4)
    with pytest.raises(UserError, match="the prompt: the model's logits are not finite"):
        list(opened.generator.stream(params, frozen, [5, 6, 7], 4))
    broken = dataclasses.replace(opened, params=params, frozen=frozen)
    with pytest.raises(UserError, match=r"rows row 0, response 0: the model's logits are not finite"):
        score(broken, [{"prompt": "a river", "responses": ["a bridge"]}])
