"""Tables as parquet files, one folder per asset and one file per iteration, each with a checksum beside it."""

import contextlib
import io
from collections.abc import Mapping
from typing import IO, Any

import dagster as dg
import polars as pl
import xxhash
from upath import UPath

from resources.common.errors import UNREADABLE, DamageError
from resources.common.text import asset_label, visible
from resources.storage.files import opened_atomically, set_aside, storage_root, write_atomically

SAMPLE_ROWS = 5
SHOWN_CHARACTERS = 300
# XXH3 with 128 bits, and whose table it is.
CHECKSUM = ".xxh128"
HASHED_AT_A_TIME = 2**20


class ParquetTables(dg.UPathIOManager):
    """Keeps polars frames under a root: a local directory or any URL that fsspec knows.

    A frame is written under a temporary name and renamed, so that a reader never sees half a table. Lazy frames are
    streamed to disk and back; eager ones are held in memory.
    """

    extension = ".parquet"

    def __init__(self, root: str, look_up: str | None = None, columns: Mapping[str, Any] | None = None) -> None:
        """Opens the tables under a root.

        Args:
            look_up: The command that tells of a row, with `{}` where its id belongs.
            columns: Those of all tables with their types, where all have the same; a table of others is damaged.
        """
        super().__init__(storage_root(root))
        self._look_up = look_up
        self._columns = None if columns is None else pl.Schema(columns)

    def read(self, asset: str, partition: str) -> pl.DataFrame:
        """Reads the table of an asset and iteration that is not a declared input."""
        place = self._place(asset, partition)
        return self._read(place, self._label(place))

    def verify(self, asset: str, partition: str | None) -> None:
        """Raises a DamageError if the table of an asset and iteration is gone, or is not as it was written."""
        place = self._place(asset, partition)
        label = self._label(place)
        with _opened(place, label) as file:
            self._look_at(file, place, label)

    def scan(self, asset: str, partition: str | None = None) -> pl.LazyFrame | None:
        """The rows of an asset, of one iteration or all, to be read lazily; None if they were never written.

        What is made once is of every iteration.
        """
        made_once = self._place(asset, None)
        of_iterations = (self._base_path / asset).glob(f"{partition or '*'}.parquet")
        files = [made_once] if made_once.exists() else sorted(of_iterations)
        if not files:
            return None
        # Opened here for the same reason as in `load_from_path`.
        return pl.scan_parquet([_opened(file, self._label(file)) for file in files])

    def of_partition(self, partition: str) -> list[pl.DataFrame]:
        """The tables of all assets that have one of this iteration, by asset."""
        files = sorted(self._base_path.glob(f"*/{partition}.parquet"), key=str)
        return [self._read(file, self._label(file)) for file in files]

    def partitions(self, asset: str = "*") -> list[str]:
        """The iterations of which an asset, or if none is named any asset, has a table."""
        names = {file.stem for file in self._base_path.glob(f"{asset}/*.parquet")}
        return sorted(name for name in names if name.isdecimal())

    def set_damaged_aside(self) -> bool:
        """Renames the tables that are not as they were written, so that they count as not made; whether there were any."""
        found = False
        for file in [*self._base_path.glob("*.parquet"), *self._base_path.glob("*/*.parquet")]:
            label = self._label(file)
            try:
                with _opened(file, label) as content:
                    self._look_at(content, file, label)
            except DamageError:
                set_aside(file)
                found = True
        return found

    def write(self, asset: str, partition: str | None, frame: pl.DataFrame) -> None:
        """Writes a table outside of Dagster's outputs; without a partition, one that is made once."""
        place = self._place(asset, partition)
        _write(frame, place, self._label(place))

    def dump_to_path(self, context: dg.OutputContext, obj: pl.DataFrame | pl.LazyFrame, path: UPath) -> None:
        """Writes one table."""
        _write(obj, path, self._label(path))

    def load_from_path(self, context: dg.InputContext, path: UPath) -> pl.DataFrame | pl.LazyFrame:
        """Reads one table, lazily where the asset asks for a LazyFrame."""
        if context.dagster_type.typing_type is pl.LazyFrame:
            # Opened here because polars' own clients of object stores find their credentials in other ways.
            return pl.scan_parquet(_opened(path, self._label(path)))
        return self._read(path, self._label(path))

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

    def _read(self, path: UPath, label: str) -> pl.DataFrame:
        with _opened(path, label) as file:
            try:
                table = pl.read_parquet(file)
            except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
                raise _damaged(path, label) from error
        self._refuse_others(table.schema, path, label)
        return table

    def _look_at(self, file: IO[bytes], path: UPath, label: str) -> None:
        """Raises a DamageError if a file, of which no more than the end is read, is no table, or one of other columns."""
        try:
            table = pl.scan_parquet(file)
            columns = table.collect_schema()
            table.select(pl.len()).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise _damaged(path, label) from error
        self._refuse_others(columns, path, label)

    def _refuse_others(self, columns: pl.Schema, path: UPath, label: str) -> None:
        if self._columns not in (None, columns):
            raise _damaged(path, label)

    def _place(self, asset: str, partition: str | None) -> UPath:
        return self._base_path / (f"{asset}.parquet" if partition is None else f"{asset}/{partition}.parquet")

    def _label(self, path: UPath) -> str:
        """Whose table lies at a place: `seed_pairs.parquet`, `preference_pairs/0001.parquet`."""
        made_once = path.parent == self._base_path or not path.stem.isdecimal()
        asset = path.stem if path.parent == self._base_path else path.parent.name
        return asset_label(asset, None if made_once else path.stem)


