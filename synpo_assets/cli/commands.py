"""The command `synpo`: run, check, ui, rows, trace, compare, export, clean."""

import contextlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resources.common.errors import DISK_IS_FULL, FinalError, full_disk
from resources.models.model_source import ModelSourceError
from resources.settings.files import home_directory
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from synpo_assets.cli.home import PROJECT, chosen_settings, interruptible, prepare_home
from synpo_assets.publishing.forms import Format

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
        except (SettingsError, ModelSourceError, FinalError) as error:
            typer.echo(f"synpo: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            continues = str(interrupt) or "Give the same command again."
            typer.echo(f"synpo: interrupted. {continues}", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if (reason := full_disk(error)) is None:
                raise
            typer.echo(f"synpo: {DISK_IS_FULL.format(reason)}", err=True)
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


@command("synpo run --preset laptop", "synpo run --settings mine.yaml --home runs/mine --iterations 4")
def run(
    preset: Preset = None,
    settings_file: SettingsFile = None,
    home: Home = None,
    iterations: Annotated[int, typer.Option(help="Make sure that iterations 1 to N exist.")] = 1,
) -> None:
    """Materialize whatever of iterations 1 to N is missing, in order, in the foreground."""
    settings, place = _chosen(home, preset, settings_file)
    from synpo_assets.cli.preflight import check_before_run, keep_expected_seconds

    data = check_before_run(settings, place, iterations)
    from dagster import DagsterInstance

    from synpo_assets.cli.executor import start_preloading
    from synpo_assets.cli.runs import locked, run_missing
    from synpo_assets.cli.summary import print_summary

    with interruptible(place, iterations), locked(place), contextlib.ExitStack() as stack:
        # Another first run may have made the home in the meantime, with other settings.
        settings = chosen_settings(place, preset, settings_file)
        prepare_home(place, settings)
        start_preloading()
        keep_expected_seconds(settings, place, *data)
        services = _services(settings, place)
        instance = stack.enter_context(DagsterInstance.get())
        if not run_missing(instance, services, iterations):
            typer.echo(
                "synpo: the run failed for the reason above; `synpo ui` shows the whole trace. Correct the cause and run the "
                f"same command again: finished work in {place} is kept.",
                err=True,
            )
            raise typer.Exit(1)
        print_summary(instance, services, iterations)


@command("synpo check", "synpo check --settings mine.yaml", "synpo check --home runs/mine --calibrate")
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


@command(
    "synpo export --format trl --output pairs.parquet",
    "synpo export --format axolotl --output exported --only 2,3 --home runs/mine",
)
def export(
    form: Annotated[Format, typer.Option("--format", help="The trainer that shall read the pairs.")],
    output: Annotated[
        Path, typer.Option(help="A folder, or a .jsonl file; for trl also a .parquet file, for openai a .jsonl file.")
    ],
    home: Home = None,
    only: Annotated[
        str | None, typer.Option(help="Only the pairs of these iterations, such as 2,3. Default: of all.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Write the preference pairs in the form that another trainer reads."""
    from synpo_assets.publishing.export import print_export

    print_export(*_existing(home), form, only, output, overwrite)


@command("synpo clean --home runs/mine", "synpo clean --home runs/mine --delete")
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


@command("synpo trace pair-3f9a", "synpo trace 3f9a --json --home runs/mine")
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


@command(
    "synpo rows keyword_pool",
    "synpo rows 'preference_pairs[0002]' --where 'margin > 2' --columns pair_id,margin",
    "synpo rows evaluation --home runs/mine --output evaluation.csv",
)
def rows(
    label: Annotated[str, typer.Argument(metavar="ASSET[ITERATION]", help="A table, of all iterations or of one.")],
    home: Home = None,
    where: Annotated[str | None, typer.Option(help="Only rows for which this condition in SQL holds.")] = None,
    columns: Annotated[str | None, typer.Option(help="Only these columns, with commas between them.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write all rows into this .csv, .jsonl or .parquet file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Print the rows of a table, filter them, or write them into a file."""
    services = opened(home)
    from synpo_assets.cli.rows import print_rows

    print_rows(services, label, where, columns, output, overwrite)


@command("synpo compare runs/mine runs/other", "synpo compare runs/mine runs/other --output figures.csv")
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


@command("synpo ui", "synpo ui --settings mine.yaml --home runs/mine --port 3001")
def ui(
    preset: Preset = None,
    settings_file: SettingsFile = None,
    home: Home = None,
    port: Annotated[int, typer.Option(help="Port of the web server.")] = 3000,
    host: Annotated[
        str, typer.Option(help="Address that the web server listens on; another than this machine's own needs --token.")
    ] = "127.0.0.1",
    token: Annotated[
        bool, typer.Option("--token", help="Print an address with a new secret, and refuse whoever does not open that.")
    ] = False,
) -> None:
    """Open the Dagster UI, with its daemon, on the same home; the report is below its address, at /reports."""
    from synpo_assets.cli.webserver import address, new_secret, serve

    secret = new_secret(host, token)
    settings, place = _chosen(home, preset, settings_file)
    from synpo_assets.cli.preflight import check_data_and_training, check_storage, keep_expected_seconds

    check_storage(settings.storage)
    from dagster import DagsterInstance

    from synpo_assets.cli.runs import close_dead_runs, locked

    # Two daemons on one home would launch a run twice.
    with locked(place, "ui"):
        prepare_home(place, settings)
        # What is wrong with the data is shown in the UI; where a run is at work, none of it is dead.
        with contextlib.suppress(SettingsError, ModelSourceError, FinalError):
            seed, _, instructions = check_data_and_training(settings)
            keep_expected_seconds(settings, place, seed, instructions)
        with contextlib.suppress(SettingsError), locked(place), DagsterInstance.get() as instance:
            close_dead_runs(instance)
        os.chdir(PROJECT)
        typer.echo(
            f"synpo: open {address(host, port, secret)} in a browser. In a new home press Jobs, foundation, Materialize all; then "
            "iteration, with 0001."
        )
        serve(host, port, secret)


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
