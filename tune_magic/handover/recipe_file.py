"""The recipe as a file that `%finetune FILE` reads back to the same run."""

from __future__ import annotations

from tune_magic.data import locate
from tune_magic.handover.source import Source, comment
from tune_magic.recipe import yaml


def write(source: Source) -> str:
    """Return YAML with every key that was given; a run that never began has one too."""
    lines = [f"The recipe of the run {source.name} ({source.run.id}): `%finetune FILE`, `tune-magic finetune FILE`."]
    prints = source.plan.get("fingerprints", {})
    lines += [f"SHA-256 of {role}: {value}" for role, value in prints.items()]
    tables = [reference for reference in locate.references(source.recipe).values() if reference.startswith("$")]
    if tables:
        lines.append(
            f"{', '.join(tables)}: a table of a notebook, where it needs `%%finetune` with this text below it."
        )
    return f"{comment(lines)}\n{yaml.write(source.recipe.given())}"
