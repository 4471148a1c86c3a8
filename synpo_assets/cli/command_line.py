"""How a command shows its options, and how it ends: with a sentence where its user can mend what is wrong."""

import os
import sqlite3
from typing import Any

import typer

from resources.common.errors import DISK_IS_FULL, FinalError, full_disk
from resources.models.model_source import ModelSourceError
from resources.settings.sections import SettingsError


class _Help:
    """Help in which a flag, which takes no value, shows no type of one."""

    def get_params(self, ctx: Any) -> Any:
        """The options of a command, `--help` among them."""
        options = super().get_params(ctx)  # type: ignore[misc]
        for option in options:
            if getattr(option, "is_flag", False):
                option.metavar = ""
        return options


class Command(_Help, typer.core.TyperCommand):
    """One command."""


class Commands(_Help, typer.core.TyperGroup):
    """The commands; an error that the user can mend is printed as its sentence, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except (SettingsError, ModelSourceError, FinalError) as error:
            typer.echo(f"synpo: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            continues = str(interrupt) or "Give the same command again."
            typer.echo(f"synpo: interrupted. {continues}", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if (sentence := sentence_of(error)) is None:
                raise
            typer.echo(f"synpo: {sentence}", err=True)
            raise typer.Exit(2) from None


def sentence_of(error: BaseException) -> str | None:
    """What is wrong with a home or its disk, and what mends it; None if an error tells of neither."""
    if (reason := full_disk(error)) is not None:
        return DISK_IS_FULL.format(reason)
    home = os.environ.get("DAGSTER_HOME", "the home")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, sqlite3.DatabaseError):
            return (
                f"The history in {home}/history cannot be used: {cause}. Put the folder back from a copy; or move it away, and "
                "`synpo run` makes everything again, for which it reads the finished completions in the folder shards."
            )
        if type(cause).__name__ == "DagsterInvalidConfigError":
            return f"{home}/dagster.yaml is no configuration of Dagster: move it away, and it is written anew."
        if isinstance(cause, OSError) and cause.filename is not None:
            return (
                f"{cause.filename} cannot be used: {cause.strerror}. Put back what belongs there, or move away what does not, and "
                "give the same command again."
            )
        cause = cause.__cause__ or cause.__context__
    return None
