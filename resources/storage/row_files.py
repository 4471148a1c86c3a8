"""Reading rows from a file that a person, a spreadsheet, a script or a labelling tool wrote; what is wrong is said by line."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from resources.common.text import one_line
from resources.settings.sections import SettingsError

# A cell holds a whole answer.
LONGEST_CELL = 100_000_000


def file_rows(path: Path, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .csv, .jsonl or .parquet file with their lines, counted from 1; rows in parquet count as lines.

    Raises:
        SettingsError: The file is not there, is not UTF-8, or is no such file; the message names the line.
    """
    named = f"{path} ({setting})"
    if not path.is_file():
        raise SettingsError(f"{named} {'is no file' if path.exists() else 'does not exist'}: name the right file.")
    try:
        if path.suffix.lower() == ".parquet":
            # Brackets and stars in a name are letters like others.
            yield from enumerate(pl.scan_parquet(path, glob=False).collect().iter_rows(named=True), start=1)
            return
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise SettingsError(f"{named} is not UTF-8 in line {line}: save it as UTF-8.") from None
    # It is somebody else's file.
    except (Exception, pl.exceptions.PanicException) as error:
        raise SettingsError(f"{named} cannot be read: {one_line(str(error), 200)}.") from None
    yield from _csv_rows(text, named) if path.suffix.lower() == ".csv" else _json_rows(text, named)


def table_rows(path: Path, option: str, held: str) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a table that an option of a command names; refused by name if it is no table, or holds none of what it should."""
    if path.suffix.lower() not in (".jsonl", ".csv", ".parquet"):
        raise SettingsError(f"{option} {path} is neither a .jsonl, .csv nor .parquet file.")
    rows = list(file_rows(path, option))
    if not rows:
        raise SettingsError(f"{path} ({option}) holds no {held}.")
    return rows


def _csv_rows(text: str, named: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        head = next(reader, [])
        if twice := sorted({name for name in head if head.count(name) > 1}):
            raise SettingsError(f"{named} has the column `{twice[0]}` twice: leave one.")
        end = reader.line_num
        for cells in reader:
            line, end = end + 1, reader.line_num
            if len(cells) not in (0, len(head)):
                raise SettingsError(
                    f"{named} has {len(cells)} cells in line {line} and {len(head)} columns: separate cells by commas and put "
                    "texts in double quotes."
                )
            if cells:
                yield line, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise SettingsError(f"{named} is no CSV in line {reader.line_num}: {error}.") from None


def _json_rows(text: str, named: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            row = json.loads(written)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise SettingsError(f"{named} holds no JSON object in line {line}: correct that line.")
        yield line, row
