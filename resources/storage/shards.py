"""Finished rows of long work, in files that survive a crash and are found again by what made them."""

import contextlib
import errno
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import polars as pl
import xxhash

from resources.common.errors import DISK_IS_FULL, FULL_ERRORS, UNREADABLE, FinalError
from resources.storage.files import DAMAGED, json_sha256, storage_root, write_atomically

logger = logging.getLogger("synpo.storage")

FINGERPRINT_FILE = "fingerprint.json"
LARGEST_HASH = 2**64 - 1
Row = TypeVar("Row")


class Shards:
    """Rows with the same fingerprint: everything that can change a row, other than its key.

    Another fingerprint has another folder, so rows of different settings never mix.
    """

    def __init__(self, root: str, fingerprint: Mapping[str, Any], label: str, columns: Mapping[str, Any]) -> None:
        """Opens the folder of a fingerprint, made with the first write; the label tells people what made the rows."""
        self.folder = storage_root(root) / json_sha256(dict(fingerprint))[:16]
        self._columns = dict(columns)
        self._description = {**fingerprint, "made_for": label}

    def finished(self, keys: pl.Series) -> pl.Series:
        """Which of these keys have a finished row."""
        none = pl.Series("key", dtype=self._columns["key"])
        found = pl.concat([none, *(shard["key"] for shard in self._shards(["key"]))])
        return keys.filter(keys.is_in(found.implode()))

    def rows(self, keys: pl.Series, usable: Callable[[pl.DataFrame], pl.DataFrame] = lambda rows: rows) -> pl.DataFrame:
        """The finished row of each key, without the key, in the order of the keys; nulls where there is none.

        `usable` leaves rows out, or mends them, before one row of several with the same key is chosen.
        """
        # Sorted once: a set of all keys, made anew for each shard, would take time as the square of the rows. Of a million
        # keys two have the same hash with a chance of 3 in 100 million.
        wanted = keys.hash().append(pl.Series([LARGEST_HASH], dtype=pl.UInt64)).unique().sort()
        # Filtered only where need be, and appended in place: copies would take as much memory as the rows. Keys would take more
        # than their places among those wanted.
        found = pl.DataFrame(schema={**self._columns, "key": pl.get_index_type()})
        for shard in self._shards(list(self._columns)):
            hashes = shard["key"].hash()
            places = wanted.search_sorted(hashes)
            placed, is_wanted = shard.with_columns(key=places), wanted[places] == hashes
            found.extend(usable(placed if is_wanted.all() else placed.filter(is_wanted)))
        # Two runs that were at work side by side may both have finished a row.
        if found["key"].n_unique() < found.height:
            found = found.unique("key", keep="first", maintain_order=True)
        asked = pl.DataFrame({"key": wanted.search_sorted(keys.hash())})
        return asked.join(found, on="key", how="left", maintain_order="left").drop("key")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes one shard, as a whole or not at all."""
        content = io.BytesIO()
        pl.DataFrame(rows, schema=self._columns).write_parquet(content)
        try:
            if not (self.folder / FINGERPRINT_FILE).exists():
                write_atomically(self.folder / FINGERPRINT_FILE, json.dumps(self._description, indent=2).encode())
            write_atomically(self.folder / f"{self._checksum(content.getvalue())}.parquet", content.getvalue())
        except OSError as error:
            if error.errno not in FULL_ERRORS:
                raise
            # To try again at once would not help.
            raise FinalError(DISK_IS_FULL.format(error)) from None

    def _shards(self, columns: list[str]) -> Iterator[pl.DataFrame]:
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                # Another process has set it aside.
                continue
            except OSError as error:
                if error.errno not in (errno.EISDIR, *UNREADABLE):
                    raise
                content = b""
            # Earlier versions did not name a shard by its folder too.
            if path.stem not in (self._checksum(content), checksum(content)):
                # Parquet has no checksum of its own here: nearly half of all flipped bits would read as other rows.
                with contextlib.suppress(FileNotFoundError):
                    path.rename(path.with_suffix(DAMAGED))
                logger.warning(
                    f"The shard {path} is not as it was written here, as where a disk damages it: it is set aside, and its rows "
                    "are made anew."
                )
                continue
            yield pl.read_parquet(io.BytesIO(content), columns=columns)

    def _checksum(self, content: bytes) -> str:
        """That of a shard of this folder: in another, its rows would be somebody else's."""
        return checksum(self.folder.name.encode() + content)


def checksum(content: bytes) -> str:
    """What a shard is called: a hash of its bytes that costs next to nothing beside reading them."""
    return xxhash.xxh3_128_hexdigest(content)


def in_shards(batches: Iterable[list[Row]], size: int) -> Iterator[list[Row]]:
    """Rows as many at a time as a shard holds; before an error of the batches, those that came before it."""
    waiting: list[Row] = []
    try:
        for batch in batches:
            waiting += batch
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
    except Exception:
        if waiting:
            yield waiting
        raise
    if waiting:
        yield waiting
