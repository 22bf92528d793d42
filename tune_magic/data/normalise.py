"""Recognise the format of rows and bring each to its normal form."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tune_magic import plugins
from tune_magic.data.content import Content, Labelled, PromptCompletion, Text
from tune_magic.data.formats.base import BadRow, Format, Values
from tune_magic.data.read import Row, RowFaults
from tune_magic.errors import DataError
from tune_magic.recipe.schema import ColumnTemplate, SourceOptions

_HEAD_ROWS = 100  # whose columns and values tell the format


@dataclass(frozen=True)
class Recognised:
    """A format that rows are in.

    Attributes:
        name: Of the format; of a template, the format whose rows it makes.
        format: What brings rows to normal form.
        columns: The file's column for each standard name.
    """

    name: str
    format: Format
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """What told it, in words."""
        if isinstance(self.format, Templated):
            return "as the recipe's template says"
        said = [name if name == column else f"{column} as {name}" for name, column in self.columns.items()]
        return f"column{'s' if len(said) > 1 else ''} {', '.join(said)}"


class Templated(Format):
    """Rows that a template of the recipe turns into a text, a text of a class, or a prompt and its completion.

    Args:
        template: The recipe's.
        label: Column of the class, None where rows have none.
    """

    needs = ()

    def __init__(self, template: str | ColumnTemplate, label: str | None) -> None:
        super().__init__({} if label is None else {"label": label})
        self._template = template
        self.objective = "sft" if label is None else "classify"  # type: ignore[misc]

    def content(self, values: Values) -> Content:
        """Return what the template makes of a row."""
        template = self._template
        if isinstance(template, str):
            text = _filled(template, values)
            return Labelled(text, self.label(values)) if self.columns else Text(text)
        system = fill(template.system, values) if template.system else None
        return PromptCompletion(_filled(template.prompt, values), _filled(template.completion, values), system)


class Normaliser:
    """Brings rows to a normal form, some at a time.

    Args:
        first: The first rows; their columns tell the format.
        options: How they become text.
        faults: Takes rows that do not fit.
        known: Formats that may be recognised: those the objective learns from. None: all.
        also: A column that must be there too.

    Attributes:
        recognised: The format, and what told it.

    Raises:
        DataError: There are none, or their format is not recognised.
    """

    def __init__(
        self, first: Sequence[Row], options: SourceOptions, faults: RowFaults, known: Sequence[str] | None = None, *,
        also: str | None = None,
    ) -> None:  # fmt: skip
        if not first:
            raise DataError(f"{faults.source} has no rows.")
        self._faults = faults
        self._columns = _columns(first)
        self._missing = dict.fromkeys([*options.columns.values(), *filter(None, [also])])
        self._see_columns(first)
        try:
            self.recognised = _recognised(first, options, faults.source, known)
        except DataError:
            self.raise_if_any()  # a column that is not there explains an unknown format
            raise

    def contents(self, rows: Sequence[Row]) -> list[Content | None]:
        """Return the normal form of each row, None for those that have none, which become faults."""
        self._see_columns(rows)
        found: list[Content | None] = []
        convert = self.recognised.format.content
        for row in rows:
            try:
                found.append(convert(row.values))
            except BadRow as error:
                self._faults.add(row.place, str(error), error.text)
                found.append(None)
        return found

    def assemble(self, rows: Iterable[Row]) -> Iterable[Row]:
        """Return rows that each stand alone, of rows as the file has them."""
        return self.recognised.format.assemble(rows)

    def raise_if_any(self) -> None:
        """Raise one error that tells what was wrong so far (all rows counted, the first ones shown)."""
        if self._missing:
            raise DataError(
                f"{self._faults.source} has no column `{next(iter(self._missing))}`.",
                hint=f"Its columns: {', '.join(self._columns)}.",
            )
        self._faults.raise_if_any()

    def _see_columns(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if not self._missing:
                return
            for column in row.values.keys() & self._missing.keys():
                del self._missing[column]


def _formats() -> list[tuple[str, type[Format]]]:
    """Return every format that imports, in the order they are tried."""
    return sorted(plugins.working("format"), key=lambda pair: (pair[1].rank, pair[0]))


def recognise(rows: Sequence[Row], options: SourceOptions, known: Sequence[str] | None = None) -> Recognised | None:
    """Return the format of rows: the one that was named, else the first whose columns and values are there.

    Args:
        rows: The first rows of a source.
        options: The recipe's word about them.
        known: Formats that count; None: all.
    """
    if options.template is not None:
        return _templated(rows, options, known)
    present, head = _columns(rows), rows[:_HEAD_ROWS]
    for name, kind in _formats():
        if (known is not None and name not in known) or options.format not in (None, name):
            continue
        columns = kind.find(present, options.columns)
        if options.format is not None:
            columns = columns or {wanted: options.columns.get(wanted, wanted) for wanted in kind.needs}
        elif columns is None or not kind(columns).fits(head):
            continue
        return Recognised(name, kind(columns), columns)
    return None


def _templated(rows: Sequence[Row], options: SourceOptions, known: Sequence[str] | None) -> Recognised | None:
    template = options.template
    assert template is not None
    label = options.columns.get("label", "label")
    has_label = isinstance(template, str) and (label in _columns(rows) or "label" in options.columns)
    has_label = has_label and (known is None or "text_label" in known)
    name = "text_label" if has_label else "text" if isinstance(template, str) else "prompt_completion"
    if known is not None and name not in known:
        return None
    return Recognised(name, Templated(template, label if has_label else None), {"label": label} if has_label else {})


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows[:_HEAD_ROWS] for key in row.values))


def _recognised(rows: Sequence[Row], options: SourceOptions, source: str, known: Sequence[str] | None) -> Recognised:
    found = recognise(rows, options, known)
    if found is not None:
        return found
    other = recognise(rows, options)
    present = ", ".join(f"`{name}`" for name in _columns(rows))
    if other is not None and known is not None:
        raise DataError(
            f"{source} is recognised as `{other.name}` ({other.why}), and this objective learns from: "
            f"{', '.join(known)}.",
            hint=_other_way(other),
        )
    names = [name for name, _ in _formats()] if known is None else list(known)
    kinds = dict(_formats())
    known_columns = "; ".join(", ".join((*kinds[name].needs, *kinds[name].uses)) for name in names if name in kinds)
    raise DataError(
        f"{source}: the columns {present} are no format that is known.",
        hint=f"Known: {known_columns}. {_advice(names)}",
    )


def unlearned(found: Recognised, source: str) -> DataError:
    """Return the error that says that nothing installed learns from such rows."""
    return DataError(
        f"{source} is recognised as `{found.name}` ({found.why}); what learns from such rows is the objective "
        f"`{found.format.objective}`, which is not installed.",
        hint=_other_way(found),
    )


def _other_way(found: Recognised) -> str:
    advice = f"To learn from them otherwise: `{found.format.advice}`. " if found.format.advice else ""
    return f"{advice}Objectives that are: {', '.join(plugins.names('objective'))}; `columns` or `template` map rows to them."


def _advice(known: Sequence[str]) -> str:
    """Say how to map columns to the first format that would do."""
    name = "prompt_completion" if "prompt_completion" in known else known[0]
    needed = dict(_formats())[name].needs
    return f"Map yours with `columns: {{{', '.join(f'{name}: YOURS' for name in needed)}}}` or write a `template`."


def _filled(template: str, values: Mapping[str, Any]) -> str:
    text = fill(template, values)
    if not text.strip():
        raise BadRow(f"the template {template!r} gives an empty text", dict(values))
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
                raise BadRow(
                    f"the template's column `{column}` is missing; there are {', '.join(values)}", dict(values)
                )
            parts.append(str(values[column]))
    return "".join(parts)
