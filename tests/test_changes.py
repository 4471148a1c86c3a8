"""Settings of one run alone, and settings that are wrong: what is refused, what is recorded, and what stays as it was."""

import json
import re
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from definitions import build
from resources.settings.files import LAST_VALID, OF_THE_HOME, changed_settings, changes_between, load_settings
from resources.settings.sections import SettingsError
from resources.storage.tables import ParquetTables
from synpo_assets.cli.home import last_valid_settings
from synpo_assets.cli.settings_watch import with_settings_check
from synpo_assets.graph.changes import RunRefused
from synpo_assets.graph.history import failed_checks, unfinished_attempt, unfinished_checks
from synpo_assets.graph.missing import outdated_assets
from tests.conftest import HOME
from tests.nano import active_settings, write_settings
from tests.stand_ins import instance as instance
from tests.stand_ins import services_in, shown
from tests.test_structure import ROOT

WRONG = (
    {"prompt_generator": {"min_words": 99, "max_words": 9}},
    "min_words is larger than max_words: no prompt could pass",
)


@pytest.fixture
def home(tmp_path):
    """A home with valid settings, and a keyword pool to draw from."""
    write_settings(tmp_path / "settings.yaml", yaml.safe_load((HOME / "settings.yaml").read_text()))
    pool = {
        "keyword_set_id": [f"keywords-{number}" for number in range(60)],
        "keywords": [["one"]] * 60,
        "paragraph": "one",
    }
    ParquetTables(f"{tmp_path}/tables").write("keyword_pool", None, pl.DataFrame(pool))
    return tmp_path


def spoil(home):
    values = yaml.safe_load((home / "settings.yaml").read_text())
    section, wrong = next(iter(WRONG[0].items()))
    write_settings(home / "settings.yaml", values | {section: values[section] | wrong})


def draw(home, instance, **changes):
    """A run of `keyword_sets` of iteration 1 as the Launchpad starts it."""
    definitions, _ = build(load_settings(HOME / "settings.yaml"), home)
    return definitions.resolve_job_def("synpo").execute_in_process(
        run_config={
            "resources": {"changes": {"config": {name.replace("__", "."): each for name, each in changes.items()}}}
        },
        asset_selection=[dg.AssetKey("keyword_sets")],
        partition_key="0001",
        instance=instance,
    )


@pytest.mark.parametrize("job", ["foundation", "iteration", "synpo", "__ASSET_JOB"])
def test_the_launchpad_offers_the_changes_and_no_other_resource(job, home):
    definitions, _ = build(active_settings(), home)
    schema = definitions.get_repository_def().get_job(job).run_config_schema.run_config_schema_type
    resources = schema.fields["resources"].config_type.fields
    assert list(resources) == ["changes"]
    offered = resources["changes"].config_type.fields["config"].config_type.fields
    assert offered["preference_optimization.loss.beta"].description
    assert {"response_improver.training.lora.rank", "scorer.name", "gate.minimum"} <= offered.keys()
    assert not {name for name in offered if name.split(".")[0] in OF_THE_HOME}
    assert not [name for name, field in offered.items() if field.is_required]


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"preference_optimization.loss.bta": 3}, "`preference_optimization.loss.bta` is not a setting of `kind: simpo`; did you mean"),
    ({"preference_optimization.loss.beta": "three"}, "`preference_optimization.loss.beta` is 'three': input should be a valid"),
    ({"prompt_generator.min_words": 9999}, "prompt_generator.min_words is larger than max_words"),
    ({"random_seed": 1}, "`random_seed` is the same for all runs of a home"),
    ({"storage.artifacts": "s3://x"}, "`storage.artifacts` is the same for all runs of a home"),
])  # fmt: skip
def test_a_wrong_change_is_refused_with_the_sentence_of_a_settings_file(changes, sentence):
    with pytest.raises(SettingsError) as error:
        changed_settings(active_settings(), changes, Path("/nowhere"))
    assert str(error.value).startswith(f"Changes of this run: {sentence}")


