"""The command line: ``tune-magic VERB ...``, the same verbs with the same options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tune_magic import api, commands
from tune_magic.commands import BadUsage, HelpWanted
from tune_magic.errors import Stopped, TuneError
from tune_magic.handles import Run
from tune_magic.magics.verbs import do_verb
from tune_magic.recipe import yaml
from tune_magic.recipe.build import build_launch, read_recipe_file
from tune_magic.recipe.twin import twin_code

_PREFIX = "tune-magic "
_NAMES = ("finetune", "evaluate", "export", *commands.VERBS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 not understood, 130 stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(words)
    except HelpWanted as wanted:
        print(wanted)
        return 0
    except BadUsage as error:
        print(f"tune-magic: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"tune-magic: {error}", file=sys.stderr)
        return 130
    except TuneError as error:
        print(f"tune-magic: {error}", file=sys.stderr)
        if error.__cause__ is not None:
            print(f"  cause: {error.__cause__}", file=sys.stderr)
        return 1


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        raise HelpWanted(_overview())
    verb, *rest = words
    command = commands.COMMANDS.get(verb) or commands.COMMANDS.get(f"tune {verb}")
    if command is None:
        raise BadUsage(f"there is no verb {verb}.{commands.nearest(verb, _NAMES)} Verbs: {', '.join(_NAMES)}.")
    parsed = commands.parse(command, rest, _PREFIX)
    if verb == "finetune":
        return _finetune(parsed)
    if verb == "evaluate":
        api.evaluate(_run(parsed.positional), against=[_run(name) for name in parsed.rest], **parsed.flags)
    elif verb == "export":
        if "to" not in parsed.flags:
            raise BadUsage(f"--to is missing. Usage: {command.usage(_PREFIX)}")
        api.export(_run(parsed.positional), beside=[_run(name) for name in parsed.rest], **parsed.flags)
    else:
        do_verb(verb, parsed, _run)
    return 0


def _finetune(parsed: commands.Parsed) -> int:
    if parsed.positional is None:
        raise BadUsage("a recipe file is missing: tune-magic finetune FILE")
    path = Path(parsed.positional)
    overrides = {key: yaml.read(f"value: {value}")[0]["value"] for key, value in parsed.keys.items()}
    recipe = read_recipe_file(path, overrides)
    if parsed.flags.pop("show_code", False):
        print(twin_code(recipe.given(), None, parsed.flags))
        return 0
    api.launch(recipe, build_launch(parsed.flags), name=path.stem, recipe_text=path.read_text(encoding="utf-8"))
    return 0


def _run(name: str | None) -> Run:
    if name is not None:
        return api.load_run(name)
    newest = next(iter(api.runs()), None)
    if newest is None:
        raise BadUsage("there is no run yet")
    return newest


def _overview() -> str:
    rows = [(name, (commands.COMMANDS.get(name) or commands.COMMANDS[f"tune {name}"]).help) for name in _NAMES]
    width = max(len(name) for name in _NAMES)
    lines = [f"  {name:{width}}  {text}" for name, text in rows]
    return "\n".join(["tune-magic VERB ...      (tune-magic VERB -h tells more)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
