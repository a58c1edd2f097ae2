"""Lists the recipes: configs for a model and the hardware that they were compiled for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sft_jax import builtin

_PLAN_LINE = re.compile(r"^# plan (\S+): (.*)$", re.MULTILINE)
_MODEL_LINE = re.compile(r"^  path: (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A config, and what its header says.

    Attributes:
        title: model, method and hardware in words.
        model: its id on the Hub.
        topology: hardware that ``plan`` compiled it for.
        plan: what ``plan`` found there, in one line.
    """

    path: Path
    title: str
    model: str
    topology: str
    plan: str

    @property
    def name(self) -> str:
        return self.path.stem


def recipes() -> list[Recipe]:
    """Returns all recipes in alphabetical order."""
    return [read_recipe(path) for path in sorted((builtin.configs() / "recipes").glob("*.yaml"))]


def read_recipe(path: Path) -> Recipe:
    """Reads the header of a recipe."""
    text = path.read_text(encoding="utf-8")
    plan, model = _PLAN_LINE.search(text), _MODEL_LINE.search(text)
    assert plan is not None, f"{path} has no line '# plan TOPOLOGY: …'"
    assert model is not None, f"{path} names no model"
    sentence = re.match(r"# (.*?\.)(?= |\n)", text)
    assert sentence is not None, f"{path} has no title"
    return Recipe(path, sentence[1].removesuffix("."), model[1], plan[1], plan[2])


def with_plan(text: str, plan: str) -> str:
    """Returns the text of a recipe with another result of ``plan``."""
    return _PLAN_LINE.sub(lambda match: f"# plan {match[1]}: {plan}", text, count=1)
