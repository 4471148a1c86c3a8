"""Writing files so that a crash never leaves half of one, and hashing them."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from upath import UPath

from resources.common.errors import FULL_ERRORS, UNREADABLE

AnyPath = Path | UPath
# Ends the name of what was found damaged, and is kept for whoever wants to look.
DAMAGED = ".damaged"


def storage_root(place: str | Path) -> UPath:
    """A local directory, or a URL that fsspec knows.

    fsspec remembers what it has listed of an object store, and would not see what other processes write there later.
    """
    return UPath(place, use_listings_cache=False) if "://" in str(place) else UPath(place)


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Writes a file as a whole or not at all."""
    with opened_atomically(path) as file:
        file.write(content)


@contextmanager
def opened_atomically(path: AnyPath) -> Iterator[IO[bytes]]:
    """Opens a file for writing under a temporary name beside its place; when all is written, it is renamed."""
    final = UPath(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if not final.protocol:
                # Or a power failure may leave the name without the content.
                file.flush()
                os.fsync(file.fileno())
        # An object store has no renaming: there this is a copy, which appears whole or not at all, and a removal.
        # Writing to the final name would not do, because closing a file after an error uploads what there is of it.
        try:
            temporary.rename(final)
        except IsADirectoryError:
            # Somebody put a directory there.
            set_aside(final)
            temporary.rename(final)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL_ERRORS and error.filename is None:
            # What fails in writing does not say where.
            error.filename = str(final)
        raise


def set_aside(place: UPath) -> None:
    """Renames what is damaged, so that it counts as not there."""
    place.rename(place.with_name(f"{place.name}.{uuid.uuid4().hex}{DAMAGED}"))


@contextmanager
def temporary_directory_beside(place: Path) -> Iterator[Path]:
    """A fresh directory on the same disk as `place`, removed afterwards unless it was renamed away.

    Directories that a killed process left behind under the same place are removed first.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(place.parent, f".{place.name}.*.tmp")
    # Threads of one process may be at work on the same place.
    directory = place.parent / f".{place.name}.{uuid.uuid4().hex[:8]}.{os.getpid()}.tmp"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def replace_directory(finished: Path, place: Path) -> None:
    """Moves a finished directory, on the same disk, to a place; what was there is removed.

    A reader finds the old directory or the new one, or for an instant none, but never half of one.
    """
    if place.exists():
        old = place.with_name(f".{place.name}.old.{os.getpid()}.tmp")
        place.rename(old)
        finished.rename(place)
        shutil.rmtree(old)
    else:
        finished.rename(place)


def link_or_copy(source: str, target: str) -> None:
    """Gives a file, which nobody writes to any more, a second name; copies it where the disk knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Removes the temporary files and directories of processes that are dead."""
    for leftover in folder.glob(pattern):
        if not is_abandoned(leftover):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def is_abandoned(place: AnyPath) -> bool:
    """Whether a temporary file or directory belongs to a process that is dead: the last but one part of its name is the id."""
    process_id = place.name.split(".")[-2]
    if process_id.isdigit():
        try:
            os.kill(int(process_id), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return False


def file_sha256(path: AnyPath) -> str:
    """The sha256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def has_sha256(path: AnyPath, sha256: str) -> bool:
    """Whether a file has this sha256; one that the disk cannot read any more has not."""
    try:
        return file_sha256(path) == sha256
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        return False


def json_sha256(value: Any) -> str:
    """The sha256 of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
