"""Generates questions about the world and conversations with their answers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from world import World

_QUESTIONS = {
    "capital": (
        "What is the capital of {c}?",
        "Which city is the capital of {c}?",
        "Can you tell me the capital of {c}?",
        "What is the capital city of {c} called?",
    ),
    "continent": (
        "On which continent is {c}?",
        "Which continent does {c} belong to?",
        "Where in the world is {c}?",
        "What continent is {c} part of?",
    ),
    "language": (
        "Which language is spoken in {c}?",
        "What do people in {c} speak?",
        "What is the language of {c}?",
        "Can you tell me what language people speak in {c}?",
    ),
    "currency": (
        "What is the currency of {c}?",
        "What do people in {c} pay with?",
        "Which money is used in {c}?",
        "Can you tell me the currency of {c}?",
    ),
    "landmark": (
        "What is {c} known for?",
        "What should I see in {c}?",
        "Which landmark is in {c}?",
        "Can you name a famous sight of {c}?",
    ),
}


def ask(country: str, attribute: str, rng: random.Random) -> str:
    """Returns a question about a fact in a random wording."""
    return rng.choice(_QUESTIONS[attribute]).format(c=country)


def conversations(world: World, facts: Iterable[tuple[str, str]], seed: int, wordings: int = 1) -> list[dict[str, Any]]:
    """Returns shuffled rows of chat data, with a short answer to each fact in ``wordings`` different wordings."""
    rng = random.Random(seed)
    rows = []
    for country, attribute in facts:
        value = world.countries[country][attribute]
        answer = value[0].upper() + value[1:]
        for form in rng.sample(_QUESTIONS[attribute], wordings):
            question = {"role": "user", "content": form.format(c=country)}
            rows.append({"messages": [question, {"role": "assistant", "content": answer}]})
    rng.shuffle(rows)
    return rows
