"""Reading seed pairs and corpus paragraphs from files or Hugging Face datasets."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from resources.settings.data import DataSource
from resources.settings.sections import SettingsError

ROWS_THAT_SHOW_THE_COLUMNS = 100


def read_rows(source: DataSource, setting: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams the rows of a file or dataset, with their line or row number, counted from 1.

    Blank lines of a JSONL file are skipped; a line that is not a JSON object comes back as an empty row, so that it is
    reported by its line. Each column must be there in one of the first rows at least.
    """
    rows = _rows(source, setting)
    try:
        first = list(itertools.islice(rows, ROWS_THAT_SHOW_THE_COLUMNS))
    except (UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise SettingsError(f"{source.path} ({setting}) cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not first:
        raise SettingsError(f"{source.path} ({setting}) holds no rows.")
    found = list(dict.fromkeys(name for _, row in first for name in row))
    missing = [column for column in columns if column not in found]
    if missing:
        raise SettingsError(
            f"{source.path} ({setting}) has no column {', '.join(f'`{name}`' for name in missing)}; it has "
            f"{', '.join(f'`{name}`' for name in found) or 'none'}. Name the right ones in the settings."
        )
    yield from first
    yield from rows


def _rows(source: DataSource, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if not source.is_file:
        yield from enumerate(_hub_rows(source, setting), start=1)
        return
    path = Path(source.path)
    if not path.is_file():
        raise SettingsError(f"The file {path} ({setting}) does not exist.")
    if path.suffix == ".parquet":
        batches = pl.scan_parquet(path).collect_batches(maintain_order=True)
        yield from enumerate((row for batch in batches for row in batch.iter_rows(named=True)), start=1)
        return
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _json_object(line)


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _hub_rows(source: DataSource, setting: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        yield from load_dataset(source.path, split=source.split, streaming=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"The dataset {source.path}, split {source.split} ({setting}), cannot be loaded: {reason}. A file must end in "
            ".jsonl or .parquet; anything else is taken as a dataset id."
        ) from None
