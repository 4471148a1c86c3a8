"""Writing files so that a crash never leaves half of one, and hashing them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside its place, then renames it.

    Args:
        path: Where the file shall be; its folder is made if need be.
        content: All of its bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def temporary_directory_beside(place: Path) -> Iterator[Path]:
    """A fresh directory on the same disk as `place`, removed afterwards unless it was renamed away.

    Directories that a killed process left behind under the same place are removed first.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in place.parent.glob(f".{place.name}.*.tmp"):
        if not _is_alive(int(leftover.name.split(".")[-2])):
            shutil.rmtree(leftover, ignore_errors=True)
    directory = place.parent / f".{place.name}.{os.getpid()}.tmp"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """The sha256 of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
