"""Write the generated tables of README.md: commands and recipe keys.

python docs/tables.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tune_magic.commands import COMMANDS
from tune_magic.recipe.build import ALIASES, METHOD_ALIASES, choices, keys

README = Path(__file__).parent.parent / "README.md"


def commands_table() -> str:
    """Return every magic with what it does."""
    rows = ["| magic | what it does | options |", "|---|---|---|"]
    for command in COMMANDS.values():
        percent = "%%" if command.name == "finetune" else "%"
        positional = f" {command.positional}" if command.positional else ""
        flags = " ".join(f"`--{flag.name}`" for flag in command.flags)
        rows.append(f"| `{percent}{command.name}{positional}` | {command.help} | {flags} |")
    return "\n".join(rows)


def keys_table() -> str:
    """Return every key of a recipe with its type, default and meaning."""
    names: dict[str, list[str]] = {}
    for alias, key in ALIASES.items():
        names.setdefault(key, []).append(alias)
    for alias, key in METHOD_ALIASES.items():
        names.setdefault(f"method.{key}", []).append(alias)
    rows = ["| key | default | meaning | also understood |", "|---|---|---|---|"]
    for key, owner, name in keys():
        field = owner.model_fields[name]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue  # a part: its own keys follow
        known = [] if field.annotation is bool else [f"`{value}`" for value in choices(key, owner, name)]
        mine = (
            owner.model_fields["name"].default if key.startswith(("method.", "objective.")) and name != "name" else None
        )
        meaning = (
            (f"Of `{mine}`: " if mine else "")
            + str(field.description)
            + (f" One of {', '.join(known)}." if known else "")
        )
        also = ", ".join(f"`{alias}`" for alias in names.get(key, []))
        rows.append(f"| `{key}` | {_default(field)} | {meaning.replace('|', chr(92) + '|')} | {also} |")
    return "\n".join(rows)


def written(text: str) -> str:
    """Return README's text with the tables as they should be."""
    for name, table in (("commands", commands_table()), ("keys", keys_table())):
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "needed" if field.is_required() else "–"
    return (
        "–"
        if field.default in (None, "")
        else f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
    )


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    after = written(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    README.write_text(after, encoding="utf-8")
