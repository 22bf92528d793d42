"""What every format must do."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from tune_magic.data import content
from tune_magic.data.formats.base import BadRow, Format
from tune_magic.data.read import Row
from tune_magic.testing.trial import Conformance

_JUNK: tuple[Any, ...] = (None, "", " ", 0, -1.5, True, [], {}, [None], [[]], {"x": 1}, "text", ["text"], float("nan"))


class FormatConformance(Conformance):
    """Tests of a `Format`: it knows its rows, brings them to a normal form, and names what is wrong with bad ones.

    Attributes:
        rows: Rows of the format; a subclass sets them.
        bad_rows: Rows with the same columns that are none of it.
    """

    kind = "format"
    rows: ClassVar[Any]
    bad_rows: ClassVar[list[dict[str, Any]]] = []

    def format(self) -> Format:
        """Return it for the columns of `rows`."""
        present = list(dict.fromkeys(column for row in self.rows for column in row))
        columns = self.plugin.find(present, {})
        assert columns is not None, f"it does not know the columns {', '.join(present)}"
        found: Format = self.plugin(columns)
        return found

    def read(self) -> list[Row]:
        """Return the rows as they come from a file."""
        return [Row(values, f"row {number}") for number, values in enumerate(self.rows, start=1)]

    def test_it_knows_its_rows(self) -> None:
        """By columns and first values; other columns are none of it."""
        assert self.format().fits(self.read())
        assert self.plugin.find(["nothing_of_the_kind"], {}) is None
        assert isinstance(self.plugin.rank, int)

    def test_rows_have_a_normal_form_that_can_be_kept(self) -> None:
        """The run folder keeps rows as JSON."""
        form = self.format()
        rows = list(form.assemble(self.read()))
        assert rows, "no rows are left"
        for row in rows:
            found = form.content(row.values)
            assert type(found).__module__ == content.__name__, f"{found!r} is no normal form"
            if any(content.texts(found)):
                assert json.loads(json.dumps(content.to_plain(found)))["kind"] == type(found).__name__

    def test_bad_rows_are_told(self) -> None:
        """By `BadRow`, never by another error, whatever the values are."""
        form = self.format()
        for row in self.bad_rows:
            try:
                found = form.content(row)
            except BadRow as error:
                assert str(error).strip(), "what is wrong is not said"
            else:
                raise AssertionError(f"{row} was taken as {found}")
        good = next(iter(form.assemble(self.read()))).values
        for name in {*good} & {*form.columns.values()}:
            for junk in _JUNK:
                try:
                    form.content({**good, name: junk})
                except BadRow as error:
                    assert str(error).strip(), "what is wrong is not said"
