"""How recipes differ, key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested recipe with dotted keys.

    Example:
        >>> flat({"model": "m", "method": {"name": "lora", "r": 8}})
        {'model': 'm', 'method.name': 'lora', 'method.r': 8}
    """
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return each key whose value is not the same in all recipes, with its values; None where a recipe lacks it.

    Example:
        >>> differences([{"seed": 1, "model": "m"}, {"seed": 2, "model": "m"}])
        {'seed': [1, 2]}
    """
    parts = [flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for part in parts for key in part)
    found = {key: [part.get(key) for part in parts] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values[1:])}
