"""The settings that an asset was made with, as data and in the UI."""

import dagster as dg
import polars as pl
import pytest

from synpo_assets.graph.presentation import written_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.graph.used_settings import differing_settings, used_in
from tests.nano import active_settings
from tests.stand_ins import instance as instance
from tests.stand_ins import run, services_in, shown


@Stage(group="optimization", reads=("preference_optimization.loss", "judge.server"))
def trained(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.MaterializeResult:
    return written_output(context, services, "version")


def with_beta(beta):
    settings = active_settings()
    optimization = settings.preference_optimization
    loss = optimization.loss.model_copy(update={"beta": beta})
    return settings.model_copy(update={"preference_optimization": optimization.model_copy(update={"loss": loss})})


@pytest.fixture
def lines(instance, tmp_path):
    """What the UI shows of two iterations, made with beta 2 and 3."""
    for key, beta in (("0001", 2.0), ("0002", 3.0)):
        run([trained], instance, services_in(tmp_path, with_beta(beta)), key)
    return [shown(instance, "trained", key)["settings"].splitlines() for key in ("0001", "0002")]


def test_an_asset_shows_what_it_reads_and_in_bold_what_the_iteration_before_had_not(lines):
    first, second = lines
    assert "| preference_optimization.loss.beta | 2.0 |" in first
    assert "| judge.server | null |" in first
    assert "| random_seed | 42 |" in first
    assert not [line for line in first if "**" in line]
    assert [line for line in second if "**" in line] == [second[2]]
    assert second[2] == "| **preference_optimization.loss.beta** | **3.0** (0001: 2.0) |"
    assert len(second) == len(first)


def test_what_an_iteration_was_made_with_is_kept_whatever_the_settings_are_now(lines, tmp_path):
    store = services_in(tmp_path, with_beta(7.0)).used_settings
    used = [used_in(store, key) for key in ("0001", "0002")]
    assert differing_settings(used, in_all=True) == {"preference_optimization.loss.beta": ["2.0", "3.0"]}


def test_a_setting_that_assets_of_one_iteration_read_differently_has_both_values(lines, instance, tmp_path):
    store = services_in(tmp_path).used_settings
    other = store.read("trained", "0002").with_columns(asset=pl.lit("other"))
    store.write("other", "0001", other)
    assert used_in(store, "0001")["preference_optimization.loss.beta"] == "2.0 and 3.0"
