"""Finished iterations of several homes beside each other: the settings that differ, and the figures of each iteration.

Each home is read by its own settings and its own history, so the settings of this process do not matter.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from dagster import DagsterInstance
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resources.common.text import visible
from resources.settings.files import load_settings
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.tables import ParquetTables
from synpo_assets.reports.boosting_report import iterations_of, read_iteration
from synpo_assets.reports.rows import GENERATED_BY, MISSING, TRAINED_BY, FinishedIteration

WIDTH = 100
# Of each figure: how it is called, and how it is written.
FORMATS = {
    "win rate over M_0": "{:.1%}", "instructions M_0": "{:.1%}", "instructions M_t": "{:.1%}", "reward M_0": "{:.3f}",
    "reward M_t": "{:.3f}", "margin": "{:.3f}",
    "chosen / rejected length": "{:.2f}", "pairs kept": "{:,}", "tokens generated": "{:,}", "tokens trained": "{:,}",
    "seconds": "{:,}",
}  # fmt: skip


def compared(homes: Sequence[Path]) -> tuple[dict[str, list[str]], pl.DataFrame]:
    """Reads the settings and the finished iterations of several homes.

    Args:
        homes: Their directories, two or more.

    Returns:
        The settings that differ, by dotted name, each with its value in every home; and a table with home, iteration
        and the figures, a row for each finished iteration.

    Raises:
        SettingsError: There are fewer than two homes, one is named twice or is none, or one has no finished iteration.
    """
    if len({home.resolve() for home in homes}) < max(2, len(homes)):
        raise SettingsError("Name two homes or more to compare, each once.")
    settings = [_settings_of(home) for home in homes]
    rows = [row for home, own in zip(homes, settings, strict=True) for row in _iterations(home, own)]
    return differing_settings(settings), pl.DataFrame(rows, infer_schema_length=None)


def differing_settings(settings: Sequence[Settings]) -> dict[str, list[str]]:
    """The settings that are not the same in all experiments, by dotted name, with the value in each as text."""
    flat = [dict(_flattened(one.model_dump())) for one in settings]
    names = dict.fromkeys(name for one in flat for name in one)
    values = {name: [str(one.get(name, MISSING)) for one in flat] for name in names}
    # The address of a database may hold a password.
    hidden = "storage.dagster_database"
    return {
        name: ["not shown"] * len(flat) if name == hidden else each
        for name, each in values.items()
        if len(set(each)) > 1
    }


def print_comparison(homes: Sequence[Path], output: Path | None, overwrite: bool = False) -> None:
    """Prints what differs and what came of it, and writes the figures as CSV where asked for.

    Args:
        homes: Their directories, two or more.
        output: The file to write.
        overwrite: Whether it may be replaced.

    Raises:
        SettingsError: As in `compared`; or the file is no .csv, exists or cannot be written.
    """
    if output is not None and output.suffix != ".csv":
        raise SettingsError(f"{output} is no .csv file: name one that ends so.")
    if output is not None and output.exists() and not overwrite:
        raise SettingsError(f"{output} exists: choose another --output, or replace it with --overwrite.")
    differing, figures = compared(homes)
    console = Console(width=WIDTH)
    settings = Table("setting", "home", "value", title="Settings that differ", title_justify="left")
    for name, values in differing.items():
        for place, (home, value) in enumerate(zip(homes, values, strict=True)):
            settings.add_row("" if place else name, Text(visible(str(home))), Text(visible(value)))
    console.print(settings if differing else "All settings are the same.")
    table = Table(title="Finished iterations, rewards of held-out prompts", title_justify="left", padding=0)
    for name in ("home", "t"):
        table.add_column(name, overflow="fold")
    for name in FORMATS:
        # Folded, because a figure whose end is cut off would be a wrong one.
        table.add_column(name, justify="right", overflow="fold")
    for home, iteration, *values in figures.iter_rows():
        cells = (MISSING if value is None else form.format(value)
                 for form, value in zip(FORMATS.values(), values, strict=True))  # fmt: skip
        table.add_row(Text(visible(home)), iteration.lstrip("0"), *cells)
    console.print(table)
    if output is not None:
        try:
            figures.write_csv(output)
        except OSError as error:
            raise SettingsError(f"{output} cannot be written: {error.strerror or error}.") from None


def _settings_of(home: Path) -> Settings:
    if not (home / "settings.yaml").is_file() or not (home / "dagster.yaml").is_file():
        raise SettingsError(f"{home} is no home of an experiment: it holds no settings.yaml or no dagster.yaml.")
    return load_settings(home / "settings.yaml")


def _iterations(home: Path, settings: Settings) -> list[dict[str, Any]]:
    tables = ParquetTables(f"{settings.storage.root(home.absolute())}/tables")
    with DagsterInstance.from_config(str(home.absolute())) as instance:
        finished, _ = iterations_of(instance)
        if not finished:
            raise SettingsError(f"{home} has no finished iteration: make one with `synpo run --home {home}`.")
        return [{"home": str(home), **_figures(read_iteration(instance, tables, key))} for key in finished]


def _figures(iteration: FinishedIteration) -> dict[str, Any]:
    figure = iteration.figure
    values = (
        figure("evaluation", "win_rate_over_initial"),
        figure("instruction_following", "verifiable_rate initial"),
        figure("instruction_following", "verifiable_rate policy"),
        figure("evaluation", "held_out_reward initial"),
        figure("evaluation", "held_out_reward policy"),
        figure("preference_pairs", "mean_margin"),
        figure("preference_pairs", "chosen_to_rejected_length"),
        iteration.rows("preference_pairs"),
        sum(figure(asset, "generated_tokens") or 0 for asset in GENERATED_BY),
        sum(figure(asset, "tokens") or 0 for asset in TRAINED_BY),
        round(iteration.seconds),
    )
    return {"iteration": iteration.key, **dict(zip(FORMATS, values, strict=True))}


def _flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
