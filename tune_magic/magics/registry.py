"""Verbs of registered models: register, stage, push."""

from __future__ import annotations

from typing import Any

from tune_magic import commands, deploying, display
from tune_magic.commands import BadUsage, Parsed
from tune_magic.handles import Run


def register(run: Run, parsed: Parsed) -> Any:
    """Register a run, or its newest export in a format."""
    flags = dict(parsed.flags)
    if "as" not in flags:
        raise BadUsage(f"--as is missing. Usage: {commands.COMMANDS['tune register'].usage()}")
    name, to = flags.pop("as"), flags.pop("to", None)
    exported = next((one for one in run.exports if one.receipt["to"] == to), None)
    if to is not None and exported is None:
        raise BadUsage(
            f"{run.name or run.id} has no export in the format {to}. `%export {run.name or run.id} --to {to}` makes one."
        )
    found = deploying.register(exported or run, name, **flags)
    display.show_text(f"{found.reference} is the run {run.name or run.id} ({run.id}), {found.stage}.")
    return found if display.in_kernel() else None


def push(run: Run, parsed: Parsed) -> None:
    """Send an export to where others find it."""
    flags = dict(parsed.flags)
    missing = next((name for name in ("to", "repo") if name not in flags), None)
    if missing is not None:
        raise BadUsage(f"--{missing} is missing. Usage: {commands.COMMANDS['tune push'].usage()}")
    deploying.push(run, flags.pop("to"), flags.pop("repo"), **flags)


def stage(parsed: Parsed) -> None:
    """Move a version of a model to a stage."""
    if len(parsed.rest) != 2:
        raise BadUsage(f"Usage: {commands.COMMANDS['tune stage'].usage()}")
    number, to = parsed.rest
    deploying.set_stage(str(parsed.positional), number, to, note=parsed.flags.get("note"))
