"""The built-in tiny model matches its recipe, and the quickstart works as in the README."""

import dataclasses
import hashlib
import json
import sys

import numpy as np
import pytest
from kit import ROOT, load_model, logits, one_device, sft_jax

from sft_jax import builtin
from sft_jax import config_file as configs
from sft_jax.assembly import open_model
from sft_jax.errors import UserError
from sft_jax.run.train import train

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tools" / "tiny")]

TINY = builtin.locate("builtin:tiny", "test")
COUNTRIES = TINY.parent / "countries"


def read(name):
    return [json.loads(line) for line in (COUNTRIES / f"{name}.jsonl").read_text().splitlines()]


def exchanges(name):
    return [tuple(message["content"] for message in row["messages"]) for row in read(name)]


@pytest.fixture(scope="module")
def world():
    from world import read_world

    return read_world()


def country_in(world, text):
    """The country that a question names; the longest match wins ("Guinea" is part of "Equatorial Guinea")."""
    named = [country for country in world.countries if country in text]
    return max(named, key=len)


@pytest.mark.smoke
def test_weights_are_those_of_the_recipe():
    recipe = json.loads((TINY / "recipe.json").read_text())
    weights = (TINY / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == recipe["sha256"]
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 8e6


@pytest.mark.smoke
def test_data_is_what_the_script_writes(world, tmp_path):
    import build_tiny

    build_tiny.write_data(world, tmp_path / "countries")
    files = sorted(file.name for file in COUNTRIES.iterdir())
    assert files == ["documents.jsonl", "heldout.jsonl", "train.jsonl", "unknown.jsonl"]
    for name in files:
        assert (tmp_path / "countries" / name).read_text() == (COUNTRIES / name).read_text(), name


@pytest.mark.smoke
def test_halves_do_not_overlap(world):
    """Training asks about no held-out country, and no pretraining document answers held-out or unknown questions."""
    from documents import documents

    assert not set(world.taught) & set(world.held_out)
    assert {country_in(world, question) for question, _ in exchanges("train")} == set(world.taught)
    assert {country_in(world, question) for question, _ in exchanges("heldout")} <= set(world.held_out)
    assert len(exchanges("unknown")) == len(world.unknown) == 24
    texts = list(documents(world, 4000, seed=0))
    for country, attribute in world.unknown:
        value = world.countries[country][attribute]
        assert not any(value in text for text in texts), value
    # no document answers a question about a held-out country
    answers = {country: set(facts.values()) for country, facts in world.countries.items()}
    for text in texts:
        for line, after in zip(text.split("\n"), text.split("\n")[1:], strict=False):
            if "?" in line and "?" not in after and country_in(world, line) in world.held_out:
                answer = after.split(": ")[-1].split("] ")[-1].split(" > ")[-1].strip(".")
                assert answer not in answers[country_in(world, line)], text


def test_transformers_loads_it_and_agrees():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = np.asarray([tokenizer("Notes on Mali. Its capital is")["input_ids"]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(TINY).eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(load_model(TINY)[0], ids), expected, atol=1e-3)


@pytest.mark.smoke
def test_the_base_knows_what_it_has_read_and_nothing_else(world):
    """It completes sentences with the facts of the documents, and not with facts that they lack."""
    opened = open_model("builtin:tiny", devices=one_device())
    starts = {
        "capital": "The capital of {c} is",
        "continent": "{c} lies in",
        "language": "People in {c} speak",
        "currency": "People in {c} pay with",
        "landmark": "{c} is known for",
    }
    facts = [(country, attribute) for country in world.countries for attribute in starts]
    texts = [starts[attribute].format(c=country) for country, attribute in facts]
    prompts = [opened.tokenizer(text[0].upper() + text[1:])["input_ids"] for text in texts]
    written = opened.generator(opened.params, opened.frozen, prompts, 16, batch_size=256)
    known = {
        fact: opened.tokenizer.decode(one.ids).strip().startswith(world.countries[fact[0]][fact[1]])
        for fact, one in zip(facts, written, strict=True)
    }
    assert np.mean([right for fact, right in known.items() if fact not in world.unknown]) >= 0.99
    assert not any(known[fact] for fact in world.unknown)


def test_names_that_are_not_built_in(tmp_path):
    with pytest.raises(UserError, match=r"model\.path: .builtin:small. is not built in; there are builtin:tiny"):
        builtin.locate("builtin:small", "model.path")
    for override in ("model.path=builtin:nothing", "data.train.0.path=builtin:countries/nothing.jsonl"):
        done = sft_jax(
            "train", ROOT / "configs" / "quickstart.yaml", override, f"training.output_dir={tmp_path / 'run'}"
        )
        assert done.returncode == 2
        assert "is not built in; there are builtin:tiny, builtin:countries/" in done.stderr.splitlines()[-1]
        assert not (tmp_path / "run").exists()


def test_a_resumed_quickstart_is_evaluated_too(tmp_path):
    config = configs.load(
        ROOT / "configs" / "quickstart.yaml",
        [
            *(f"{rows}.0.max_rows=40" for rows in ("data.train", "data.eval", "evaluation.documents")),
            *(f"training.output_dir={tmp_path / 'run'}", "training.max_steps=4", "evaluation.num_questions=5"),
        ],
    )
    first = train(config, one_device())
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, shots=0))
    again = train(config, one_device())
    for key in ("tuned_loss", "tuned_document_perplexity", "tuned_document_kl"):
        np.testing.assert_allclose(again[key], first[key], rtol=1e-5)
    assert "few_shot" not in json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
