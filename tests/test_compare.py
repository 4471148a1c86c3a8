"""`synpo compare` on real Dagster histories of stand-in iterations."""

import shutil

import dagster as dg
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from resources.settings.files import load_settings
from synpo_assets.cli.application import services_of
from synpo_assets.cli.commands import app
from synpo_assets.graph.services import USED_SETTINGS
from synpo_assets.reports import compare as compare_module
from synpo_assets.reports.compare import compared
from tests.nano import nano_settings, write_settings
from tests.stand_ins import services_in
from tests.test_report import make_iteration


def compare(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def make_home(place, model, iterations, **changes):
    """A home with settings and so many finished stand-in iterations."""
    place.mkdir()
    settings = load_settings(write_settings(place / "mine.yaml", nano_settings(model) | changes))
    write_settings(place / "settings.yaml", yaml.safe_load(yaml.safe_dump(settings.model_dump())))
    (place / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    with dg.DagsterInstance.from_config(str(place)) as instance:
        for iteration in range(1, iterations + 1):
            make_iteration(instance, services_in(place, settings), iteration)
    return place


def made_with(place, iteration, **settings):
    """Records what the checkpoint of an iteration was made with."""
    store = services_in(place, load_settings(place / "settings.yaml")).used_settings
    rows = [("model_checkpoint", name.replace("__", "."), value) for name, value in settings.items()]
    store.write("model_checkpoint", iteration, pl.DataFrame(rows, schema=USED_SETTINGS, orient="row"))


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("homes")
    model = tmp_path / "model"
    return [
        make_home(tmp_path / "a", model, 2),
        make_home(tmp_path / "b", model, 1, random_seed=7),
    ]


def test_it_shows_what_differs_and_what_came_of_it(homes, tmp_path):
    file = tmp_path / "figures.csv"
    result = compare(*homes, "--output", file)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 100
    assert "random_seed" in result.output
    assert "max_iterations" not in result.output
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if line.startswith("│")
    ]
    assert ["win rate over M_0", "60.0%", "70.0%", "60.0%"] in rows
    assert ["tokens trained", "3,000", "3,000", "3,000"] in rows
    figures = pl.read_csv(file, schema_overrides={"iteration": pl.String})
    assert figures["home"].to_list() == [str(homes[0]), str(homes[0]), str(homes[1])]
    assert figures["iteration"].to_list() == ["0001", "0002", "0001"]
    assert figures["win rate over M_0"].to_list() == pytest.approx([0.6, 0.7, 0.6])
    assert figures["length-controlled"].to_list() == pytest.approx([0.55, 0.55, 0.55])
    assert figures["equal steps over M_t"].to_list() == pytest.approx([0.45] * 3)
    assert figures["steps"].to_list() == [24, 48, 24]
    assert figures["reward M_t"].to_list() == pytest.approx([1.1, 2.1, 1.1])
    assert figures["pairs kept"].to_list() == [5, 5, 5]
    assert figures["tokens generated"].to_list() == [501, 501, 501]
    assert figures["tokens trained"].to_list() == [3000, 3000, 3000]


def test_of_many_iterations_all_figures_are_shown(tmp_path, monkeypatch):
    width = compare_module.SIDE_BY_SIDE
    figures = pl.DataFrame({"home": ["a"] * 50, "iteration": [f"{number:04d}" for number in range(1, 51)]})
    figures = figures.with_columns(**{name: pl.lit(0.123) for name in compare_module.FIGURES})
    monkeypatch.setattr(compare_module, "compared", lambda *_: ({}, figures))
    result = compare(tmp_path)
    assert result.exit_code == 0, result.output
    heads = [line for line in result.output.splitlines() if "M_" in line and line.startswith("┃")]
    assert len(heads) == -(-50 // width)
    assert result.output.count("12.3%") == 50 * sum("%" in form for _, form in compare_module.FIGURES.values())
    assert "chosen / rejected length" in result.output


def test_a_password_is_not_shown(homes, tmp_path):
    place = shutil.copytree(homes[1], tmp_path / "c")
    settings = yaml.safe_load((place / "settings.yaml").read_text())
    assert compared([homes[1], place], services_of)[0] == {}
    settings["storage"]["dagster_database"] = "postgresql://u@h/d"
    write_settings(place / "settings.yaml", settings)
    differing, _ = compared([homes[1], place], services_of)
    assert differing == {"storage.dagster_database": ["not shown", "not shown"]}


def test_the_iterations_of_one_home_are_compared_by_what_they_were_made_with(homes):
    assert "All settings are the same." in compare(homes[0]).output
    for iteration, beta in (("0001", "2.0"), ("0002", "3.0")):
        made_with(homes[0], iteration, random_seed="42", preference_optimization__loss__beta=beta)
    result = compare(homes[0])
    assert result.exit_code == 0, result.output
    table = result.output.partition("Settings that differ")[2].partition("Finished iterations")[0]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert cells == [["preference_optimization.loss.beta", "0001", "2.0"], ["", "0002", "3.0"]]


@pytest.mark.parametrize(("second", "words"), [
    ("nowhere", "is not the home of an experiment"), ("empty", "has no finished iteration"), ("same", "each once"),
])  # fmt: skip
def test_what_cannot_be_compared_is_said_in_a_sentence(homes, tmp_path, second, words):
    if second == "empty":
        make_home(tmp_path / "empty", tmp_path / "model", 0)
    result = compare(homes[0], homes[0] if second == "same" else tmp_path / second)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_file_that_is_no_csv_is_refused(homes, tmp_path):
    result = compare(*homes, "--output", tmp_path / "figures.txt")
    assert result.exit_code == 2
    assert "is no .csv file" in result.stderr
    assert not (tmp_path / "figures.txt").exists()


def test_a_file_that_exists_is_replaced_only_when_asked(homes, tmp_path):
    file = tmp_path / "figures.csv"
    file.write_text("mine")
    result = compare(*homes, "--output", file)
    assert result.exit_code == 2
    assert "figures.csv exists: choose another --output, or replace it with --overwrite" in result.stderr
    assert file.read_text() == "mine"
    assert compare(*homes, "--output", file, "--overwrite").exit_code == 0
    assert pl.read_csv(file).height == 3


def test_of_several_homes_the_damaged_one_is_named(homes, tmp_path):
    place = shutil.copytree(homes[1], tmp_path / "damaged")
    (table,) = (place / "metrics/evaluation").glob("*.parquet")
    table.write_bytes(b"")
    result = compare(homes[0], place)
    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert "is not as it was written" in words
    assert f"`synpo run --home {place}`" in words
    assert "Traceback" not in words
