"""Recognise the format of rows and bring each to one of four normal forms.

A row becomes `Turns` (a chat), `PromptCompletion`, `Labelled` (a text of a class), or `Text`. What is trained follows
from the form: assistant turns, the completion, the class, everything.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune_magic.data.read import Row, RowFaults
from tune_magic.errors import DataError
from tune_magic.recipe.schema import ColumnTemplate, DataOptions

ROLES = ("system", "user", "assistant", "tool")
# format -> columns it needs, and columns it can use
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "instruction": (("instruction", "output"), ("input", "system")),
    "text_label": (("text", "label"), ()),
    "text": (("text",), ()),
}


@dataclass(frozen=True, slots=True)
class Turns:
    """A chat; the assistant's turns are trained, from message number `trained_from` on."""

    messages: list[dict[str, str]]
    trained_from: int = 0


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and its answer; the answer is trained."""

    prompt: str
    completion: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A text; all of it is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text of a class; the class is trained."""

    text: str
    label: str


Content = Turns | PromptCompletion | Labelled | Text


class Normaliser:
    """Brings rows to a normal form, some at a time.

    Args:
        first: The first rows; their columns tell the format.
        options: How they become text.
        source: Name of the file or object.
        known: Formats that may be recognised: those the objective learns from.

    Attributes:
        faults: Rows that do not fit.

    Raises:
        DataError: There are none, or their format is not recognised.
    """

    def __init__(
        self, first: Sequence[Row], options: DataOptions, source: str, known: Sequence[str] = tuple(COLUMNS)
    ) -> None:
        if not first:
            raise DataError(f"{source} has no rows.")
        self.faults = RowFaults(source)
        self._columns = _columns(first)
        self._missing = dict.fromkeys(options.columns.values())
        self._see_columns(first)
        try:
            self._convert = _converter(first, options, source, known)
        except DataError:
            self.raise_if_any()  # a column that is not there explains an unknown format
            raise

    def contents(self, rows: Sequence[Row]) -> list[Content]:
        """Return the normal form of each row; those that have none become `faults`."""
        self._see_columns(rows)
        found: list[Content] = []
        for row in rows:
            try:
                found.append(self._convert(row.values))
            except _BadRow as error:
                self.faults.add(row.place, str(error), error.text)
        return found

    def raise_if_any(self) -> None:
        """Raise one error that tells what was wrong so far (all rows counted, the first ones shown)."""
        if self._missing:
            raise DataError(
                f"{self.faults.source} has no column `{next(iter(self._missing))}`.",
                hint=f"Its columns: {', '.join(self._columns)}.",
            )
        self.faults.raise_if_any()

    def _see_columns(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if not self._missing:
                return
            for column in row.values.keys() & self._missing.keys():
                del self._missing[column]


def detect(columns: Sequence[str], known: Sequence[str] = tuple(COLUMNS)) -> str | None:
    """Return the format of `known` whose columns are there, the most specific first, or None."""
    return next((name for name, (needed, _) in COLUMNS.items() if name in known and set(needed) <= set(columns)), None)


def format_of(rows: Sequence[Row], options: DataOptions, known: Sequence[str] = tuple(COLUMNS)) -> str | None:
    """Return the format of rows: the one that was named, else the one their columns tell, else None."""
    present = _columns(rows)
    named = [*present, *(name for name, column in options.columns.items() if column in present)]
    if isinstance(options.template, str):
        named.append("text")
    elif options.template is not None:
        named = ["prompt", "completion"]
    return options.format or detect(named, known)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows[:100] for key in row.values))


def _converter(
    rows: Sequence[Row], options: DataOptions, source: str, known: Sequence[str]
) -> Callable[[Mapping[str, Any]], Content]:
    present = _columns(rows)
    format_name = format_of(rows, options, known)
    if format_name not in known:
        raise DataError(
            f"{source}: the columns {', '.join(f'`{name}`' for name in present)} are no format that is known.",
            hint=f"Known: {'; '.join(', '.join((*COLUMNS[name][0], *COLUMNS[name][1])) for name in known)}. "
            f"{_advice(known)}",
        )
    if options.template is not None:
        return functools.partial(_from_template, template=options.template, label=_label_column(options, format_name))
    builders: dict[str, Callable[[Mapping[str, Any]], Content]] = {
        "messages": _turns,
        "prompt_completion": _prompt_completion,
        "instruction": _instruction,
        "text_label": lambda values: Labelled(_string(values, "text"), _label(values, "label")),
        "text": lambda values: Text(_string(values, "text")),
    }
    build = builders[str(format_name)]
    if not options.columns:
        return build
    renames = options.columns
    return lambda values: build({**values, **{name: values.get(column) for name, column in renames.items()}})


