"""A plug-in, or a key of a recipe, with a value that people know by a name of its own: `dora` is `lora` with `use_dora`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What a name stands for, and its explanation.

    Attributes:
        options: Keys of the plug-in it belongs to, with their values.
        recipe: Keys of the recipe beside them; where a recipe has no such key, there is no such variant.
        summary: What it does, in one sentence.
        formula: The same as a formula, in plain text.
        source: Where it was published.
        when: When to use it.
        learning_rate: A usual one; None: that of its plug-in.
    """

    summary: str
    formula: str
    source: str
    when: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