def test_changes_are_named_with_what_they_replace():
    base = active_settings()
    changes = {"preference_optimization.loss.beta": 3, "gate.minimum": {"pairs_kept": 4}, "judge.training.lora": None}
    changed = changed_settings(base, changes, Path("/nowhere"))
    named = changes_between(base, changed)
    assert "preference_optimization.loss.beta 3 instead of 2" in named
    assert "gate.minimum.pairs_kept 4" in named
    other = changed_settings(base, {"preference_optimization.loss": {"kind": "dpo", "beta": 0.1}}, Path("/nowhere"))
    assert changes_between(base, other) == [
        "preference_optimization.loss.kind dpo instead of simpo", "preference_optimization.loss.beta 0.1 instead of 2",
    ]  # fmt: skip


def test_files_in_changes_are_relative_to_the_home():
    server = {"url": "http://localhost/v1", "model": "m", "template": "mine.jinja"}
    changed = changed_settings(active_settings(), {"judge.server": server}, Path("/there"))
    assert changed.judge.server.template == "/there/mine.jinja"


def test_a_change_holds_for_its_run_alone_and_its_results_are_marked_as_such(home, instance):
    """What it draws, the metadata, the code version, staleness, and what a later `synpo run` names."""
    settings = load_settings(HOME / "settings.yaml")
    services = services_in(home, settings)
    assert draw(home, instance).success
    usual = services.tables.read("keyword_sets", "0001").height
    assert "made_with" not in shown(instance, "keyword_sets", "0001")

    assert draw(home, instance, prompt_generator__max_overdraw=2).success
    assert services.tables.read("keyword_sets", "0001").height == usual / 2
    assert shown(instance, "keyword_sets", "0001")["made_with"] == "prompt_generator.max_overdraw 2 instead of 4"
    assert outdated_assets(instance, services) == ["keyword_sets[0001]"]
    stale = CachingStaleStatusResolver(instance, services.graph, LoadingContextForTest(instance))
    causes = stale.get_stale_causes(dg.AssetKey("keyword_sets"), "0001")
    assert "has a new code version" in [cause.reason for cause in causes]
    as_changed = services_in(home, changed_settings(settings, {"prompt_generator.max_overdraw": 2}, home))
    assert outdated_assets(instance, as_changed) == []

    assert draw(home, instance).success
    assert services.tables.read("keyword_sets", "0001").height == usual
    assert outdated_assets(instance, services) == []


def test_a_change_that_decides_nothing_of_an_asset_does_not_mark_it(home, instance):
    assert draw(home, instance, preference_optimization__loss__beta=3).success
    assert "made_with" not in shown(instance, "keyword_sets", "0001")
    assert outdated_assets(instance, services_in(home, load_settings(HOME / "settings.yaml"))) == []


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"prompt_generator__max_overdraw": -1}, "`prompt_generator.max_overdraw` is -1"),
    ({"preferences__chosen_from": "ranked_samples"}, "makes other assets or other arrows between them"),
])  # fmt: skip
def test_a_refused_change_leaves_no_run(home, instance, changes, sentence):
    with pytest.raises(RunRefused, match=sentence):
        draw(home, instance, **changes)
    assert instance.get_runs() == []


def test_the_manifest_of_a_checkpoint_names_the_changes(home):
    base = active_settings()
    changed = changed_settings(base, {"preference_optimization.loss.beta": 3}, home)
    services = build(changed, home, changes_between(base, changed))[1]

    @dg.asset
    def some_model(context: dg.AssetExecutionContext) -> None:
        def fill(directory):
            (directory / "merged").mkdir()
            (directory / "merged" / "model.safetensors").write_bytes(b"weights")

        made, _ = services.checkpoints.create(
            context, fill, parents={}, trained_on={}, settings={}, random_seed=1,
        )  # fmt: skip
        assert made.manifest["changes"] == ["preference_optimization.loss.beta 3 instead of 2"]

    assert dg.materialize([some_model]).success