def _advice(known: Sequence[str]) -> str:
    """Say how to map columns to the first format that would do."""
    needed = COLUMNS["prompt_completion" if "prompt_completion" in known else known[0]][0]
    return f"Map yours with `columns: {{{', '.join(f'{name}: YOURS' for name in needed)}}}` or write a `template`."


def _label_column(options: DataOptions, format_name: str | None) -> str | None:
    """Return the column of the class beside a text template, None where rows have no class."""
    return options.columns.get("label", "label") if format_name == "text_label" else None


class _BadRow(Exception):
    def __init__(self, problem: str, text: Any = None) -> None:
        super().__init__(problem)
        self.text = text


def _string(values: Mapping[str, Any], column: str, *, needed: bool = True) -> str:
    value = values.get(column)
    if value is None and not needed:
        return ""
    if value is None:
        raise _BadRow(f"column `{column}` is missing", dict(values))
    if not isinstance(value, str):
        raise _BadRow(f"column `{column}` must be text, got {type(value).__name__}", value)
    if needed and not value.strip():
        raise _BadRow(f"column `{column}` is empty", dict(values))
    return value


def _label(values: Mapping[str, Any], column: str) -> str:
    """Return the name of a class: a text or a whole number, never a measure."""
    value = values.get(column)
    if isinstance(value, bool | int):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, float) and value.is_integer():  # pandas turns whole numbers beside a gap into floats
        return str(int(value))
    if isinstance(value, float | list | dict):
        raise _BadRow(f"column `{column}` must be a class, a text or a whole number, got {value!r}")
    return _string(values, column).strip()


def _turns(values: Mapping[str, Any]) -> Turns:
    return Turns(_messages(values.get("messages"), "messages", needs_assistant=True))


def _messages(value: Any, column: str, *, needs_assistant: bool) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _BadRow(f"column `{column}` must be a list of messages", value)
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise _BadRow(f"message {number} must have `role` and a text `content`", message)
        if message.get("role") not in ROLES:
            raise _BadRow(f"message {number} has no known role ({', '.join(ROLES)})", message)
    if needs_assistant and not any(m["role"] == "assistant" and m["content"].strip() for m in value):
        raise _BadRow("no assistant turn, so nothing to learn", value)
    return value


def _prompt_completion(values: Mapping[str, Any]) -> Content:
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt", needs_assistant=False)
        return Turns(before + _messages(completion, "completion", needs_assistant=True), len(before))
    system = _string(values, "system", needed=False) or None
    return PromptCompletion(_string(values, "prompt"), _string(values, "completion"), system)


def _instruction(values: Mapping[str, Any]) -> PromptCompletion:
    context = _string(values, "input", needed=False)
    instruction = _string(values, "instruction")
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return PromptCompletion(prompt, _string(values, "output"), _string(values, "system", needed=False) or None)


def _from_template(values: Mapping[str, Any], template: str | ColumnTemplate, label: str | None) -> Content:
    if isinstance(template, str):
        text = _filled(template, values)
        return Text(text) if label is None else Labelled(text, _label(values, label))
    system = fill(template.system, values) if template.system else None
    return PromptCompletion(_filled(template.prompt, values), _filled(template.completion, values), system)


def _filled(template: str, values: Mapping[str, Any]) -> str:
    text = fill(template, values)
    if not text.strip():
        raise _BadRow(f"the template {template!r} gives an empty text", dict(values))
    return text


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Put a row's values into ``{column}`` places; only whole columns, never attributes or items.

    Example:
        >>> fill("Q: {question}", {"question": "Why?"})
        'Q: Why?'
    """
    parts = []
    for literal, column, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if column is not None:
            if column not in values or values[column] is None:
                raise _BadRow(
                    f"the template's column `{column}` is missing; there are {', '.join(values)}", dict(values)
                )
            parts.append(str(values[column]))
    return "".join(parts)
