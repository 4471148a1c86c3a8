"""`synpo ask`: two models of a home answer side by side."""

import dataclasses
import json
import shutil

import pytest
from typer.testing import CliRunner

from resources.generation import language_model
from synpo_assets.cli.commands import app
from synpo_assets.method.cut import whole_sentences
from tests.conftest import WORK, synpo
from tests.nano import nano_settings, write_settings


@pytest.fixture
def home(tmp_path, nano_model, adapted_checkpoint):
    """A home with M_0 and M_1, and without a judge."""
    home = tmp_path / "home"
    (home / "metrics").mkdir(parents=True)
    write_settings(home / "settings.yaml", nano_settings(nano_model))
    (home / "checkpoints").symlink_to(WORK / "adapted")
    return home


def ask(home, *arguments, typed=None):
    return CliRunner().invoke(app, ["ask", "--home", str(home), *map(str, arguments)], input=typed)


@pytest.fixture
def opened(monkeypatch):
    """The models that were loaded."""
    labels, real = [], language_model.open_engine
    monkeypatch.setattr(
        language_model, "open_engine", lambda made, engine: labels.append(made.label) or real(made, engine)
    )
    return labels


def test_a_file_is_answered_by_both_models_once_and_never_overwritten(home, tmp_path, opened, adapted_checkpoint):
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "Why?"}\n\n{"prompt": "How many?", "id": 3}\n')
    result = ask(home, "--file", file, "--output", output)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Why?", "How many?"]
    assert {row["second"]["sha"] for row in rows} == {adapted_checkpoint.sha}
    assert all(row["first"]["model"] == "initial_policy" and "judge" not in row for row in rows)
    assert opened == ["initial_policy", "model_checkpoint[0001]"]
    before = output.read_bytes()
    again = ask(home, "--file", file, "--output", output)
    assert again.exit_code == 2
    assert "exists: choose another --output" in again.stderr
    assert output.read_bytes() == before


def test_damaged_weights_answer_nothing(home, tmp_path, opened, adapted_checkpoint):
    """Their answers would be kept as those of the whole ones, which a later evaluation reads."""
    (home / "checkpoints").unlink()
    shutil.copytree(WORK / "adapted", home / "checkpoints", symlinks=True)
    (weights,) = (home / "checkpoints" / "model_checkpoint").rglob("adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    result = ask(home, "Which?")
    assert result.exit_code == 2, result.output
    assert "materialize model_checkpoint[0001] again" in result.output + result.stderr
    assert opened == []


def test_a_conversation_loads_each_model_once_and_goes_on_after_a_wrong_question(home, opened):
    result = ask(home, "--models", "1,0", typed="Why?\n" + "long " * 2000 + "\nHow \x1b[31mmany?\n\nnot read\n")
    assert result.exit_code == 0, result.output
    assert opened == ["model_checkpoint[0001]", "initial_policy"]
    assert "that is more than the context" in " ".join(result.output.split())
    assert "How ⟨U+001B⟩[31mmany?" in result.output
    assert "\x1b" not in result.output
    assert "not read" not in result.output


def test_what_a_model_writes_never_reaches_the_terminal_as_control(home, monkeypatch):
    from resources.generation.transformers_engine import TransformersEngine

    real = TransformersEngine._complete

    def evil(self, batch, sampling):
        return [dataclasses.replace(each, text="\x1b]0;title\x07 red\x00") for each in real(self, batch, sampling)]

    monkeypatch.setattr(TransformersEngine, "_complete", evil)
    result = ask(home, "Why?")
    assert result.exit_code == 0, result.output
    assert "⟨U+001B⟩]0;title⟨U+0007⟩" in result.output
    assert "\x1b" not in result.output
    assert "\x07" not in result.output


@pytest.mark.parametrize(("content", "words"), [
    (None, "does not exist"),
    (b'{"prompt": "a"}\n{"question": "b"}\n', "has no column `prompt` in line 2; it has 'question'"),
    (b'{"prompt": "a"}\n{"prompt": \n', "holds no JSON object in line 2"),
    (b'{"prompt": "a"}\n[1]\n', "holds no JSON object in line 2"),
    (b'{"prompt": "a"}\n{"prompt": 3}\n', "a `prompt` in line 2 that is no text"),
    (b'{"prompt": "a"}\n{"prompt": " "}\n', "the prompt in line 2 is empty"),
    (b'{"prompt": "a\\u0000"}\n', "the prompt in line 1 holds the character NUL: leave it out"),
    (b'{"prompt": "\xff"}\n', "is not UTF-8 in line 1"),
    (json.dumps({"prompt": "long " * 2000}).encode(), "the prompt in line 1 has"),
    (b"", "holds no prompts"),
])  # fmt: skip
def test_a_wrong_file_is_refused_by_line_before_a_model_is_loaded(home, tmp_path, opened, content, words):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content)
    result = ask(home, "--file", file, "--output", tmp_path / "answers.jsonl")
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert opened == []
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["Why?", "--models", "0,3"], "there is no M_3 in this home; finished iterations: 1"),
    (["Why?", "--models", "0,abcdef01"], "no checkpoint that answers has a sha that begins with 'abcdef01'"),
    (["Why?", "--models", "0,ab"], "'ab' is neither an iteration nor 6 or more digits"),
    (["Why?", "--models", "0,../../x"], "is neither an iteration"),
    (["Why?", "--models", "0"], "names 1 models: name two"),
    (["Why?", "--models", "1,1"], "names the same model twice"),
    ([""], "The prompt is empty"),
    (["Why?", "--file", "x.jsonl"], "a prompt or --file, not both"),
    (["Why?", "--output", "x.jsonl"], "--output holds the answers to the prompts of --file"),
    (["--file", "x.txt"], "is neither a .jsonl, .csv nor .parquet file"),
    (["--file", "x.jsonl", "--output", "x.txt"], "is no .jsonl file"),
])  # fmt: skip
def test_a_wrong_question_is_refused_in_a_sentence(home, opened, arguments, words):
    result = ask(home, *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert opened == []


def test_a_home_without_a_checkpoint_says_how_to_make_one(tmp_path, nano_model):
    (tmp_path / "metrics").mkdir()
    write_settings(tmp_path / "settings.yaml", nano_settings(nano_model))
    result = ask(tmp_path, "Why?")
    assert result.exit_code == 2
    assert "no finished M_t yet: make an iteration with `synpo run` first" in result.stderr


@pytest.mark.slow
def test_the_judge_of_the_home_says_which_answer_it_prefers(nano_run, tmp_path):
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "Why?"}\n{"prompt": "How many?"}\n')
    result = synpo("ask", "--home", nano_run.home, "--file", file, "--output", output)
    assert result.returncode == 0, result.stderr
    for row in map(json.loads, output.read_text().splitlines()):
        assert row["second"]["model"] == "model_checkpoint[0002]"
        judge, answers = row["judge"], (row["first"], row["second"])
        # Of a cut answer that has no whole sentence nothing is compared.
        none_left = any(each["finish_reason"] == "length" and not whole_sentences(each["answer"]) for each in answers)
        assert (judge["margin"] is None) == none_left
        expected = None if none_left else "tie" if not judge["margin"] else "first" if judge["margin"] > 0 else "second"
        assert judge["prefers"] == expected
        assert judge["doubt"] is None or "not above chance" in judge["doubt"]
    shown = synpo("ask", "--home", nano_run.home, "Why?")
    assert shown.returncode == 0, shown.stderr
    assert "The judge prefers: " in shown.stdout
