"""Finished iterations of one home or several side by side: the settings that differ, and the metrics of each iteration.

Each home is read by its own settings and its own history, so the settings of this process do not matter. What differs between
homes is what their settings files say; what differs between the iterations of one home is what these were made with.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

import polars as pl
from dagster import DagsterInstance
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resources.common.errors import DamageError, FinalError
from resources.common.text import visible
from resources.judging.judge_choice import INDEPENDENT
from resources.settings.files import dagster_configuration, home_settings
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.output_files import refuse_existing, writing
from synpo_assets.graph.boosting import FORMS
from synpo_assets.graph.metrics import MetricName, Which
from synpo_assets.graph.services import Services
from synpo_assets.graph.texts import MISSING
from synpo_assets.graph.used_settings import differing_settings, values_of
from synpo_assets.reports.boosting_report import iterations_of, read_iteration
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.rows import total

Opener = Callable[[Settings, Path], Services]

WIDTH, SIDE_BY_SIDE = 100, 6
# Its address may hold a password.
DATABASE = "storage.dagster_database"


def _value(
    metric: MetricName, of: str | None = None, **which: Unpack[Which]
) -> Callable[[FinishedIteration], float | None]:
    return lambda iteration: iteration.metrics.value(metric, of, **which)


# Of each figure: its value, and how it is written.
FIGURES: dict[str, tuple[Callable[[FinishedIteration], float | None], str]] = {
    "win rate over M_0": (_value("win_rate", "candidate", over="initial", by=INDEPENDENT), "{:.1%}"),
    "both answers ended": (_value("win_rate_both_ended", "candidate", over="initial", by=INDEPENDENT), "{:.1%}"),
    "equal steps over M_0": (_value("win_rate", "equal_steps", over="initial", by=INDEPENDENT), "{:.1%}"),
    "equal steps over M_t": (_value("win_rate", "equal_steps", over="candidate", by=INDEPENDENT), "{:.1%}"),
    "length-controlled": (_value("length_controlled_win_rate", "candidate", over="initial", by=INDEPENDENT), "{:.1%}"),
    **{f"M_0 {form}": (_value("win_rate", form, over="initial", by=INDEPENDENT), "{:.1%}") for form in FORMS},
    "instructions M_0": (_value("verifiable_rate", "initial"), "{:.1%}"),
    "instructions M_t": (_value("verifiable_rate", "candidate"), "{:.1%}"),
    "instructions equal steps": (_value("verifiable_rate", "equal_steps"), "{:.1%}"),
    "gold over equal steps": (_value("gold_log_likelihood_gain", "candidate", over="equal_steps"), "{:+.3f}"),
    "reward M_0": (_value("held_out_reward", "initial"), "{:.3f}"),
    "reward M_t": (_value("held_out_reward", "candidate"), "{:.3f}"),
    "margin": (_value("mean_margin"), "{:.3f}"),
    "chosen / rejected length": (_value("chosen_to_rejected_length"), "{:.2f}"),
    "pairs kept": (_value("rows", asset="preference_pairs"), "{:,.0f}"),
    "steps": (_value("training_steps", asset="model_checkpoint"), "{:,.0f}"),
    "tokens generated": (lambda iteration: total(iteration, "generated_tokens"), "{:,.0f}"),
    "tokens trained": (lambda iteration: total(iteration, "trained_tokens"), "{:,.0f}"),
    "seconds": (lambda iteration: round(iteration.seconds), "{:,.0f}"),
}


def compared(homes: Sequence[Path], open_experiment: Opener) -> tuple[dict[str, list[str]], pl.DataFrame]:
    """Reads the settings and the finished iterations of homes.

    Returns the settings that differ, by dotted name, with the value in every home, or in every iteration of a single home; and
    a table with home, iteration and the columns, a row for each finished iteration.
    """
    if len({home.resolve() for home in homes}) < len(homes):
        raise SettingsError("Name the homes to compare, each once.")
    settings = [_settings_of(home) for home in homes]
    made = {home: _iterations(home, own, open_experiment) for home, own in zip(homes, settings, strict=True)}
    rows = [
        {"home": str(home), "iteration": each.key} | {name: value(each) for name, (value, _) in FIGURES.items()}
        for home, iterations in made.items()
        for each in iterations
    ]
    if len(homes) == 1:
        differing = differing_settings((each.settings for each in made[homes[0]]), in_all=True)
    else:
        differing = differing_settings(values_of(Settings.model_fields, each) for each in settings)
    if DATABASE in differing:
        differing[DATABASE] = ["not shown"] * len(homes)
    return differing, pl.DataFrame(rows, infer_schema_length=None)


def print_comparison(homes: Sequence[Path], open_experiment: Opener, output: Path | None, overwrite: bool) -> None:
    """Prints what differs and what came of it, and writes the figures as CSV where asked for."""
    if output is not None and output.suffix != ".csv":
        raise SettingsError(f"{output} is no .csv file: name one that ends so.")
    if output is not None:
        refuse_existing(output, overwrite)
    differing, figures = compared(homes, open_experiment)
    console = Console(width=WIDTH)
    where = homes if len(homes) > 1 else figures["iteration"].to_list()
    of_what = "home" if len(homes) > 1 else "iteration"
    settings = Table("setting", of_what, "value", title="Settings that differ", title_justify="left")
    for name, values in differing.items():
        for number, (place, value) in enumerate(zip(where, values, strict=True)):
            settings.add_row("" if number else name, Text(visible(str(place))), Text(visible(value)))
    console.print(settings if differing else "All settings are the same.")
    console.print("Finished iterations, rewards of held-out prompts", style="italic")
    for some in figures.iter_slices(SIDE_BY_SIDE):
        table = Table()
        table.add_column("", no_wrap=True)
        for home, iteration in some.select("home", "iteration").iter_rows():
            name = f"M_{int(iteration)}" if len(homes) == 1 else f"{visible(home)} M_{int(iteration)}"
            # Folded, because a number whose end is cut off would be a wrong one.
            table.add_column(Text(name), justify="right", overflow="fold")
        for name, (_, form) in FIGURES.items():
            if figures[name].null_count() < figures.height:
                table.add_row(name, *(MISSING if value is None else form.format(value) for value in some[name]))
        console.print(table)
    if output is not None:
        with writing(output):
            figures.write_csv(output)


def _settings_of(home: Path) -> Settings:
    if not (home / "settings.yaml").is_file() or not (home / "dagster.yaml").is_file():
        raise SettingsError(f"{home} is not the home of an experiment: it holds no settings.yaml or no dagster.yaml.")
    dagster_configuration(home)
    return home_settings(home)


def _iterations(home: Path, settings: Settings, open_experiment: Opener) -> list[FinishedIteration]:
    services = open_experiment(settings, home.absolute())
    try:
        with DagsterInstance.from_config(str(home.absolute())) as instance:
            finished, _ = iterations_of(instance, services)
            made = [read_iteration(instance, services, key) for key in finished]
    except DamageError as error:
        raise FinalError(f"{error.problem}: make it again with `synpo run --home {home}`.") from None
    if not made:
        raise SettingsError(f"{home} has no finished iteration: make one with `synpo run --home {home}`.")
    return made
