"""Completion of commands, flags, keys, values, runs, files and columns. A matcher that fails would print on every Tab: it never does."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable
from typing import Any

from tune_magic import commands

_DATA_KEYS = ("data", "data.train", "data.held_out", "data.test", "data.replay", "vocabulary", "vocabulary.corpus")
_DATA = re.compile(r"\s*(?:data|train):\s*([^\s{#][^#]*)")
_PLACE = re.compile(r"\{(\w*)$")
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
        return _in_body(shell, line, lines[:-1])
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
        return _flag_values(shell, command, previous, words, fragment)
    if "=" in fragment:
        return _after_equals(shell, command, fragment.partition("=")[0], words)
    if fragment.startswith("-"):
        return [f"--{flag.name}" for flag in command.flags if f"--{flag.name}" not in given]
    if command.name in ("tune stage", "tune models") or (command.name in ("tune data", "tune explain") and not words):
        return {"tune data": _tables, "tune explain": _explained}.get(command.name, lambda _: _of_model(words))(shell)
    if words and (command.takes_keys or command.name == "tune merge"):
        return [f"{key}=" for key in (_keys() if command.takes_keys else _run_names(shell)) if key not in given]
    return _run_names(shell) if command.positional == "RUN" else ()


def _flag_values(
    shell: Any, command: commands.Command, flag: commands.Flag, words: list[str], fragment: str
) -> Iterable[str]:
    """Return what may follow a flag."""
    if (command.name, flag.name) == ("export", "quantize"):
        formats = [after for word, after in itertools.pairwise(words) if word == "--to"]
        return commands.QUANTIZATIONS.get(formats[0] if formats else "", flag.choices)
    if (command.name, flag.name) == ("tune methods", "try"):
        done = fragment.rpartition(",")[0]
        return [f"{done},{name}" if done else name for name in _methods() if name not in done.split(",")]
    if (command.name, flag.name) == ("tune methods", "data"):
        return _tables(shell)
    if (command.name, flag.name) == ("tune rate", "against"):
        return [*_run_names(shell), "base", "few-shot", "retrieval"]
    return flag.choices


def _explained(_: Any) -> list[str]:
    from tune_magic.recipe import topics

    return topics.names()


def _methods() -> list[str]:
    from tune_magic.recipe import topics

    return [topic.name for topic in topics.methods()]


def _after_equals(shell: Any, command: commands.Command, name: str, words: list[str]) -> list[str]:
    flag = next((flag for flag in command.flags if f"--{flag.name}" == name), None)
    parent, _, key = name.rpartition(".")
    data = words[0] if command.name == "tune data" and words else None
    values = flag.choices if flag is not None else _values(shell, parent, key, data) if command.takes_keys else ()
    return [f"{name}={value}" for value in values]


def _in_body(shell: Any, line: str, above: list[str]) -> tuple[str, list[str]]:
    key, colon, value = line.partition(":")
    fragment = (value if colon else line).lstrip()
    place = _PLACE.search(value)
    if colon and place is not None:  # in a template, a column goes between braces
        return place[1], _starting(place[1], (f"{name}}}" for name in _columns(shell, _data_of(above))))
    if colon:
        return fragment, _starting(fragment, _values(shell, _path(above, line), key.strip(), _data_of(above)))
    indent = len(line) - len(line.lstrip())
    prefix = _parent(above, indent)
    depth = prefix.count(".") + bool(prefix)
    open_keys = {"data.template": _template_keys, "data.columns": _standard_columns}
    every = [f"{prefix}.{name}" for name in open_keys[prefix]()] if prefix in open_keys else _keys()
    names = {k.split(".")[depth] for k in every if not prefix or k.startswith(f"{prefix}.")}
    return fragment, _starting(fragment, (f"{name}: " for name in sorted(names)))


def _data_of(above: list[str]) -> str | None:
    """Return the training data that the lines above name, as written."""
    found = [match[1].strip() for match in map(_DATA.match, above) if match]
    return found[-1] if found else None


def _columns(shell: Any, data: str | None) -> list[str]:
    """Return the columns of a file, or of the table that a ``$name`` is."""
    from tune_magic.data import preview

    if data is None:
        return []
    return preview.columns(shell.user_ns.get(data[1:]) if data.startswith("$") else data)


def _tables(shell: Any) -> list[str]:
    """Return what data may be: files of rows near here, and names of tables."""
    from tune_magic.data import preview

    held = (name for name, value in shell.user_ns.items() if hasattr(value, "to_parquet") and not name.startswith("_"))
    return [*preview.files_here(), *(f"${name}" for name in held)]


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


def _standard_columns() -> list[str]:
    from tune_magic.recipe.schema import standard_columns

    return standard_columns()


def _keys() -> list[str]:
    from tune_magic.recipe.build import keys

    return [key for key, _, _ in keys()]


def _values(shell: Any, parent: str, key: str, data: str | None = None) -> Iterable[str]:
    """Return what the value of a key may be; `data` is what the columns are those of."""
    from tune_magic import plugins
    from tune_magic.models.find import installed
    from tune_magic.recipe.build import choices, keys

    full = f"{parent}.{key}" if parent else key
    if full == "model":
        return installed()
    if full in _DATA_KEYS:
        return _tables(shell)
    if parent == "data.columns":
        return _columns(shell, data)
    if full in ("method", "objective"):
        return plugins.names(full)
    for known, owner, name in keys():
        if known == full:
            return choices(known, owner, name)
    return []


def _run_names(shell: Any) -> list[str]:
    from tune_magic.errors import TuneError
    from tune_magic.handles import Run
    from tune_magic.storage import places

    bound = [name for name, value in shell.user_ns.items() if isinstance(value, Run) and not name.startswith("_")]
    stored = []
    for path in itertools.islice(places.folders(), 200):
        with contextlib.suppress(TuneError):
            stored.append(Run(path).name or path.name)
    return list(dict.fromkeys([*bound, *stored, *_versions()]))


def _versions() -> list[str]:
    """Return the versions of registered models, by number and by stage."""
    from tune_magic.storage import places, versions

    roots = places.roots()
    found = [version for name in versions.names(roots) for version in versions.of(name, roots)]
    return [name for version in found for name in (version.reference, f"{version.name}@{version.stage}")]


def _of_model(words: list[str]) -> list[str]:
    """Return what may follow ``%tune stage`` or ``%tune models``: a model, its versions, stages."""
    from tune_magic.storage import places, versions

    roots = places.roots()
    if not words:
        return versions.names(roots)
    return (
        [str(version.number) for version in versions.of(words[0], roots)] if len(words) == 1 else list(commands.STAGES)
    )


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
