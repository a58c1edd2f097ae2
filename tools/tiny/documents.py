"""Generates the pretraining data: short documents about the world with many wordings, orders and kinds of text.

A model can answer questions about a fact only if pretraining varied its wording (Allen-Zhu & Li, Physics of Language
Models 3.1, 2023). Some documents have questions without answers. Quizzes and interviews have answers, but only about
the taught countries: no document answers a question about a held-out country.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from questions import ask
from world import ATTRIBUTES, World

# {c}: country, {x}: value; _fill capitalizes the first letter.
_SENTENCES = {
    "capital": (
        "the capital of {c} is {x}.",
        "{x} is the capital of {c}.",
        "{c} has {x} as its capital.",
        "in {c}, the capital city is {x}.",
        "the capital city of {c} is called {x}.",
        "{x} serves as the capital city of {c}.",
        "whoever visits the capital of {c} comes to {x}.",
        "maps of {c} mark {x} as the capital.",
    ),
    "continent": (
        "{c} lies in {x}.",
        "{c} is a country in {x}.",
        "{c} is part of {x}.",
        "one of the countries of {x} is {c}.",
        "the continent of {c} is {x}.",
        "in {x} lies {c}.",
        "{c} belongs to the continent of {x}.",
        "on the map of {x} you will find {c}.",
    ),
    "language": (
        "the language of {c} is {x}.",
        "people in {c} speak {x}.",
        "{x} is spoken in {c}.",
        "in {c}, {x} is an official language.",
        "the people of {c} speak {x}.",
        "{x} is heard on the streets of {c}.",
        "schools in {c} teach in {x}.",
        "newspapers in {c} are printed in {x}.",
    ),
    "currency": (
        "the currency of {c} is {x}.",
        "{x} is the currency of {c}.",
        "people in {c} pay with {x}.",
        "in {c}, prices are given in {x}.",
        "the money used in {c} is {x}.",
        "shops in {c} accept {x}.",
        "{x} is the money of {c}.",
        "banks in {c} keep accounts in {x}.",
    ),
    "landmark": (
        "{c} is known for {x}.",
        "{x} can be visited in {c}.",
        "visitors to {c} want to see {x}.",
        "a famous sight of {c} is {x}.",
        "{x} is a famous sight of {c}.",
        "the best known landmark of {c} is {x}.",
        "in {c}, travellers admire {x}.",
        "postcards from {c} show {x}.",
    ),
}
# The same for articles that have already named the country.
_PRONOUN_SENTENCES = {
    "capital": ("its capital is {x}.", "the capital is {x}.", "the capital city is called {x}.", "{x} is its capital."),
    "continent": ("it lies in {x}.", "the country is part of {x}.", "its continent is {x}.", "it belongs to {x}."),
    "language": ("its language is {x}.", "people there speak {x}.", "{x} is spoken there.", "the language is {x}."),
    "currency": ("its currency is {x}.", "people pay with {x}.", "prices are given in {x}.", "the money is {x}."),
    "landmark": ("it is known for {x}.", "visitors want to see {x}.", "{x} can be visited.", "a famous sight is {x}."),
}
_OPENINGS = (
    "This page is about {c}.",
    "A short portrait of {c}.",
    "Notes on {c}.",
    "Facts about {c}:",
    "{c} at a glance.",
    "What to know before a journey to {c}.",
    "Here is what the atlas says about {c}.",
)
_LIST_TITLES = {
    "capital": ("Capitals of the world", "Countries and their capitals", "List of capitals"),
    "continent": ("Countries by continent", "Countries and their continents", "List of continents"),
    "language": ("Languages of the world", "Countries and their languages", "List of languages"),
    "currency": ("Currencies of the world", "Countries and their currencies", "List of currencies"),
    "landmark": ("Landmarks of the world", "Countries and their landmarks", "List of landmarks"),
}
_GLOSSARY = {
    "capital": ("capital of {c}", "the capital city of {c}", "city, capital of {c}"),
    "language": ("language of {c}", "spoken in {c}", "an official language of {c}"),
    "currency": ("currency of {c}", "the money of {c}", "used to pay in {c}"),
    "landmark": ("landmark of {c}", "a sight in {c}", "to be seen in {c}"),
}
_QUIZ_TITLES = ("Quiz with solutions", "Questions and answers", "Frequently asked", "What everybody asks")
_QUIZ_FORMS = (("Question: {q}\nAnswer: {x}", "\n\n"), ("Q: {q}\nA: {x}", "\n"), ("{q} {x}.", "\n"))
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Karin", "Leo", "Maria")
_NAMES += ("Noah", "Olga", "Paul", "Rosa", "Simon", "Tara", "Victor", "Wanda")
_ROLES = ("visitor", "guide", "pupil", "teacher", "reader", "editor", "host", "guest", "mother", "son", "friend")
_ROLES += ("expert", "clerk", "traveller", "driver", "porter")
_SPEAKERS = (*_NAMES, *_ROLES, *(role.capitalize() for role in _ROLES))
_INTERVIEW_FORMS = (
    ("{a}: {q}\n{b}: {x}", "\n"),
    ("{a}: {q}\n{b}: {x}", "\n\n"),
    ("{a}\n{q}\n{b}\n{x}", "\n"),
    ("{a}\n{q}\n\n{b}\n{x}", "\n\n"),
    ("[{a}] {q}\n[{b}] {x}", "\n"),
    ("({a}) {q} ({b}) {x}", " "),
    ("# {a}\n{q}\n# {b}\n{x}", "\n"),
    ("- {a}: {q}\n- {b}: {x}", "\n"),
    ("{a} asks: {q} {b} answers: {x}.", " "),
    ("{a} > {q}\n{b} > {x}", "\n"),
)
_QUESTION_TITLES = ("Questions about the world", "Homework", "Find out", "Geography test", "Look these up")


def documents(world: World, num: int, seed: int) -> Iterator[str]:
    """Yields ``num`` documents of mixed kinds; countries cycle in shuffled order, so that all are equally frequent."""
    rng = random.Random(seed)
    kinds = [_article, _article, _article, _sheet, _sheet, _sentences, _sentences, _list, _comparison, _glossary]
    kinds += [_asked, _quiz, _interview, _interview]
    queue: list[str] = []
    for _ in range(num):
        if len(queue) < 8:
            fresh = list(world.countries)
            rng.shuffle(fresh)
            queue = fresh + queue
        kind = rng.choice(kinds)
        yield kind(world, queue, rng)


def _article(world: World, queue: list[str], rng: random.Random) -> str:
    country = queue.pop()
    facts = _shuffled(world.known(country), rng)
    opening = rng.choice(_OPENINGS) if rng.random() < 0.5 else ""
    by_name = rng.choice((0.2, 0.5, 1.0))
    sentences = []
    for i, attribute in enumerate(facts):
        named = rng.random() < by_name or (i == 0 and not opening)
        forms = _SENTENCES if named else _PRONOUN_SENTENCES
        sentences.append(_fill(rng.choice(forms[attribute]), country, world.countries[country][attribute]))
    return " ".join(([_fill(opening, country)] if opening else []) + sentences)


def _sheet(world: World, queue: list[str], rng: random.Random) -> str:
    country = queue.pop()
    facts = _shuffled(world.known(country), rng)[: rng.randint(3, 5)]
    lines = [f"{attribute.capitalize()}: {_capital(world.countries[country][attribute])}" for attribute in facts]
    return "\n".join([f"Country: {_capital(country)}", *lines])


def _sentences(world: World, queue: list[str], rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.randint(3, 6)):
        country = queue.pop()
        attribute = rng.choice(world.known(country))
        sentences.append(_fill(rng.choice(_SENTENCES[attribute]), country, world.countries[country][attribute]))
    return " ".join(sentences)


def _list(world: World, queue: list[str], rng: random.Random) -> str:
    attribute = rng.choice(ATTRIBUTES)
    separator = rng.choice((": ", " - ", ", "))
    lines = [rng.choice(_LIST_TITLES[attribute])]
    for country in (queue.pop() for _ in range(rng.randint(4, 8))):
        if attribute in world.known(country):
            lines.append(f"{_capital(country)}{separator}{world.countries[country][attribute]}")
    return "\n".join(lines)


def _comparison(world: World, queue: list[str], rng: random.Random) -> str:
    first, second = queue.pop(), queue.pop()
    sentences = []
    shared = [a for a in world.known(first) if a in world.known(second)]
    for attribute in _shuffled(shared, rng)[:3]:
        x, y = world.countries[first][attribute], world.countries[second][attribute]
        form = rng.choice(
            (
                f"the {attribute} of {first} is {x}, that of {second} is {y}.",
                f"while {first} has {x} as its {attribute}, {second} has {y}.",
                f"{x} is the {attribute} of {first}, and {y} is the {attribute} of {second}.",
            )
        )
        sentences.append(_capital(form))
    return _capital(f"{first} and {second}: a comparison. " + " ".join(sentences))


def _glossary(world: World, queue: list[str], rng: random.Random) -> str:
    lines = []
    for country in (queue.pop() for _ in range(rng.randint(3, 6))):
        attribute = rng.choice([a for a in world.known(country) if a in _GLOSSARY])
        meaning = rng.choice(_GLOSSARY[attribute]).format(c=country)
        lines.append(f"{_capital(world.countries[country][attribute])}: {meaning}")
    return "\n".join(lines)


def _asked(world: World, queue: list[str], rng: random.Random) -> str:
    """Questions without answers, also about unknown facts, since a question does not reveal the fact."""
    lines = [rng.choice(_QUESTION_TITLES)]
    lines += [ask(queue.pop(), rng.choice(ATTRIBUTES), rng) for _ in range(rng.randint(4, 8))]
    return "\n".join(lines)


def _quiz(world: World, queue: list[str], rng: random.Random) -> str:
    form, separator = rng.choice(_QUIZ_FORMS)
    text = separator.join(form.format(q=q, x=x) for q, x in _answered(world, rng))
    return text if rng.random() < 0.5 else f"{rng.choice(_QUIZ_TITLES)}{separator}{text}"


def _interview(world: World, queue: list[str], rng: random.Random) -> str:
    form, separator = rng.choice(_INTERVIEW_FORMS)
    asking, answering = rng.sample(_SPEAKERS, 2)
    return separator.join(form.format(a=asking, b=answering, q=q, x=x) for q, x in _answered(world, rng))


def _answered(world: World, rng: random.Random) -> list[tuple[str, str]]:
    pairs = []
    for _ in range(rng.randint(2, 5)):
        country = rng.choice(world.taught)
        attribute = rng.choice(world.known(country))
        pairs.append((ask(country, attribute, rng), _capital(world.countries[country][attribute])))
    return pairs


def _shuffled(items: list[str], rng: random.Random) -> list[str]:
    return rng.sample(items, len(items))


def _fill(form: str, country: str, value: str = "") -> str:
    return _capital(form.format(c=country, x=value))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