def test_every_output_records_the_version_that_changes_make():
    """Those that graph/presentation.py makes carry it."""
    files = (ROOT / "synpo_assets").rglob("*.py")
    making = {file.name for file in files if re.search(r"dg\.(Output|MaterializeResult)\(", file.read_text())}
    assert making == {"presentation.py"}


def test_while_the_settings_are_wrong_no_run_starts_and_the_last_valid_graph_stays(home, instance):
    last_valid_settings(home)
    spoil(home)
    with pytest.raises(RunRefused, match=WRONG[1]):
        draw(home, instance)
    assert instance.get_runs() == []
    assert last_valid_settings(home) == load_settings(HOME / "settings.yaml")


def test_the_check_of_the_settings_follows_the_file(home, instance):
    definitions = with_settings_check(dg.Definitions(), home)
    sensor = definitions.resolve_sensor_def("settings")

    def tick(cursor):
        with dg.build_sensor_context(instance=instance, cursor=cursor) as context:
            return sensor(context)

    first = tick(None)
    assert [each.passed for each in first.asset_events] == [True]
    assert tick(first.cursor).asset_events == []
    spoil(home)
    (turned,) = tick(first.cursor).asset_events
    assert not turned.passed
    assert WRONG[1] in turned.description
    assert "no run starts" in turned.description


def test_without_any_valid_settings_the_graph_says_what_is_wrong_in_its_first_line(home):
    write_settings(home / "settings.yaml", {"preset": "laptop", "max_iterations": "two"})
    assert last_valid_settings(home) is None
    graph = with_settings_check(dg.Definitions(), home).get_repository_def().asset_graph
    (key,) = graph.get_all_asset_keys()
    assert graph.get(key).group_name == "wrong_settings"
    assert f"{home / 'settings.yaml'}: `max_iterations` is 'two'" in graph.get(key).description.splitlines()[0]


def test_settings_kept_by_another_version_are_passed_over(home):
    (home / LAST_VALID).write_text(json.dumps({"policy": {}}))
    spoil(home)
    assert last_valid_settings(home) is None


PARTITIONS = dg.StaticPartitionsDefinition(["0001"])


@dg.asset(partitions_def=PARTITIONS)
def policy() -> None: ...


@dg.multi_asset_check(
    specs=[dg.AssetCheckSpec("passes", asset=policy, blocking=True, partitions_def=PARTITIONS)], name="policy_checks"
)
def policy_checks():
    yield dg.AssetCheckResult(check_name="passes", passed=False)


def planned_run(instance, job, status):
    """A run that was created, as by a launch, and ended before anything began."""
    run = instance.create_run_for_job(job, tags={"dagster/partition": "0001"})
    return instance.report_run_failed(run) if status == "FAILURE" else run


def test_a_run_in_which_no_step_started_counts_for_nothing(instance):
    """Neither does it hide the attempts before it: what failed has failed, what was made is made."""
    definitions = dg.Definitions([policy], asset_checks=[policy_checks])
    job, graph = definitions.resolve_implicit_global_asset_job_def(), definitions.get_repository_def().asset_graph
    here = (instance, "policy", "0001")
    planned_run(instance, job, "FAILURE")
    assert unfinished_attempt(*here) is None
    job.execute_in_process(instance=instance, partition_key="0001", raise_on_error=False)
    assert failed_checks(instance, graph, "policy", "0001") == ["passes"]
    planned_run(instance, job, "FAILURE")
    assert unfinished_attempt(*here) is None
    assert unfinished_checks(instance, graph, "policy", "0001") is None
    assert failed_checks(instance, graph, "policy", "0001") == ["passes"]
    waiting = planned_run(instance, job, "NOT_STARTED")
    assert unfinished_attempt(*here) == waiting.run_id
    assert unfinished_checks(instance, graph, "policy", "0001") == waiting.run_id
