"""The home directory of one experiment: its settings, Dagster's history, tables, shards and checkpoints."""

import contextlib
import fcntl
import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import ValidationError

from resources.settings.files import LAST_VALID, dagster_configuration, home_settings, load_settings, preset_path
from resources.settings.sections import SettingsError, flattened
from resources.settings.settings import Settings
from resources.storage.files import write_atomically

SHOWN_DIFFERENCES = 5
OWNER_ALONE, ONLY_OWNER_ENTERS = 0o600, 0o700
UNUSABLE_IN_PATHS = ("?", "#", "%")
PROJECT = Path(__file__).parents[2]
STORAGE_COMMENT = "# Written by synpo from storage.dagster_database in settings.yaml: change it there."


def chosen_settings(home: Path, preset: str | None, file: Path | None) -> Settings:
    """The settings of a home: those stored in it, or the ones asked for if it is new.

    Args:
        home: The home directory; it may not exist yet.

    Raises:
        SettingsError: Both are given; something is wrong with them; or the home was made with other settings.
    """
    if found := [letter for letter in UNUSABLE_IN_PATHS if letter in str(home.absolute())]:
        # In the URL of the history's database they mean something else, and files would lie beside the home.
        raise SettingsError(
            f"The path {home} holds `{found[0]}`: name a home without {', '.join(UNUSABLE_IN_PATHS)} with --home."
        )
    if preset and file:
        raise SettingsError("Give --preset or --settings, not both: a settings file can name its preset inside.")
    stored, kept = home / "settings.yaml", home_settings(home)
    if not (preset or file):
        return kept
    asked = load_settings(file if file else preset_path(str(preset)))
    if stored.exists() and (differences := _differences(kept, asked)):
        shown = ", ".join(differences[:SHOWN_DIFFERENCES]) + (", …" if len(differences) > SHOWN_DIFFERENCES else "")
        raise SettingsError(
            f"The home {home} was made with other settings ({shown}). Edit {stored} to change them there, or name "
            "another directory with --home to start another experiment."
        )
    return asked


def settled(home: Path, preset: str | None, file: Path | None) -> Settings:
    """The settings of a home, which is made if it is new, as `chosen_settings`; of two first commands one makes it."""
    home.mkdir(mode=ONLY_OWNER_ENTERS, parents=True, exist_ok=True)
    with (home / "settings.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = chosen_settings(home, preset, file)
        prepare_home(home, settings)
    return settings


def last_valid_settings(home: Path) -> Settings | None:
    """The settings of a home; while those are wrong, the last ones that were valid, or None if there never were any."""
    kept = home / LAST_VALID
    try:
        settings = home_settings(home)
    except SettingsError:
        # An earlier version of the project may have kept them.
        with contextlib.suppress(OSError, ValidationError):
            return Settings.model_validate_json(kept.read_bytes())
        return None
    written = settings.model_dump_json(indent=2).encode()
    if (home / "settings.yaml").exists() and (not kept.is_file() or kept.read_bytes() != written):
        _write_private(kept, written)
    return settings


def prepare_home(home: Path, settings: Settings) -> None:
    """Makes the home usable: settings and Dagster's configuration in it, and in this process's environment."""
    home.mkdir(mode=ONLY_OWNER_ENTERS, parents=True, exist_ok=True)
    if not (home / "settings.yaml").exists():
        # The directory may have been made for it.
        home.chmod(ONLY_OWNER_ENTERS)
        text = "# All settings of this experiment. Edit them here; relative paths are relative to this file.\n"
        text += yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True, width=120)
        _write_private(home / "settings.yaml", text.encode())
    file = home / "dagster.yaml"
    written = dagster_configuration(home)
    template = Path(__file__).with_name("dagster.yaml").read_text()
    wanted = _with_storage(written or template, settings.storage.dagster_database)
    if wanted != written:
        _write_private(file, wanted.encode())
    # An editor, or an earlier version, may have left them readable by others.
    for name in ("settings.yaml", "dagster.yaml", LAST_VALID) if settings.storage.dagster_database else ():
        with contextlib.suppress(OSError):
            (home / name).chmod(OWNER_ALONE)
    os.environ["SYNPO_HOME"] = os.environ["DAGSTER_HOME"] = str(home)


def _write_private(file: Path, content: bytes) -> None:
    """Writes what may tell of a database, which is nobody else's business."""
    write_atomically(file, content)
    file.chmod(OWNER_ALONE)


@contextlib.contextmanager
def interruptible(home: Path, iterations: int) -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does; either tells the command that goes on from there."""
    # A shell script that starts it with `&`, as a batch job does, has it ignore Ctrl-C.
    ends = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, signal.default_int_handler) for each in ends]
    try:
        yield
    except KeyboardInterrupt:
        same = shlex.join(["synpo", "run", "--home", str(home), "--iterations", str(iterations)])
        raise KeyboardInterrupt(f"Finished work is kept, and this goes on from there: {same}") from None
    finally:
        for each, handler in zip(ends, before, strict=True):
            signal.signal(each, handler)


def _with_storage(configuration: str, database: str | None) -> str:
    """Dagster's configuration with the block `storage` for a database; everything else stays as it was written."""
    block = r"^storage:.*(?:\n[ \t].*)*\n?"
    kept = re.sub(rf"\n*^{re.escape(STORAGE_COMMENT)}\n{block}", "\n", configuration, flags=re.MULTILINE)
    if database is None:
        return kept
    kept = re.sub(block, "", kept, flags=re.MULTILINE).rstrip("\n")
    # SQLAlchemy takes plain postgresql:// for psycopg 3, but dagster-postgres comes with psycopg 2.
    url = database.replace("postgresql://", "postgresql+psycopg2://", 1)
    return f"{kept}\n\n{STORAGE_COMMENT}\n{yaml.safe_dump({'storage': {'postgres': {'postgres_url': url}}})}"


def _differences(stored: Settings, asked: Settings) -> list[str]:
    old, new = (dict(flattened(settings.model_dump())) for settings in (stored, asked))
    names = list(dict.fromkeys([*old, *new]))
    # What is empty on one side alone is told by what stands below it on the other.
    differing = [
        name
        for name in names
        if old.get(name) != new.get(name) and not any(each.startswith(f"{name}.") for each in names)
    ]
    # The address of a database is nobody else's business.
    return [
        name if name == "storage.dagster_database" else f"{name}: {old.get(name)} there, {new.get(name)} asked for"
        for name in differing
    ]
