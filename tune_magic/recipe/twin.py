"""The Python twin of a cell: the same run as a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def twin_code(recipe: Mapping[str, Any], name: str | None, launch: Mapping[str, Any]) -> str:
    """Return Python source that starts the same run.

    Args:
        recipe: The keys as given, see `Recipe.given`.
        name: Name of the run.
        launch: Launch options that differ from their defaults.

    Example:
        >>> print(twin_code({"model": "tiny", "data": {"train": "$df"}}, "bot", {}))
        import tune_magic
        <BLANKLINE>
        bot = tune_magic.finetune(
            name='bot',
            model='tiny',
            data={'train': df},
        )
    """
    keywords: dict[str, Any] = {**({"name": name} if name else {}), **recipe, **launch}
    lines = [f"    {key}={_literal(value)}," for key, value in keywords.items()]
    return "\n".join(["import tune_magic", "", f"{name or 'run'} = tune_magic.finetune(", *lines, ")"])


def merge_code(about: Mapping[str, Any], name: str | None) -> str:
    """Return Python source that merges the same runs again.

    Args:
        about: What ``run.json`` says of the merge.
        name: Name of the run.
    """
    chosen = dict(about["combination"])
    ids = {source["name"]: source["id"] for source in about["sources"]}
    weights = {ids[one]: weight for one, weight in chosen.pop("weights").items()}
    keywords = {
        **({"name": name} if name else {}),
        **{key: value for key, value in chosen.items() if value is not None},
    }
    call = ", ".join([_literal(weights), *(f"{key}={_literal(value)}" for key, value in keywords.items())])
    return f"import tune_magic\n\n{name if name and name.isidentifier() else 'run'} = tune_magic.merge_adapters({call})"


def _literal(value: Any) -> str:
    if isinstance(value, str) and value.startswith("$") and value[1:].isidentifier():
        return value[1:]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)