def _for_readers(sample: pl.DataFrame) -> pl.DataFrame:
    """Texts first, then numbers, then ids; what the page of the partition says already is left out."""
    ids = [name for name in sample.columns if name.endswith("_id")]
    said = [name for name in sample.columns if name == "iteration" or name.endswith("_sha")]
    others = [name for name in sample.columns if name not in {*ids, *said}]
    texts = [name for name in others if not sample.schema[name].is_numeric() and name != "look_up"]
    return sample.select(*texts, *(name for name in others if name not in texts), *ids)


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.hash = xxhash.xxh3_128()
        self._file = file

    def write(self, block: bytes) -> int:
        self.hash.update(block)
        return self._file.write(block)

    def flush(self) -> None:
        self._file.flush()


def _write(frame: pl.DataFrame | pl.LazyFrame, path: UPath, label: str) -> None:
    checksum = _checksum_file(path)
    with opened_atomically(path) as file:
        hashed: Any = _Hashed(file)
        if isinstance(frame, pl.LazyFrame):
            frame.sink_parquet(hashed)
        else:
            frame.write_parquet(hashed)
        line, earlier = f"{hashed.hash.hexdigest()}  {label}\n".encode(), b""
        # There may be none, or one that cannot be read.
        with contextlib.suppress(OSError):
            earlier = checksum.read_bytes()
        # Until the new table is in its place, which takes a slow disk seconds, there are those of both.
        write_atomically(checksum, line + earlier)
    write_atomically(checksum, line)


def _opened(path: UPath, label: str, looks_again: bool = True) -> IO[bytes]:
    """A table to be read from its beginning, once its bytes are those that were written.

    Parquet has no checksum of its own here: nearly half of all flipped bits would read as other rows.
    """
    try:
        file = io.BytesIO(path.read_bytes()) if path.protocol else path.open("rb")
        lines = _checksum_file(path).read_text(errors="replace").splitlines()
        found = _hash_of(file)
    except FileNotFoundError:
        if not path.exists():
            raise DamageError(f"The table {path} of {label} does not exist", label) from None
        if not looks_again:
            raise DamageError(f"The checksum of the table {path} of {label} is gone", label) from None
        return _opened(path, label, looks_again=False)
    except IsADirectoryError:
        raise DamageError(f"A directory lies in the place of the table {path} of {label}", label) from None
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise DamageError(f"The table {path} of {label} cannot be read any more ({error.strerror})", label) from None
    owners = [line.partition("  ")[2] for line in lines if line.partition("  ")[0] == found]
    if not owners:
        # It may have been written anew between the reading of the two files.
        if looks_again:
            return _opened(path, label, looks_again=False)
        raise _damaged(path, label)
    # Earlier versions wrote the name of the file.
    if not {label, path.name} & set(owners):
        raise DamageError(f"In the place of the table {path} of {label} lies that of {visible(owners[0][:80])}", label)
    file.seek(0)
    return file


def _hash_of(file: IO[bytes]) -> str:
    """The checksum of what a file holds.

    The hash costs less than the reading, which costs a third more with the 256 KiB of `hashlib.file_digest`. To map the file
    would cost no less, and would end the process where a disk fails.
    """
    hashed, buffer = xxhash.xxh3_128(), memoryview(bytearray(HASHED_AT_A_TIME))
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        hashed.update(buffer[:size])
    return hashed.hexdigest()


def _damaged(path: UPath, label: str) -> DamageError:
    return DamageError(f"The table {path} of {label} is not as it was written: it was damaged or altered", label)


def _checksum_file(path: UPath) -> UPath:
    return path.with_name(f"{path.name}{CHECKSUM}")


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
