"""CSV files: what people bring is all read here, and what we write is all written here.

A spreadsheet runs a text that begins like a formula. We put an apostrophe before such a text, which a spreadsheet shows
as text, and take it away when we read, so that what was written is what is read.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pe_app.common.errors import InputError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What separates columns: a comma by the standard, a semicolon in Excel where the comma is the decimal mark."""

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SEP_LINE = re.compile(r'\s*"?sep=(.)"?[ \t;,]*(?:\r\n|\r|\n|$)', re.IGNORECASE)


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        place: file and line for messages, ``reports.csv line 2``.
        values: by column, without white space at the ends.
    """

    place: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table with a heading.

    Attributes:
        name: of the file.
        columns: as the heading names them, lower case, in its order.
        rows: those that hold anything.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def read_table(path: Path, spelled: Callable[[str], str] = str) -> Table:
    """A CSV whose columns are separated by commas, semicolons or tabs, in UTF-8, or UTF-16 with its mark.

    Excel's first line ``sep=;`` is obeyed; otherwise the heading, which holds no other of the three, tells.

    Args:
        path: the file.
        spelled: the name that a heading's cell, in lower case, stands for.

    Raises:
        InputError: naming file and line, if it cannot be read, a column stands twice, or a row has more or fewer
            values than the heading: then a comma stands in a value without quotation marks, and what the row means
            cannot be known.
    """
    text = _decoded(path)
    lines_before = 0
    delimiter = ""
    if sep := _SEP_LINE.match(text):
        delimiter = sep[1]
        text, lines_before = text[sep.end() :], 1
    delimiter = delimiter or _delimiter(text)
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    columns: tuple[str, ...] | None = None
    rows = []
    line = 1
    try:
        for cells in reader:
            place, line = f"{path.name} line {lines_before + line}", reader.line_num + 1
            cells = [_read_text(cell.strip()) for cell in cells]
            if not any(cells):
                continue
            if columns is None:
                columns = tuple(spelled(cell.lower()) for cell in cells)
                _check_columns(columns, path.name)
            else:
                rows.append(TableRow(place, _values(columns, cells, place, delimiter)))
    except csv.Error as error:
        raise InputError(
            f"{path.name}: is not a CSV file: in the row that begins on line {lines_before + line}: {error}"
        ) from error
    return Table(path.name, columns or (), tuple(rows))


def require_columns(table: Table, columns: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a table that lacks one of ``columns``; the message lists those that are known.

    Raises:
        InputError: naming the first that is missing.
    """
    for column in columns:
        if column not in table.columns:
            raise InputError(
                f"{table.name}: the column {column!r} is missing; the first line must name {', '.join(known)}"
            )


def table_text(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A CSV that ``read_table`` reads back and that runs nothing in a spreadsheet; None is an empty value."""
    return rows_text([columns, *rows])


def rows_text(rows: Iterable[Iterable[object]]) -> str:
    """Lines of such a CSV, to be appended to one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_written(value) for value in row] for row in rows)
    return text.getvalue()


def _written(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value) else value


def _read_text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-16" if content.startswith(_UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f'{path.name}: is not UTF-8 text: in Excel save it as "CSV UTF-8"') from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path.name} line {line}: holds a NUL character, the file is damaged: export it again")
    return text


def _delimiter(text: str) -> str:
    """The one that the heading holds most of; names of columns hold none."""
    heading = next((line for line in text.splitlines() if line.strip(' \t,;"')), "")
    return max(DELIMITERS, key=heading.count)


def _check_columns(columns: Sequence[str], name: str) -> None:
    named = [column for column in columns if column]
    if len(set(named)) < len(named):
        raise InputError(f"{name}: a column stands twice in the first line: {', '.join(columns)}")


def _values(columns: Sequence[str], cells: Sequence[str], place: str, delimiter: str) -> dict[str, str]:
    """By column; columns without a name, which spreadsheets append, have to be empty."""
    counts = f"{len(cells)} value{'s' * (len(cells) != 1)} for {len(columns)} columns"
    unnamed = any(cell and not column for column, cell in zip(columns, cells, strict=False))
    if len(cells) != len(columns) or unnamed:
        what = DELIMITERS.get(delimiter, repr(delimiter))
        counts = "a value in a column without a name" if len(cells) == len(columns) else counts
        raise InputError(f"{place}: {counts}; put values with {what} into double quotes")
    return {column: cell for column, cell in zip(columns, cells, strict=True) if column}
