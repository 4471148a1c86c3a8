"""Reading seed pairs and corpus paragraphs from files, folders or Hugging Face datasets."""

import codecs
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from resources.common.errors import ModelSourceError
from resources.common.text import one_line
from resources.settings.data import SEED_DATA_SUFFIXES, DataSource
from resources.settings.sections import SettingsError

ROWS_THAT_SHOW_THE_COLUMNS = 100
# Where the columns of a source are named; those of instructions have fixed names.
COLUMN_SETTINGS = dict.fromkeys(
    ("seed_data.train", "seed_data.held_out"), "seed_data.prompt_column and seed_data.answer_column"
)
COLUMN_SETTINGS |= {"keyword_pool.corpus": "keyword_pool.text_column"}


def read_rows(source: DataSource, setting: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams the rows of a file or dataset, with their line or row number, counted from 1.

    Blank lines of a JSONL file are skipped; a line that is not a JSON object comes back as an empty row, so that it is
    reported by its line. Each column must be there in one of the first rows at least.
    """
    rows = _readable_rows(source, setting)
    first = list(itertools.islice(rows, ROWS_THAT_SHOW_THE_COLUMNS))
    if not first:
        raise SettingsError(f"{source.path} ({setting}) holds no rows: add some, or name another file.")
    found = list(dict.fromkeys(name for _, row in first for name in row))
    if not found:
        raise SettingsError(
            f"None of the first {len(first)} rows of {source.path} ({setting}) is a JSON object in UTF-8: save the "
            "file as one JSON object on each line, in UTF-8 and not compressed, or as parquet."
        )
    missing = [column for column in columns if column not in found]
    if missing:
        named = COLUMN_SETTINGS.get(setting)
        raise SettingsError(
            f"{source.path} ({setting}) has no column {', '.join(f'`{name}`' for name in missing)}; it has "
            f"{', '.join(f'`{name}`' for name in found)}. {f'Name the right ones in {named}' if named else 'Rename them so'}."
        )
    yield from first
    yield from rows


def _readable_rows(source: DataSource, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from _rows(source, setting)
    except (SettingsError, ModelSourceError):
        raise
    # It is somebody else's file.
    except (Exception, pl.exceptions.PanicException) as error:
        raise SettingsError(f"{source.path} ({setting}) cannot be read: {_reason(error)}. Save it again.") from None


def _rows(source: DataSource, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if not source.is_local:
        yield from enumerate(_hub_rows(source, setting), start=1)
        return
    path = Path(source.path)
    if not path.exists():
        raise SettingsError(f"{path} ({setting}) does not exist.")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from enumerate(_saved_rows(path, source, setting), start=1)
        return
    files = _files_in(path) if path.is_dir() else [path]
    if not files:
        raise SettingsError(f"The folder {path} ({setting}) holds no file that ends in .jsonl or .parquet.")
    rows = itertools.chain.from_iterable(map(_numbered_rows, files))
    # Lines are counted on through the files of a folder.
    yield from rows if len(files) == 1 else enumerate((row for _, row in rows), start=1)


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SEED_DATA_SUFFIXES)


def _numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".parquet":
        # Brackets and stars in a name are letters like others.
        batches = pl.scan_parquet(path, glob=False).collect_batches(maintain_order=True)
        yield from enumerate((row for batch in batches for row in batch.iter_rows(named=True)), start=1)
        return
    yield from json_lines(path)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a JSONL file with their numbers; an empty object for a line that holds none, or is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _json_object(line.removeprefix(codecs.BOM_UTF8))


def _json_object(line: bytes) -> dict[str, Any]:
    """The object in a line of JSONL; an empty one if there is none, or if it is not UTF-8."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _saved_rows(folder: Path, source: DataSource, setting: str) -> Iterator[dict[str, Any]]:
    """The rows of a folder that `save_to_disk` of the library `datasets` wrote."""
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    if isinstance(found, DatasetDict):
        if source.split not in found:
            raise SettingsError(
                f"{folder} ({setting}) has no split `{source.split}`; it has {', '.join(found)}: name one in {setting}.split."
            )
        found = found[source.split]
    yield from found


def _hub_rows(source: DataSource, setting: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        yield from load_dataset(source.path, source.configuration, split=source.split, streaming=True)
    except ConnectionError as error:
        raise ModelSourceError(
            f"The dataset {source.path}, split {source.split} ({setting}), cannot be had now: {_reason(error)}. Try again "
            "later, or name a copy on this machine."
        ) from None
    except Exception as error:
        raise SettingsError(
            f"The dataset {source.path}, split {source.split} ({setting}), cannot be loaded: {_reason(error)}. A file must end in "
            ".jsonl or .parquet; what is neither that nor an existing folder is taken as a dataset id."
        ) from None


def _reason(error: BaseException) -> str:
    said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return one_line(said, 200)
