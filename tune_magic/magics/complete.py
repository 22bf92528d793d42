"""Completion of commands, flags, keys, values and runs. A matcher that fails would print on every Tab: it never does."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from tune_magic import commands

_MAGIC = re.compile(r"%%?(finetune|evaluate|export|tune)\b")


def make_matcher(shell: Any) -> Any:
    """Return a matcher for IPython's completer (version 2 of its interface)."""

    def tune_magic_matcher(context: Any) -> dict[str, Any]:
        try:
            before = context.full_text[: _offset(context)]
            fragment, found = complete(shell, before)
        except Exception:  # noqa: BLE001 - a completer must never get in the way of typing
            return {"completions": []}
        return _result(fragment, found) if found else {"completions": []}

    tune_magic_matcher.matcher_api_version = 2  # type: ignore[attr-defined]
    tune_magic_matcher.matcher_identifier = "tune_magic"  # type: ignore[attr-defined]
    tune_magic_matcher.matcher_priority = 200  # type: ignore[attr-defined]
    return tune_magic_matcher


def complete(shell: Any, before: str) -> tuple[str, list[str]]:
    """Return the word being typed and what it may become, for the text of a cell up to the cursor."""
    line = before.rsplit("\n", 1)[-1]
    lines = before.split("\n")
    is_body = lines[0].startswith("%%finetune") and len(lines) > 1
    if is_body:
        return _in_body(line, lines[:-1])
    match = _MAGIC.match(line.lstrip())
    if match is None:
        return "", []
    return _on_line(shell, match[1], line.lstrip()[match.end() :])


def _on_line(shell: Any, name: str, rest: str) -> tuple[str, list[str]]:
    *words, fragment = rest.split(" ")
    words = [word for word in words if word]
    if name == "tune" and not words:
        return fragment, _starting(fragment, commands.VERBS)
    command = commands.COMMANDS.get(f"tune {words.pop(0)}" if name == "tune" else name)
    known = _known(shell, command, words, fragment) if command is not None else ()
    return fragment, _starting(fragment, known)


def _known(shell: Any, command: commands.Command, words: list[str], fragment: str) -> Iterable[str]:
    """Return what may stand where `fragment` begins."""
    previous = next((flag for flag in command.flags if words[-1:] == [f"--{flag.name}"]), None)
    given = {word.partition("=")[0] for word in words}
    if previous is not None and previous.value is not None:
        return previous.choices
    if "=" in fragment:
        return _after_equals(command, fragment.partition("=")[0])
    if fragment.startswith("-"):
        return [f"--{flag.name}" for flag in command.flags if f"--{flag.name}" not in given]
    if command.takes_keys and words:
        return [f"{key}=" for key in _keys() if key not in given]
    return _run_names(shell) if command.positional == "RUN" else ()


def _after_equals(command: commands.Command, name: str) -> list[str]:
    flag = next((flag for flag in command.flags if f"--{flag.name}" == name), None)
    parent, _, key = name.rpartition(".")
    values = flag.choices if flag is not None else _values(parent, key) if command.takes_keys else ()
    return [f"{name}={value}" for value in values]


def _in_body(line: str, above: list[str]) -> tuple[str, list[str]]:
    key, colon, value = line.partition(":")
    fragment = (value if colon else line).lstrip()
    if colon:
        return fragment, _starting(fragment, _values(_path(above, line), key.strip()))
    indent = len(line) - len(line.lstrip())
    prefix = _parent(above, indent)
    depth = prefix.count(".") + bool(prefix)
    every = _keys() if prefix != "data.template" else [f"data.template.{name}" for name in _template_keys()]
    names = {k.split(".")[depth] for k in every if not prefix or k.startswith(f"{prefix}.")}
    return fragment, _starting(fragment, (f"{name}: " for name in sorted(names)))


def _path(above: list[str], line: str) -> str:
    return _parent(above, len(line) - len(line.lstrip()))


def _parent(above: list[str], indent: int) -> str:
    """Return the dotted key under which a line with this indent stands."""
    names: list[str] = []
    for text in reversed(above[1:]):
        own = len(text) - len(text.lstrip())
        if text.strip() and own < indent:
            names.insert(0, text.partition(":")[0].strip())
            indent = own
    return ".".join(names)


def _template_keys() -> list[str]:
    from tune_magic.recipe.schema import ColumnTemplate

    return list(ColumnTemplate.model_fields)


def _keys() -> list[str]:
    from tune_magic.recipe.build import keys

    return [key for key, _, _ in keys()]


def _values(parent: str, key: str) -> Iterable[str]:
    from tune_magic import plugins
    from tune_magic.models.find import installed
    from tune_magic.recipe.build import keys

    full = f"{parent}.{key}" if parent else key
    if full == "model":
        return installed()
    if full in ("method", "method.name", "objective"):
        return plugins.names(full.partition(".")[0])
    for known, owner, name in keys():
        if known == full:
            return _choices(owner.model_fields[name].annotation)
    return []


def _choices(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _run_names(shell: Any) -> list[str]:
    from tune_magic.errors import TuneError
    from tune_magic.handles import Run
    from tune_magic.storage import places

    bound = [name for name, value in shell.user_ns.items() if isinstance(value, Run) and not name.startswith("_")]
    stored = []
    for path in itertools.islice(places.folders(), 200):
        with contextlib.suppress(TuneError):
            stored.append(Run(path).name or path.name)
    return list(dict.fromkeys([*bound, *stored]))


def _starting(fragment: str, known: Iterable[str]) -> list[str]:
    return [name for name in known if name.startswith(fragment)]


def _offset(context: Any) -> int:
    """Return the cursor's place in the whole text."""
    lines = context.full_text.split("\n")
    return sum(len(line) + 1 for line in lines[: context.cursor_line]) + int(context.cursor_position)


def _result(fragment: str, found: list[str]) -> dict[str, Any]:
    from IPython.core.completer import SimpleCompletion

    return {
        "completions": [SimpleCompletion(text=text, type="keyword") for text in found],
        "matched_fragment": fragment,
        "suppress": True,
        "ordered": True,
    }
