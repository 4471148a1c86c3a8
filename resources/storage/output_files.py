"""Files that people ask for by name: not replaced unasked, and what keeps one from being written is said as a sentence."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from resources.settings.sections import SettingsError

# Every home, and every folder that artifacts are kept in, holds at least two of these.
SIGNS_OF_A_HOME = ("settings.yaml", "dagster.yaml", "tables", "metrics")
# The only folder of a home that nothing reads again.
PUBLISHED = "published"


def refuse_existing(output: Path, overwrite: bool, and_what: str = "") -> None:
    """Raises a sentence if a file is there and may not be replaced, or never may be; `and_what` it does besides being there."""
    refuse_inside_a_home(output)
    if output.exists() and not output.is_file():
        raise SettingsError(f"--output {output} is no file that could be replaced: name another.")
    # A link that leads nowhere is there too.
    if os.path.lexists(output) and not overwrite:
        raise SettingsError(f"{output} exists{and_what}: choose another --output, or replace it with --overwrite.")


def refuse_inside_a_home(place: Path, named: str = "--output") -> None:
    """Raises a sentence if a place, with links followed, is among the files that a home keeps and reads again."""
    real = Path(os.path.realpath(place))
    for folder in real.parents:
        signs = sum(os.path.lexists(folder / sign) for sign in SIGNS_OF_A_HOME)
        if signs > 1 and real.relative_to(folder).parts[0] != PUBLISHED:
            raise SettingsError(
                f"{place} lies in the home {folder}, which reads its own files again: name a place outside of it with {named}."
            )


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Around the writing of a file: turns an error of the disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"--output {output} cannot be written: {error.strerror or error}.") from None
