"""Tables of captions: metadata.jsonl and .csv; needs no MindSpore."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = "metadata.jsonl"


class Row(NamedTuple):
    """One line of a table."""

    where: str
    """The table's path and the number of the line."""
    name: str
    """The image's path, as it is written."""
    text: str
    """The caption, as it is written."""


def json_rows(table: Path, problems: list[str]) -> Iterator[Row]:
    """The lines `{"file_name": …, "text": …}` of a table; a sentence in `problems` for others."""
    for number, line in enumerate(_text(table, problems).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        try:
            values = json.loads(line)
            row = Row(where, values["file_name"], values["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            row = Row(where, "", None)  # type: ignore[arg-type]
        if isinstance(row.name, str) and isinstance(row.text, str):
            yield row
        else:
            problems.append(
                f'{where}: expected {{"file_name": "…", "text": "…"}}, found {line[:60]!r}; '
                "correct the line"
            )


def csv_rows(sheet: Path, problems: list[str]) -> Iterator[Row]:
    """The rows of a .csv with the columns file_name (or dir) and text."""
    rows = csv.DictReader(io.StringIO(_text(sheet, problems), newline=""))
    try:
        columns = rows.fieldnames or []
        place = next((name for name in ("file_name", "dir") if name in columns), None)
        if place is not None and "text" in columns:
            for row in rows:
                where = f"{sheet}, line {rows.line_num}"
                yield Row(where, row[place] or "", row["text"] or "")
        elif not problems:
            problems.append(
                f"{sheet}: expected the columns file_name (or dir) and text in its first line, "
                f"found {', '.join(columns) or 'nothing'}; correct the line"
            )
    except csv.Error as error:
        where = f"{sheet}, line {rows.reader.line_num}"
        problems.append(f"{where}: expected CSV, found a line that is none ({error}); correct it")


def _text(table: Path, problems: list[str]) -> str:
    """A file's text; empty, and a sentence in `problems`, if it cannot be read."""
    try:
        return table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{table}: expected UTF-8, found {not_utf8(error)}; save it as UTF-8")
    except OSError as error:
        problems.append(f"{table}: expected a table, found {error.strerror}; check the file")
    return ""


def not_utf8(error: UnicodeDecodeError) -> str:
    """What was found in place of UTF-8, in words."""
    return f"byte 0x{error.object[error.start]:02x} at position {error.start}"
