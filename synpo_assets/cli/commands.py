"""The command `synpo`: init, run, check, ui, ask, rows, trace, compare, export, clean."""

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from resources.common.errors import FinalError, ModelSourceError
from resources.settings.sections import SettingsError
from synpo_assets.cli.application import (
    Home,
    Overwrite,
    Preset,
    SettingsFile,
    app,
    chosen,
    command,
    existing,
    opened,
    services_of,
)
from synpo_assets.cli.errors import defect_sentence
from synpo_assets.cli.home import PROJECT, interruptible, settled
from synpo_assets.publishing.forms import Format

__all__ = ["app", "main"]
# New objects; Python's own is 700.
COLLECTED_AFTER = 100_000


def main() -> None:
    """Runs the command that was given; an error that nobody foresaw is said in a sentence, with exit code 1."""
    # Hundreds of thousands of objects are imported, and looking for garbage among them takes a fifth of a command's time.
    gc.set_threshold(COLLECTED_AFTER)
    try:
        app()
    except Exception as error:
        typer.echo(f"synpo: {defect_sentence(error)}", err=True)
        sys.exit(1)


@command("synpo run --preset laptop", "synpo run --settings mine.yaml --home runs/mine --iterations 4")
def run(
    preset: Preset = None,
    settings_file: SettingsFile = None,
    home: Home = None,
    iterations: Annotated[int, typer.Option(help="Make sure that iterations 1 to N exist.")] = 1,
) -> None:
    """Materialize whatever of iterations 1 to N is missing, in order, in the foreground."""
    settings, place = chosen(home, preset, settings_file)
    from synpo_assets.cli.executor import start_preloading

    checking = start_preloading(place)
    from dagster import DagsterInstance

    from synpo_assets.cli.preflight import check_before_run, keep_expected_seconds
    from synpo_assets.cli.runs import locked, run_missing
    from synpo_assets.cli.summary import print_summary

    data = check_before_run(settings, place, iterations)
    with interruptible(place, iterations), locked(place), contextlib.ExitStack() as stack:
        # Another first command may have made the home in the meantime, with other settings.
        settings = settled(place, preset, settings_file)
        checking.close()
        keep_expected_seconds(settings, place, *data)
        services = services_of(settings, place)
        instance = stack.enter_context(DagsterInstance.get())
        if not run_missing(instance, services, iterations):
            typer.echo(
                "synpo: the run failed for the reason above; `synpo ui` shows the whole trace. Correct the cause and run the "
                f"same command again: finished work in {place} is kept.",
                err=True,
            )
            raise typer.Exit(1)
        print_summary(instance, services, iterations)


@command(
    "synpo init mine.yaml --data questions.jsonl",
    "synpo init mine.yaml --data questions.csv --model org/name@4f2c9e1 --minutes 30 --no-gpu",
    "synpo init --presets",
)
def init(
    output: Annotated[Path | None, typer.Argument(help="The settings file to write; it must not exist.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Questions with good answers: a .jsonl, .csv or .parquet file.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="M_0: a folder, or a hub id such as org/name@revision. Default: the preset's.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the question. Default: by its name.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of the answer. Default: by its name.")] = None,
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--no-gpu", help="Whether there is a GPU. Default: what this machine has.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="How long one iteration with all before it may take. Default: as in the preset."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The preset to start from. Default: single_gpu with a GPU, else laptop.")
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets and exit.")] = False,
) -> None:
    """Write a commented settings file for your model and data; on a terminal, what is not stated is asked for."""
    from synpo_assets.cli.start import print_presets, write_settings_file

    if presets:
        print_presets()
        return
    asks = sys.stdin.isatty()
    if asks:
        output = output or typer.prompt("settings file to write", default="mine.yaml", type=Path)
        data = data or typer.prompt("file of questions with answers", type=Path)
        model = (
            model
            or typer.prompt("model (folder or hub id; empty: the preset's)", default="", show_default=False)
            or None
        )
        minutes = minutes or typer.prompt("minutes for one iteration (0: as in the preset)", default=0.0) or None
    if output is None or data is None:
        raise SettingsError(
            "Name the settings file to write and the --data: synpo init mine.yaml --data questions.jsonl"
        )
    confirm = (lambda what, proposal: typer.prompt(what, default=proposal)) if asks else None
    write_settings_file(output, data, model, preset, (prompt_column, answer_column), gpu, minutes, confirm)


@command("synpo check", "synpo check --settings mine.yaml --home runs/mine", "synpo check --home runs/mine --calibrate")
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

    print_check(*chosen(home, preset, settings_file), calibrate)


@command(
    "synpo export --format trl --output pairs.parquet",
    "synpo export --format axolotl --output exported --only 2,3 --home runs/mine",
    "synpo export --format review --output review.csv --iteration 2",
    "synpo export --format gguf --output model.gguf --iteration 2",
)
def export(
    form: Annotated[
        Format,
        typer.Option("--format", help="The trainer that shall read the pairs; review: people, in a table; gguf: M_t."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="trl: a folder, a .jsonl or .parquet file; openai: a folder or a .jsonl file; llama-factory, axolotl: a folder; "
            "review: a .csv file; gguf: a .gguf file."
        ),
    ],
    home: Home = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            "--iteration",
            help="Only the pairs of these iterations, such as 2,3. Default: all; gguf needs one.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Write the preference pairs for another trainer, or for people who shall say which answer is better; or M_t as a GGUF file."""
    from synpo_assets.publishing.export import print_export

    print_export(*existing(home), form, only, output, overwrite)


@command(
    'synpo ask "Why is the sky blue?"',
    "synpo ask --models 0,2 --home runs/mine",
    "synpo ask --file prompts.jsonl --output answers.jsonl",
)
def ask(
    prompt: Annotated[
        str | None, typer.Argument(help="A question. Without one and without --file, you are asked.")
    ] = None,
    home: Home = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Which two answer, by iteration (0 is M_0) or the beginning of a sha: 0,2. Default: M_0 and the newest M_t."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts to answer: a .jsonl file with a `prompt` in each line.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write prompts and answers into this .jsonl file.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Have M_0 and M_t answer the same prompts side by side; the judge of the home says which answer it prefers."""
    services = opened(home)
    from synpo_assets.cli.ask import ask as answer

    answer(services, prompt, models, file, output, overwrite)


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
    overwrite: Overwrite = False,
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
    overwrite: Overwrite = False,
) -> None:
    """Put finished iterations of one home or several beside each other: settings that differ, and figures."""
    from synpo_assets.reports.compare import print_comparison

    print_comparison(homes, services_of, output, overwrite)


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
    settings, place = chosen(home, preset, settings_file)
    from synpo_assets.cli.preflight import check_data_and_training, check_storage, keep_expected_seconds

    check_storage(settings.storage)
    from dagster import DagsterInstance

    from synpo_assets.cli.runs import close_dead_runs, locked

    # Two daemons on one home would launch a run twice.
    with locked(place, "ui"):
        settings = settled(place, preset, settings_file)
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
