"""The command `synpo`: run, check, export, clean, trace, compare, ui."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resources.common.errors import FinalError
from resources.models.model_source import ModelSourceError
from resources.settings.files import home_directory
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from synpo_assets.cli.home import PROJECT, chosen_settings, prepare_home
from synpo_assets.publishing.forms import Format

if TYPE_CHECKING:
    from synpo_assets.graph.services import Services


class Commands(typer.core.TyperGroup):
    """The commands; an error that the user can mend is printed as its sentence, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except (SettingsError, ModelSourceError, FinalError) as error:
            typer.echo(f"synpo: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    help="SynPO: a language model boosts itself with synthetic preference data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Preset = Annotated[
    str | None, typer.Option(help="laptop, single_gpu, paper_mistral or paper_llama3. A new home starts from laptop.")
]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="A settings file of your own (YAML).")]
Home = Annotated[
    Path | None, typer.Option(help="Where history and artifacts live. Default: SYNPO_HOME, else .synpo in the project.")
]


@app.command()
def run(
    preset: Preset = None,
    settings_file: SettingsFile = None,
    home: Home = None,
    iterations: Annotated[int, typer.Option(help="Make sure that iterations 1 to N exist.")] = 1,
) -> None:
    """Materialize whatever of iterations 1 to N is missing, in order, in the foreground."""
    settings, place = _chosen(home, preset, settings_file)
    from synpo_assets.cli.preflight import check_before_run

    check_before_run(settings, place, iterations)
    prepare_home(place, settings)
    from dagster import DagsterInstance

    from synpo_assets.cli.runs import locked, run_missing
    from synpo_assets.cli.summary import print_summary

    services = _services(settings, place)
    with locked(place), DagsterInstance.get() as instance:
        if not run_missing(instance, services, iterations):
            typer.echo(
                "synpo: the run failed for the reason above; `synpo ui` shows the whole trace. Correct the cause and run the "
                f"same command again: finished work in {place} is kept.",
                err=True,
            )
            raise typer.Exit(1)
        print_summary(instance, services, iterations)


@app.command()
def check(
    preset: Preset = None,
    settings_file: SettingsFile = None,
    home: Home = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure first how fast this machine generates, trains and scores with M_0; takes a minute or two, and later "
            "calls use it.",
        ),
    ] = False,
) -> None:
    """Validate settings, seed data and hardware, and estimate tokens, time and disk; loads a model only to calibrate."""
    from synpo_assets.cli.preflight import print_check

    print_check(*_chosen(home, preset, settings_file), calibrate)


@app.command()
def export(
    form: Annotated[Format, typer.Option("--format", help="The trainer that shall read the pairs.")],
    output: Annotated[
        Path, typer.Option(help="A folder, or a .jsonl file; for trl also a .parquet file, for openai a .jsonl file.")
    ],
    home: Home = None,
    iterations: Annotated[str, typer.Option(help="Whose pairs: numbers such as 1,2, or all.")] = "all",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Write the preference pairs in the form that another trainer reads."""
    from synpo_assets.publishing.export import print_export

    print_export(*_existing(home), form, iterations, output, overwrite)


@app.command()
def clean(
    home: Home = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove what is listed; without it, nothing is removed.")
    ] = False,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints",
            help="With --delete: remove superseded checkpoints too. Tables and pairs of earlier attempts name them by their sha.",
        ),
    ] = False,
) -> None:
    """List what no run with the current settings would read any more.

    Each entry shows its size, its age and what it was made for.

    Completions and scores belong to the settings, the engine and the machine
    that made them. Those of another engine.kind, sampling or library version,
    or of a GPU that is not there now, are listed: clean a home on the machine
    and with the settings that it will be used with.

    An unfinished training is listed when its asset was made since, or when it
    is older than a day; until then the next run goes on from it.
    """
    services = opened(home)
    from synpo_assets.cli.clean import print_clean

    print_clean(services, delete, checkpoints)


@app.command()
def trace(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="An id of a keyword set, prompt, response or pair.")],
    home: Home = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, uncut, as JSON.")] = False,
) -> None:
    """Show the lineage of one row: what it was made from, by whom, and what was trained on it.

    The beginning of an id is enough.
    """
    services = opened(home)
    from synpo_assets.reports.trace import print_trace

    print_trace(services, identifier, as_json)


@app.command()
def compare(
    homes: Annotated[
        list[Path], typer.Argument(metavar="HOME...", help="Homes of experiments; of a single one, its iterations.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write the figures of the iterations into this .csv file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Put finished iterations of one home or several beside each other: settings that differ, and figures."""
    from synpo_assets.reports.compare import print_comparison

    print_comparison(homes, _services, output, overwrite)


@app.command()
def ui(
    home: Home = None,
    port: Annotated[int, typer.Option(help="Port of the web server.")] = 3000,
    host: Annotated[str, typer.Option(help="Address that the web server listens on.")] = "127.0.0.1",
) -> None:
    """Open the Dagster UI, with its daemon, on the same home; the report is below its address, at /reports."""
    settings, place = _chosen(home)
    from synpo_assets.cli.preflight import check_storage

    check_storage(settings.storage)
    prepare_home(place, settings)
    from synpo_assets.cli.webserver import serve

    os.chdir(PROJECT)
    serve(host, port)


def opened(home: Path | None) -> "Services":
    """The services of a home that exists, with Dagster set to its history."""
    settings, place = _existing(home)
    prepare_home(place, settings)
    return _services(settings, place)


def _chosen(home: Path | None, preset: str | None = None, settings_file: Path | None = None) -> tuple[Settings, Path]:
    place = home.absolute() if home else home_directory()
    return chosen_settings(place, preset, settings_file), place


def _existing(home: Path | None) -> tuple[Settings, Path]:
    """The settings and place of a home that exists, once its storage has answered."""
    settings, place = _chosen(home)
    if not (place / "settings.yaml").exists():
        raise SettingsError(
            f"{place} is not the home of an experiment: it holds no settings.yaml. Name the right one with --home, or make "
            "this one with `synpo run`."
        )
    from synpo_assets.cli.preflight import check_storage

    check_storage(settings.storage)
    return settings, place


def _services(settings: Settings, home: Path) -> "Services":
    """The services of an experiment, with the graph that its settings make."""
    # The code location reads the settings of one home when it loads: it shall be one that is asked for.
    os.environ.setdefault("SYNPO_HOME", str(home.absolute()))
    from definitions import build

    return build(settings, home)[1]
