"""What a tracker is told of a home and of a training; trackio keeps it in a file."""

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest

from synpo_assets.graph.curves import training_curves
from synpo_assets.graph.metrics import SCHEMA, Metric, Metrics
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.tracking import track
from tests.nano import active_settings


def finished(number, rate):
    measured = [
        Metric("win_rate", rate, of="candidate", over="initial", by="independent judge", split="test"),
        Metric("win_rate", 0.1, of="candidate", over="initial", by="independent judge", split="dev"),
        Metric("mean_margin", None),
    ]
    about = {"asset": "evaluation", "iteration": number}
    frame = pl.DataFrame([about | vars(metric) for metric in measured], schema=SCHEMA)
    return FinishedIteration(f"{number:04d}", Metrics(frame), 1.0, pl.DataFrame(), [], "reward", {}, {}, None)


@pytest.fixture
def reporting():
    settings = active_settings()
    processes = settings.training_processes.model_copy(update={"report_to": "trackio"})
    return settings.model_copy(update={"training_processes": processes})


def tracked(run):
    with closing(sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "synpo.db")) as connection:
        logged = connection.execute(
            "select step, metrics from metrics where run_name = ? order by id", (run,)
        ).fetchall()
        (config,) = connection.execute("select config from configs where run_name = ?", (run,)).fetchone()
    return [(step, json.loads(row)) for step, row in logged], json.loads(config)


def test_a_home_is_one_run_with_a_row_for_each_iteration(tmp_path, reporting):
    name, report = "evaluation/win_rate of candidate over initial by independent judge", tmp_path / "report.html"
    report.write_text("<html></html>")
    storage = reporting.storage.model_copy(update={"dagster_database": "postgresql://u:SECRETPW@h/d"})
    reporting = reporting.model_copy(update={"storage": storage})
    run = track(tmp_path, reporting, [finished(1, 0.5)], report)
    record = (tmp_path / "tracked.json").read_bytes()
    # Told again, with another iteration; then the first was made anew.
    assert track(tmp_path, reporting, [finished(1, 0.5), finished(2, 0.75)], report) == run
    assert track(tmp_path, reporting, [finished(1, 0.625), finished(2, 0.75)], report) == run
    rows, config = tracked(run)
    assert rows == [(1, {name: 0.5}), (2, {name: 0.75}), (1, {name: 0.625})]
    assert config["preference_optimization"] == reporting.preference_optimization.model_dump(mode="json")
    (tmp_path / "tracked.json").write_bytes(record[:-9])
    assert track(tmp_path, reporting, [finished(1, 0.5)], report) != run, "what tells its name is damaged"
    assert "SECRETPW" not in str(config)
    kept = [file.read_text() for file in Path(os.environ["TRACKIO_DIR"]).rglob("blobs/*/*/*")]
    assert kept == ["<html></html>"]


def test_nothing_is_told_where_no_tracker_is_named(tmp_path):
    assert track(tmp_path, active_settings(), [finished(1, 0.5)], tmp_path / "report.html") is None
    assert list(tmp_path.iterdir()) == []


PAIR_LOG = [
    {"step": step, "loss": 1 / step, "rewards/margins": step - 3, "rewards/accuracies": step / 9, "rewards/chosen": 0.0}
    for step in range(1, 10)
]


@pytest.mark.parametrize(("history", "panels"), [
    (PAIR_LOG, ["Loss", "Reward margin", "Reward accuracy"]),
    ([{"step": 1, "loss": 2.0, "margin": 0.1, "accuracy": 1.0}], ["Loss", "Reward margin", "Reward accuracy"]),
    ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "mean_token_accuracy": 0.4}], ["Loss"]),
])  # fmt: skip
def test_the_curves_of_a_training_are_a_picture_with_a_sentence(monkeypatch, history, panels):
    drawn = []
    monkeypatch.setattr("synpo_assets.graph.curves.finish", lambda axes, title, *_, **__: drawn.append((title, axes)))
    text, picture = training_curves(history).value.split("\n\n")
    assert [title for title, _ in drawn] == panels
    assert text.startswith("The loss should fall and level out")
    assert ("accuracy" in text) == (len(panels) > 1)
    assert picture.startswith("![Loss and rewards of the training over its steps.](data:image/svg+xml;base64,")
    faint, strong = drawn[0][1].lines
    assert list(faint.get_ydata()) == [entry["loss"] for entry in history]
    assert len(strong.get_ydata()) == len(history)
