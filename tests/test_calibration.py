"""Measuring how fast this machine is, on the nano model, and what `synpo check` makes of it."""

import contextlib
import io
import logging

import pytest

from resources.settings.files import load_settings
from resources.settings.sections import SettingsError
from synpo_assets.cli.calibration import calibrate, known_calibration
from synpo_assets.cli.estimate import Rate, seconds
from synpo_assets.cli.preflight import known_rates, print_check
from synpo_assets.graph.cost import Work
from synpo_assets.stages.seed import seed_table
from tests.nano import nano_settings, write_settings


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield directory


@pytest.fixture(scope="module")
def load(nano_model, tmp_path_factory):
    def load(**sections):
        settings = nano_settings(nano_model)
        for name, changed in sections.items():
            settings[name] = settings[name] | changed
        return load_settings(write_settings(tmp_path_factory.mktemp("settings") / "mine.yaml", settings))

    return load


@pytest.fixture(scope="module")
def printed():
    return io.StringIO()


@pytest.fixture(scope="module")
def measured(cache, load, printed):
    settings = load()
    with contextlib.redirect_stdout(printed):
        return calibrate(settings, seed_table(settings)[0])


@pytest.mark.slow
def test_progress_is_shown_once_and_only_while_it_measures(measured, printed):
    assert printed.getvalue().count("Step 3 of 3, loss") == 1
    assert logging.getLogger("synpo").handlers == []


def test_every_kind_of_work_is_measured_and_found_again(cache, load, measured):
    assert measured.rates.keys() == {"generate", "train", "score"}
    assert all(rate.tokens_per_second > 0 for rate in measured.rates.values())
    assert measured.rates["train"].start_seconds > 0
    assert known_calibration(load()) == measured


def test_models_that_were_made_to_measure_are_removed(cache, measured):
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".json"]


@pytest.mark.parametrize(("section", "changed"), [
    ("engine", {"batch_tokens": 64}), ("engine", {"dtype": "bfloat16"}), ("responses", {"sampling": {"max_new_tokens": 9}}),
    ("preference_optimization", {"training": nano_settings("x")["preference_optimization"]["training"] | {"lora": None}}),
    ("initial_policy", {"name": "/another/model"}),
])  # fmt: skip
def test_rates_are_not_taken_for_those_of_other_settings(load, measured, section, changed):
    assert known_calibration(load(**{section: changed})) is None


def test_rates_that_cannot_be_read_are_not_known(cache, load, measured):
    file = next(path for path in cache.rglob("*.json"))
    whole = file.read_bytes()
    for content in (b"", b"\xff", b"[" * 100_000):
        file.write_bytes(content)
        assert known_calibration(load()) is None
    file.write_bytes(whole)


def test_rates_do_not_depend_on_what_does_not_change_the_speed(load, measured):
    other = load(engine={"shard_rows": 7}, preferences={"margin_threshold": 0.5}, seed_data={"train_limit": 20})
    assert known_calibration(other) == measured


def test_the_check_says_what_its_estimate_is_based_on(load, measured, tmp_path, capsys):
    print_check(load(), tmp_path / "home")
    assert f"measured on this machine ({measured.made_for['device']}) on {measured.measured}" in capsys.readouterr().out
    print_check(load(engine={"batch_tokens": 64}), tmp_path / "home")
    printed = capsys.readouterr().out
    assert "scaled by parameters from rates of SmolLM2-135M in float32 on two CPU cores" in printed
    assert "synpo check --calibrate" in printed
    assert not (tmp_path / "home").exists()


def test_a_server_is_measured_only_where_its_name_for_the_model_is_stated(load):
    settings = load(engine={"kind": "server", "server": {"url": "http://127.0.0.1:9/v1"}})
    with pytest.raises(SettingsError, match=r"engine\.server\.models\.initial_policy"):
        calibrate(settings, seed_table(settings)[0])


def test_nothing_is_known_of_a_gpu_or_a_model_that_is_not_here_before_it_is_measured(nano_model, measured):
    assert known_rates(None, nano_model, None) == known_rates(None, None, "float32")
    assert known_rates(None, nano_model, None)[0] is None
    assert known_rates(measured, nano_model, None)[0] == measured.rates


def test_time_is_that_of_the_start_and_of_the_tokens():
    assert seconds(Work("generate", 100), {"generate": Rate(20.0, start_seconds=3)}) == 8
