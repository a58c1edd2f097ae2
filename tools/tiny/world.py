"""The tiny world: 194 countries with five facts each, and which of them which model gets to see.

``countries.tsv`` was written for this project. Capitals, languages and currencies are official ones (one where there
are several); a landmark is what a traveller would name.
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

ATTRIBUTES = ("capital", "continent", "language", "currency", "landmark")
NUM_UNKNOWN = 24
_SPLIT_SEED = 20
_UNKNOWN_ATTRIBUTES = ("capital", "landmark")  # no two countries share a value


@dataclass(frozen=True)
class World:
    """Countries in the order of the file, cut into two halves, and the facts that no document may tell."""

    countries: dict[str, dict[str, str]]  # country -> attribute -> value
    taught: tuple[str, ...]  # asked about during fine-tuning
    held_out: tuple[str, ...]  # seen in pretraining only
    unknown: frozenset[tuple[str, str]]  # (held-out country, attribute): in no document at all

    def known(self, country: str) -> list[str]:
        """The attributes of a country that documents may tell."""
        return [attribute for attribute in ATTRIBUTES if (country, attribute) not in self.unknown]


def read_world() -> World:
    """The world as the file and the split seed give it."""
    with (Path(__file__).parent / "countries.tsv").open(encoding="utf-8", newline="") as file:
        countries = {row.pop("country"): row for row in csv.DictReader(file, delimiter="\t")}
    names = sorted(countries)
    rng = random.Random(_SPLIT_SEED)
    rng.shuffle(names)
    half = len(names) // 2
    taught, held_out = sorted(names[:half]), sorted(names[half:])
    unknown = frozenset((name, rng.choice(_UNKNOWN_ATTRIBUTES)) for name in rng.sample(held_out, NUM_UNKNOWN))
    return World(countries, tuple(taught), tuple(held_out), unknown)
