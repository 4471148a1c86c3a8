"""Tables as parquet files, one folder per asset and one file per iteration."""

from typing import IO, Any

import dagster as dg
import polars as pl
from upath import UPath

from resources.common.text import visible
from resources.storage.files import opened_atomically, storage_root

SAMPLE_ROWS = 5
SHOWN_CHARACTERS = 300


class ParquetTables(dg.UPathIOManager):
    """Keeps polars frames under a root: a local directory or any URL that fsspec knows.

    A frame is written under a temporary name and renamed, so that a reader never sees half a table. Lazy frames are
    streamed to disk and back; eager ones are held in memory.
    """

    extension = ".parquet"

    def __init__(self, root: str, look_up: str | None = None) -> None:
        """Opens the tables under `root`; `look_up` is the command that tells of a row, with `{}` where its id belongs."""
        super().__init__(storage_root(root))
        self._look_up = look_up

    def read(self, asset: str, partition: str) -> pl.DataFrame:
        """Reads the table of an asset and iteration that is not a declared input."""
        return _read(self._base_path / asset / f"{partition}.parquet", f"{asset}[{partition}]")

    def scan(self, asset: str) -> pl.LazyFrame | None:
        """The rows of an asset, over all its iterations, to be read lazily; None if it was never written."""
        made_once = self._base_path / f"{asset}.parquet"
        found = [made_once] if made_once.exists() else sorted((self._base_path / asset).glob("*.parquet"))
        if not (files := [file for file in found if file.is_file()]):
            return None
        # Opened here for the same reason as in `load_from_path`.
        opened: list[IO[bytes]] = [file.open("rb") for file in files]
        return pl.scan_parquet(opened)

    def of_partition(self, partition: str) -> list[pl.DataFrame]:
        """The tables of all assets that have one of this iteration, by asset."""
        files = sorted(self._base_path.glob(f"*/{partition}.parquet"), key=str)
        return [_read(file, file.parent.name) for file in files]

    def partitions(self, asset: str = "*") -> list[str]:
        """The iterations of which an asset, or if none is named any asset, has a table."""
        names = {file.stem for file in self._base_path.glob(f"{asset}/*.parquet")}
        return sorted(name for name in names if name.isdecimal())

    def write(self, asset: str, partition: str, frame: pl.DataFrame) -> None:
        """Writes the table of an asset and iteration other than the running one."""
        _write(frame, self._base_path / asset / f"{partition}.parquet")

    def dump_to_path(self, context: dg.OutputContext, obj: pl.DataFrame | pl.LazyFrame, path: UPath) -> None:
        """Writes one table."""
        _write(obj, path)

    def load_from_path(self, context: dg.InputContext, path: UPath) -> pl.DataFrame | pl.LazyFrame:
        """Reads one table, lazily where the asset asks for a LazyFrame."""
        if context.dagster_type.typing_type is pl.LazyFrame:
            # Opened here because polars' own clients of object stores find their credentials in other ways.
            return pl.scan_parquet(path.open("rb"))
        return _read(path, context.asset_key.to_user_string())

    def get_metadata(self, context: dg.OutputContext, obj: pl.DataFrame | pl.LazyFrame) -> dict[str, Any]:
        """Row count, sample rows and, for tables in memory, statistics of the numeric columns."""
        sample = obj.head(SAMPLE_ROWS).lazy().collect()
        if self._look_up is not None and (identity := sample.columns[0]).endswith("_id"):
            sample = sample.with_columns(look_up=pl.format(self._look_up, identity))
        metadata: dict[str, Any] = {
            "dagster/row_count": obj.lazy().select(pl.len()).collect().item(),
            "sample": table_metadata(_for_readers(sample)),
        }
        if isinstance(obj, pl.DataFrame) and obj.height and (numbers := obj.select(pl.selectors.numeric())).width:
            statistics = numbers.describe(percentiles=(0.5,))
            metadata["statistics"] = table_metadata(statistics)
        return metadata


def _for_readers(sample: pl.DataFrame) -> pl.DataFrame:
    """Texts first, then numbers, then ids; what the page of the partition says already is left out."""
    ids = [name for name in sample.columns if name.endswith("_id")]
    said = [name for name in sample.columns if name == "iteration" or name.endswith("_sha")]
    others = [name for name in sample.columns if name not in {*ids, *said}]
    texts = [name for name in others if not sample.schema[name].is_numeric() and name != "look_up"]
    return sample.select(*texts, *(name for name in others if name not in texts), *ids)


def _write(frame: pl.DataFrame | pl.LazyFrame, path: UPath) -> None:
    with opened_atomically(path) as file:
        if isinstance(frame, pl.LazyFrame):
            frame.sink_parquet(file)
        else:
            frame.write_parquet(file)


def _read(path: UPath, asset: str) -> pl.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"The table {path} of {asset} does not exist: materialize {asset} first.")
    with path.open("rb") as file:
        return pl.read_parquet(file)


def table_metadata(frame: pl.DataFrame) -> dg.TableMetadataValue:
    """Rows as a table in the UI, which shows every cell as plain text."""
    names = frame.columns
    records = [dg.TableRecord({name: _cell(row[name]) for name in names}) for row in frame.to_dicts()]
    schema = dg.TableSchema([dg.TableColumn(name, type=str(frame.schema[name])) for name in names])
    return dg.MetadataValue.table(records, schema=schema)


def _cell(value: Any) -> str | int | float | bool | None:
    if isinstance(value, float):
        return round(value, 4)
    if value is None or isinstance(value, bool | int):
        return value
    text = visible(_text(value))
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _text(value: Any) -> str:
    """Chat messages as their contents, anything else as it prints."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "content" in value[0]:
        return "\n".join(str(message["content"]) for message in value)
    return str(value)
