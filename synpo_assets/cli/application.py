"""What all commands of `synpo` share: how they are made, the options for a home, and what they say of errors."""

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resources.common.errors import FinalError, ModelSourceError
from resources.common.text import visible
from resources.settings.files import home_directory
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from synpo_assets.cli.errors import sentence_of
from synpo_assets.cli.home import chosen_settings, prepare_home

if TYPE_CHECKING:
    from synpo_assets.graph.services import Services


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
        except KeyboardInterrupt as interrupt:
            continues = str(interrupt) or "Give the same command again."
            typer.echo(f"synpo: interrupted. {continues}", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            is_sentence = isinstance(error, SettingsError | ModelSourceError | FinalError)
            if (sentence := str(error) if is_sentence else sentence_of(error)) is None:
                raise
            # It may repeat what a file or a server says.
            typer.echo(f"synpo: {visible(sentence)}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command, with examples at the end of its help."""
    return app.command(cls=Command, epilog="\n\n".join(["Examples:", *examples]))


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"synpo {importlib.metadata.version('synpo')}")
        raise typer.Exit


@app.callback(epilog="Examples:\n\nsynpo run --preset laptop\n\nsynpo ui\n\nsynpo run --help")
def synpo(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """SynPO: a language model boosts itself with synthetic preference data."""


Preset = Annotated[
    str | None, typer.Option(help="laptop, single_gpu, paper_mistral or paper_llama3. A new home starts from laptop.")
]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="A settings file of your own (YAML).")]
Home = Annotated[
    Path | None, typer.Option(help="Where history and artifacts live. Default: SYNPO_HOME, else .synpo in the project.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]


def opened(home: Path | None) -> "Services":
    """The services of a home that exists, with Dagster set to its history."""
    settings, place = existing(home)
    prepare_home(place, settings)
    return services_of(settings, place)


def chosen(home: Path | None, preset: str | None = None, settings_file: Path | None = None) -> tuple[Settings, Path]:
    """The settings and place of a home, which may not exist yet."""
    place = home.absolute() if home else home_directory()
    return chosen_settings(place, preset, settings_file), place


def existing(home: Path | None) -> tuple[Settings, Path]:
    """The settings and place of a home that exists, once its storage has answered."""
    settings, place = chosen(home)
    if not (place / "settings.yaml").exists():
        raise SettingsError(
            f"{place} is not the home of an experiment: it holds no settings.yaml. Name the right one with --home, or make "
            "this one with `synpo run`."
        )
    from synpo_assets.cli.preflight import check_storage

    check_storage(settings.storage)
    return settings, place


def services_of(settings: Settings, home: Path) -> "Services":
    """The services of an experiment, with the graph that its settings make."""
    # The code location reads the settings of one home when it loads: it shall be one that is asked for.
    os.environ.setdefault("SYNPO_HOME", str(home.absolute()))
    from definitions import build

    return build(settings, home)[1]
