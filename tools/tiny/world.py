"""The tiny world: 194 countries with five facts each, and their split into training and held-out data.

``countries.tsv`` was written for this project. Capitals, languages and currencies are official ones (one if there are
several); the landmark is a well-known one.
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
    """Countries in file order, their split into two halves, and the facts that no document contains."""

    countries: dict[str, dict[str, str]]  # country -> attribute -> value
    taught: tuple[str, ...]  # asked about during fine-tuning
    held_out: tuple[str, ...]  # seen in pretraining only
    unknown: frozenset[tuple[str, str]]  # (held-out country, attribute): in no document

    def known(self, country: str) -> list[str]:
        """The attributes of a country that documents contain."""
        return [attribute for attribute in ATTRIBUTES if (country, attribute) not in self.unknown]


def read_world() -> World:
    """Reads the world from the file and splits it with a fixed seed."""
    with (Path(__file__).parent / "countries.tsv").open(encoding="utf-8", newline="") as file:
        countries = {row.pop("country"): row for row in csv.DictReader(file, delimiter="\t")}
    names = sorted(countries)
    rng = random.Random(_SPLIT_SEED)
    rng.shuffle(names)
    half = len(names) // 2
    taught, held_out = sorted(names[:half]), sorted(names[half:])
    unknown = frozenset((name, rng.choice(_UNKNOWN_ATTRIBUTES)) for name in rng.sample(held_out, NUM_UNKNOWN))
    return World(countries, tuple(taught), tuple(held_out), unknown)
