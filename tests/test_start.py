"""`synpo init`: a settings file for a model and a data file, which `synpo check` passes."""

import csv
import json
from unittest import mock

import pytest
import yaml
from typer.testing import CliRunner

from resources.settings.files import PRESETS, load_settings
from synpo_assets.cli import commands, start
from synpo_assets.cli.commands import app
from synpo_assets.cli.start import chosen_columns, language_of, presets
from tests.conftest import synpo_here

ENGLISH = [
    {"instruction": f"What is the use of tool number {n}?", "output": f"It cuts {n} boards in a day."}
    for n in range(40)
]
GERMAN = [
    {"Frage": f"Wozu braucht man das Werkzeug {n}?", "Antwort": f"Ein Schreiner schneidet damit {n} lange Bretter."}
    for n in range(40)
]


@pytest.fixture
def folder(tmp_path, nano_model, monkeypatch):
    """Where a user works, with a data file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ENGLISH))
    return tmp_path


def init(*arguments):
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def test_check_passes_what_is_written_and_the_preset_is_the_base(folder, nano_model):
    result = init("mine.yaml", "--data", "data.jsonl", "--model", nano_model, "--no-gpu", "--minutes", "30")
    assert result.exit_code == 0, result.output
    values = yaml.safe_load((folder / "mine.yaml").read_text())
    assert values["preset"] == "laptop"
    assert set(values) <= {"preset", "initial_policy", "seed_data", "prompt_generator", "preferences", "engine"}
    assert values["initial_policy"]["source"] == "directory"
    settings = load_settings(folder / "mine.yaml")
    rows = [json.loads(line) for part in ("train", "held_out") for line in (folder / f"mine_{part}.jsonl").open()]
    assert sorted(row["prompt"] for row in rows) == sorted(row["instruction"] for row in ENGLISH)
    assert f"{settings.prompt_generator.prompts_per_iteration} prompts in each iteration" in result.output
    checked = synpo_here("check", "--settings", "mine.yaml", "--home", folder / "home")
    assert checked.returncode == 0, checked.stderr
    assert not list(folder.glob(".*"))


def test_how_many_rows_the_preset_takes_is_said_and_stands_in_the_file(folder):
    rows = [row | {"instruction": f"{row['instruction']} Say it {n} times."} for n in (1, 2, 3) for row in ENGLISH]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = init("mine.yaml", "--data", "more.jsonl", "--no-gpu")
    assert "seed_data.train_limit: 40 of 96 and seed_data.held_out_limit: 16 of 24 rows" in result.output
    assert "synpo check --settings mine.yaml --home runs/mine" in result.output
    values = yaml.safe_load((folder / "mine.yaml").read_text())["seed_data"]
    assert (values["train_limit"], values["held_out_limit"]) == (40, 16)
    assert "Taken as in the preset" not in init("few.yaml", "--data", "data.jsonl", "--no-gpu").output


def test_more_minutes_are_more_prompts_and_never_more_than_they_take(folder, nano_model):
    counts = []
    for minutes in (0.2, 2, 20):
        name = f"mine{len(counts)}.yaml"
        result = init(name, "--data", "data.jsonl", "--model", nano_model, "--no-gpu", "--minutes", minutes)
        assert result.exit_code == 0, result.output
        counts.append(load_settings(folder / name).prompt_generator.prompts_per_iteration)
    assert counts == sorted(set(counts))


def test_another_language_is_found_and_needs_no_english_file(folder):
    with (folder / "daten.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, GERMAN[0])
        writer.writeheader()
        writer.writerows(GERMAN)
    columns = ["--prompt-column", "Frage", "--answer-column", "Antwort"]
    result = init("mine.yaml", "--data", "daten.csv", "--no-gpu", *columns)
    assert result.exit_code == 0, result.output
    settings = load_settings(folder / "mine.yaml")
    assert (settings.keyword_pool.language, settings.prompt_generator.language) == ("de", "de")
    assert settings.seed_data.verifiable is None
    assert synpo_here("check", "--settings", "mine.yaml", "--home", folder / "home").returncode == 0


def test_on_a_terminal_it_asks_for_what_is_missing(folder, monkeypatch):
    asked = []

    def answer(what, default="data.jsonl", type=None, **_):
        asked.append(what)
        return type(default) if type else default

    monkeypatch.setattr(commands.typer, "prompt", answer)
    monkeypatch.setattr(commands.sys, "stdin", mock.Mock(isatty=lambda: True))
    commands.init(gpu=False)
    assert [what for what in asked if "column" in what] == ["column of the question", "column of the answer"]
    assert (folder / "mine.yaml").exists()


def test_columns_are_found_by_name_and_by_what_they_hold():
    chat = [{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}]
    assert chosen_columns(chat, "x", (None, None)) == ("messages", "messages")
    assert chosen_columns([{"Question": "a?", "answer": None, "response": "b"}], "x", (None, None)) == (
        "Question",
        "response",
    )
    assert language_of([{"prompt": "日本語の質問ですか", "answer": "はい、そうです。"}]) == "ja"
    english = {"prompt": "What is the capital of France?", "answer": "The capital of France is Paris."}
    assert language_of([{"prompt": "x" * 200_000, "answer": "x"}, *[english] * 20]) == "en"
    assert language_of([{"prompt": "x" * 200_000, "answer": "x"}]) == "en"


def test_presets_are_listed_with_a_line_each():
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    assert list(presets()) == names
    lines = init("--presets").output.splitlines()
    assert [line.split()[0] for line in lines] == names
    assert all(line.endswith(".") and len(line) > 40 for line in lines)


@pytest.mark.parametrize(("arguments", "words"), [
    (["data.jsonl", "--data", "data.jsonl"], "is no .yaml file"),
    (["there.yaml", "--data", "data.jsonl"], "there.yaml exists and is not overwritten"),
    (["taken.yaml", "--data", "data.jsonl"], "taken_train.jsonl exists and is not overwritten"),
    (["no/mine.yaml", "--data", "data.jsonl"], "The folder no does not exist"),
    (["mine.yaml", "--data", "none.jsonl"], "none.jsonl (--data) does not exist"),
    (["mine.yaml", "--data", "data.txt"], "is neither a .jsonl, .csv nor .parquet file"),
    (["mine.yaml", "--data", "odd.jsonl"], "has no two columns that hold questions and answers"),
    (["mine.yaml", "--data", "bad.jsonl"], "holds no JSON object in line 2"),
    (["mine.yaml", "--data", "few.jsonl"], "has 1 usable rows and 12 are needed"),
    (["mine.yaml", "--data", "data.jsonl", "--prompt-column", "x"], "has no column `x`; it has `instruction`, `output`"),
    (["mine.yaml", "--data", "data.jsonl", "--preset", "labtop"], "There is no preset `labtop`"),
    (["mine.yaml", "--data", "data.jsonl", "--model", "nowhere"], "is neither a folder that is there nor a hub id"),
    (["mine.yaml", "--data", "data.jsonl", "--minutes", "0"], "--minutes 0 is no length of time"),
    (["mine.yaml", "--data", "data.jsonl", "--minutes", "nan"], "--minutes nan is no length of time"),
    ([], "Name the settings file to write and the --data"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence_and_nothing_is_written(folder, arguments, words):
    for name in ("there.yaml", "taken_train.jsonl"):
        (folder / name).write_text("kept")
    (folder / "odd.jsonl").write_text('{"text": "a"}\n')
    (folder / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{\n')
    (folder / "few.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    before = sorted(folder.iterdir())
    result = init(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(folder.iterdir()) == before
    assert (folder / "there.yaml").read_text() == "kept"


def test_a_check_that_fails_leaves_nothing(folder, monkeypatch):
    def fails(settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(start, "check_data_and_training", fails)
    before = sorted(folder.iterdir())
    assert init("mine.yaml", "--data", "data.jsonl", "--no-gpu").exit_code == 2
    assert sorted(folder.iterdir()) == before
