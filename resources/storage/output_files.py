"""Files that people ask for by name: not replaced unasked, and what keeps one from being written is said as a sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from resources.settings.sections import SettingsError


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raises a sentence if a file is there and may not be replaced."""
    if output.exists() and not overwrite:
        raise SettingsError(f"{output} exists: choose another --output, or replace it with --overwrite.")


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Around the writing of a file: turns an error of the disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"--output {output} cannot be written: {error.strerror or error}.") from None
