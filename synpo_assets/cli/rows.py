"""`synpo rows`: prints, filters and writes the rows of a table; polars does the work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO

import polars as pl
from rich.console import Console

from resources.common.text import visible
from resources.settings.sections import SettingsError, nearest
from resources.storage.files import opened_atomically
from resources.storage.output_files import refuse_existing, writing
from synpo_assets.graph.partitions import partition_key, stated_iteration
from synpo_assets.graph.services import Services
from synpo_assets.publishing.review import cell

PRINTED_ROWS, PRINTED_CHARACTERS = 20, 200
WRITERS: dict[str, Callable[[pl.DataFrame, IO[bytes]], object]] = {
    ".csv": lambda frame, file: _for_spreadsheets(_flat(frame)).write_csv(file),
    ".jsonl": lambda frame, file: frame.write_ndjson(file),
    ".parquet": lambda frame, file: frame.write_parquet(file),
}


def print_rows(
    services: Services, label: str, where: str | None, columns: str | None, output: Path | None, overwrite: bool
) -> None:
    """Prints the first rows, or writes them all into a file of the kind that its suffix names."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if output is not None and output.suffix not in WRITERS:
        raise SettingsError(f"--output {output} ends in none of {', '.join(WRITERS)}: choose one of these.")
    if output is not None:
        refuse_existing(output, overwrite)
    frame = rows_of(services, label, where, columns)
    if output is None:
        with pl.Config(
            tbl_rows=PRINTED_ROWS,
            tbl_cols=-1,
            tbl_width_chars=console.width,
            tbl_hide_dataframe_shape=True,
            fmt_str_lengths=PRINTED_CHARACTERS,
        ):
            console.print(visible(str(_flat(frame.head(PRINTED_ROWS)))))
        left_out = f", of which these are the first {PRINTED_ROWS}" if frame.height > PRINTED_ROWS else ""
        console.print(f"{frame.height:,} rows{left_out}.")
        return
    with writing(output), opened_atomically(output) as file:
        WRITERS[output.suffix](frame, file)
    console.print(f"{frame.height:,} rows: {output}")


def rows_of(services: Services, label: str, where: str | None, columns: str | None) -> pl.DataFrame:
    """The rows of a table, of all iterations or of one.

    Args:
        label: `preference_pairs`, or `preference_pairs[0002]`.
        where: A condition in SQL; None: all rows.
        columns: Their names, with commas between them; None: all columns.

    Raises:
        SettingsError: There is no such table, iteration or column, or polars refuses the condition.
    """
    rows = _stored(services, label)
    known = rows.collect_schema().names()
    names = known if columns is None else list(dict.fromkeys(name.strip() for name in columns.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise SettingsError(f"--columns: {label} has no column {unknown[0]!r}; it has {', '.join(known)}.")
    try:
        return (rows if where is None else rows.sql(f"SELECT * FROM self WHERE {where}")).select(names).collect()
    except pl.exceptions.PolarsError as error:
        raise SettingsError(f"--where {where!r} is refused by polars: {str(error).splitlines()[0]}") from None


def _stored(services: Services, label: str) -> pl.LazyFrame:
    asset, bracket, iteration = label.strip().removesuffix("]").partition("[")
    nodes = [services.graph.get(key) for key in sorted(services.graph.materializable_asset_keys)]
    known = [node.key.to_user_string() for node in nodes if "dagster/column_schema" in node.metadata]
    if asset not in known:
        raise SettingsError(f"{asset!r} is no asset that is a table{nearest(asset, known)}")
    rows = services.tables.scan(asset)
    if rows is None:
        raise SettingsError(f"{asset} was not made in this home yet: `synpo run` makes it.")
    if not bracket:
        return rows
    number = stated_iteration(iteration)
    key = iteration if number is None else partition_key(number)
    if key not in (made := services.tables.partitions(asset)):
        has = f"it has {', '.join(made)}" if made else "it is made once, so leave the brackets out"
        raise SettingsError(f"{asset} has no iteration {iteration}: {has}.")
    return services.tables.read(asset, key).lazy()


def _for_spreadsheets(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with texts that a spreadsheet takes for no formula and a terminal for no command; other files hold them exactly."""
    return frame.with_columns(pl.col(pl.String).map_elements(cell, pl.String))


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with lists and structs, which neither a terminal nor a .csv file has, as JSON."""
    nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
    texts = [[json.dumps(value, ensure_ascii=False) for value in frame[name].to_list()] for name in nested]
    return frame.with_columns(map(pl.Series, nested, texts))
