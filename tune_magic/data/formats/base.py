"""What a format is: the contract every format plug-in keeps."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from tune_magic.data.content import Content
from tune_magic.data.read import Row

Values = Mapping[str, Any]


class BadRow(Exception):
    """A row that does not fit its format.

    Args:
        problem: What is wrong, for people.
        text: The part of the row to show.
    """

    def __init__(self, problem: str, text: Any = None) -> None:
        super().__init__(problem)
        self.text = text


class Format(abc.ABC):
    """Base class of formats.

    Args:
        columns: The file's column for each standard name it has one for.

    Attributes:
        needs: Standard names of the columns it must have.
        uses: Standard names of those it can use.
        also: Other names that files in the wild give to a standard column.
        rank: Formats are tried in this order; the more specific have the lower number.
        objective: What learns from such rows unless the recipe says otherwise.
        advice: A line of a recipe that lets another objective learn from such rows, where there is one.
        group: Column by which rows belong together, so that a split never parts them; None: each stands alone.
    """

    needs: ClassVar[tuple[str, ...]]
    uses: ClassVar[tuple[str, ...]] = ()
    also: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    rank: ClassVar[int] = 50
    objective: ClassVar[str] = "sft"
    advice: ClassVar[str] = ""
    group: ClassVar[str | None] = None

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns

    @classmethod
    def find(cls, present: Sequence[str], mapped: Mapping[str, str]) -> dict[str, str] | None:
        """Return the file's column for each standard name, or None where one that is needed is not there.

        Args:
            present: Columns of the file.
            mapped: The user's own column for a standard name, which wins, and means nothing else then.
        """
        free = [column for column in present if column not in mapped.values()]
        found = {name: column for name, column in mapped.items() if name in (*cls.needs, *cls.uses)}
        for name in (*cls.needs, *cls.uses):
            names = (name, *cls.also.get(name, ()))
            column = next((other for other in names if other in free and other not in found.values()), None)
            if column is not None and name not in found:
                found[name] = column
        return found if all(name in found for name in cls.needs) else None

    def fits(self, rows: Sequence[Row]) -> bool:
        """Return whether the values of the first rows are of this format; its columns are there."""
        return True

    def assemble(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield rows that each stand alone; most do already, but a file may hold one message a row."""
        yield from rows

    @abc.abstractmethod
    def content(self, values: Values) -> Content:
        """Return the normal form of a row.

        Raises:
            BadRow: It has none.
        """

    def value(self, values: Values, name: str) -> Any:
        """Return what a row has under a standard name, None where it has nothing."""
        return values.get(self.columns.get(name))  # type: ignore[arg-type]

    def text(self, values: Values, name: str) -> str:
        """Return the text under a standard name.

        Raises:
            BadRow: There is none.
        """
        value = values.get(self.columns.get(name))  # type: ignore[arg-type]
        if isinstance(value, str) and value and not value.isspace():
            return value
        column = self.columns.get(name, name)
        if value is None:
            raise BadRow(f"column `{column}` is missing", dict(values))
        if not isinstance(value, str):
            raise BadRow(f"column `{column}` must be text, got {type(value).__name__}", value)
        raise BadRow(f"column `{column}` is empty", dict(values))

    def text_or_none(self, values: Values, name: str) -> str | None:
        """Return the text under a standard name, None where it is missing or empty."""
        value = values.get(self.columns.get(name))  # type: ignore[arg-type]
        if value is None:
            return None
        if not isinstance(value, str):
            raise BadRow(f"column `{self.columns[name]}` must be text, got {type(value).__name__}", value)
        return value if value and not value.isspace() else None

    def label(self, values: Values, name: str = "label") -> str:
        """Return the name of a class: a text or a whole number, never a measure."""
        column, value = self.columns.get(name, name), self.value(values, name)
        if isinstance(value, bool | int):
            return str(value).lower() if isinstance(value, bool) else str(value)
        if isinstance(value, float) and value.is_integer():  # pandas turns whole numbers beside a gap into floats
            return str(int(value))
        if isinstance(value, float | list | dict):
            raise BadRow(f"column `{column}` must be a class, a text or a whole number, got {value!r}")
        return self.text(values, name).strip()
