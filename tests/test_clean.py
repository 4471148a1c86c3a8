"""What `synpo clean` lists and removes, on a copy of a home in which two iterations ran, and on an object store."""

import json
import os
import shutil
import subprocess
import uuid
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
import yaml
from dagster._core.storage.dagster_run import DagsterRun
from upath import UPath

from resources.common.errors import DamageError
from resources.judging.judge_choice import server_judge, topic_labeler
from resources.settings.files import load_settings
from resources.settings.method import Sampling
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.storage.tables import ParquetTables
from synpo_assets.cli import clean
from synpo_assets.cli.clean import leftovers, refuse_while_at_work, remove
from synpo_assets.cli.runs import FOREGROUND_TAG, locked
from synpo_assets.method.templates import user_message
from synpo_assets.stages.seed import initial_policy
from tests.conftest import synpo, synpo_here
from tests.nano import write_settings
from tests.stand_ins import instance as instance
from tests.stand_ins import run, services_in
from tests.test_stores import create, write_weights


@pytest.fixture
def home(nano_run, tmp_path):
    assert nano_run.result.returncode == 0, nano_run.result.stderr[-3000:]
    return shutil.copytree(nano_run.home, tmp_path / "home", symlinks=True)


def change(home, section, name, value):
    stored = yaml.safe_load((home / "settings.yaml").read_text())
    stored[section][name] = value
    write_settings(home / "settings.yaml", stored)


def services_of(home):
    return services_in(home, load_settings(home / "settings.yaml"))


def found_in(home):
    with dg.DagsterInstance.from_config(str(home)) as instance:
        return leftovers(instance, services_of(home))


def places(home, group):
    return {leftover.place.relative_to(home).as_posix() for leftover in found_in(home) if leftover.group == group}


def files_of(home):
    return {path for folder in ("shards", "tables", "checkpoints") for path in (home / folder).rglob("*")}


def shards_that(home, holds):
    descriptions = {file.parent: json.loads(file.read_text()) for file in (home / "shards").glob("*/fingerprint.json")}
    return {folder.relative_to(home).as_posix() for folder, told in descriptions.items() if holds(told)}


def test_right_after_a_run_everything_is_in_use(home):
    before = files_of(home)
    result = synpo_here("clean", "--home", home, "--delete", "--checkpoints")
    assert result.returncode == 0, result.stderr
    assert "nothing to clean" in result.stdout
    assert files_of(home) == before


def test_another_sampling_leaves_exactly_its_shards_behind(home):
    old = load_settings(home / "settings.yaml").responses.sampling.model_dump()
    # The home's settings are stated in full, that of evaluation too.
    for section in ("responses", "evaluation"):
        change(home, section, "sampling", old | {"temperature": 0.9})
    expected = shards_that(home, lambda told: told.get("sampling") == old)
    assert expected
    assert places(home, clean.SHARDS) == expected
    before = files_of(home)
    listed = synpo_here("clean", "--home", home)
    assert all(place in listed.stdout for place in expected)
    assert "initial_policy" in listed.stdout
    assert "temperature 0.7" in listed.stdout
    assert "nothing was removed" in listed.stdout
    assert files_of(home) == before
    removed = synpo_here("clean", "--home", home, "--delete")
    assert "Removed" in removed.stdout, removed.stderr
    gone = {path.relative_to(home).as_posix() for path in before - files_of(home)}
    assert {place for place in gone if place.count("/") == 1} == expected
    assert all(place.rsplit("/", 1)[0] in expected for place in gone if place.count("/") > 1)


@pytest.mark.parametrize(("section", "name", "value", "left"), [
    ("engine", "dtype", "bfloat16", lambda told: True),
    ("scorer", "max_length", 64, lambda told: told["made_for"] == "scores by reward_model"),
    ("judge", "max_length", 64, lambda told: told["made_for"] == "scores by judge_model"),
])  # fmt: skip
def test_engine_and_scorer_settings_count(home, section, name, value, left):
    change(home, section, name, value)
    assert places(home, clean.SHARDS) == shards_that(home, left) != set()


@pytest.mark.parametrize("opened", [server_judge, topic_labeler])
def test_what_a_server_said_is_in_use_until_another_model_judges(home, opened):
    server = {"url": "http://127.0.0.1:1/v1", "model": "one"}
    change(home, "judge", "server", server)
    settings = load_settings(home / "settings.yaml")
    shards = opened(settings.judge, services_of(home).scorer).shards
    shards.write([{"key": "k", "reply": "A", "tokens": 3}])
    assert places(home, clean.SHARDS) == set()
    change(home, "judge", "server", server | {"model": "another"})
    assert places(home, clean.SHARDS) == {shards.folder.relative_to(home).as_posix()}


def test_sizes_rows_and_age_are_those_of_the_files(home):
    change(home, "engine", "dtype", "bfloat16")
    for leftover in found_in(home):
        files = [file for file in leftover.place.rglob("*") if file.is_file()]
        assert leftover.size == sum(file.stat().st_size for file in files)
        assert leftover.rows > 0
        assert datetime.now(UTC) - leftover.changed < timedelta(hours=2)


def test_what_is_in_use_is_found_again_after_a_removal(home):
    (home / "shards" / "0123456789abcdef").mkdir()
    remove(found_in(home))
    settings = load_settings(home / "settings.yaml")
    prompts = ParquetTables(f"{home}/tables").read("synthetic_prompts", "0002")
    asked = [(row_id, user_message(text)) for row_id, text in prompts.select("prompt_id", "prompt").rows()]
    policy = CheckpointStore(f"{home}/checkpoints").current("policy", "0002")
    _, usage = services_of(home).language_model.answer(policy, asked, settings.responses.sampling)
    assert usage.reused == usage.rows == prompts.height


@pytest.mark.slow
def test_a_run_that_starts_over_after_a_removal_generates_nothing_anew(home):
    (home / "shards" / "0123456789abcdef").mkdir()
    assert "Removed" in synpo_here("clean", "--home", home, "--delete").stdout
    for folder in ("history", "schedules", "storage"):
        shutil.rmtree(home / folder)
    result = synpo("run", "--home", home)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "were finished earlier and are reused" in result.stderr
    assert " completions, " not in result.stderr


def test_superseded_checkpoints_go_only_when_asked_for_in_addition(home):
    (current,) = (home / "checkpoints/model_checkpoint/0001").iterdir()
    old = current.with_name("0123456789abcdef")
    shutil.copytree(current, old)
    assert places(home, clean.CHECKPOINTS) == {old.relative_to(home).as_posix()}
    kept = synpo_here("clean", "--home", home, "--delete")
    assert "go with --checkpoints in addition" in kept.stdout, kept.stderr
    assert old.exists()
    synpo_here("clean", "--home", home, "--delete", "--checkpoints")
    assert not old.exists()
    assert (current / "manifest.json").exists()


def test_a_checkpoint_that_an_adapter_in_use_was_trained_from_is_in_use(home):
    """M_1 may have been made again since M_2 was trained from it; vLLM may need the old one to apply M_2's adapter."""
    (base,) = (home / "checkpoints/model_checkpoint/0001").iterdir()
    (trained,) = (home / "checkpoints/model_checkpoint/0002").iterdir()
    for other in ("other", "start"):
        shutil.copytree(base, base.with_name(other))
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["parents"]["start"]["directory"] = "model_checkpoint/0001/start"
    (trained / "manifest.json").write_text(json.dumps(manifest))
    assert places(home, clean.CHECKPOINTS) == {"checkpoints/model_checkpoint/0001/other"}


def test_halves_of_dead_processes_are_left_over_and_those_of_live_ones_are_not(home):
    with subprocess.Popen(["true"]) as ended:
        pass
    half = f"tables/preference_pairs/.0001.parquet.{uuid.uuid4().hex}.tmp"
    dead = f"checkpoints/model_checkpoint/.0001.{ended.pid}.tmp"
    alive = f"checkpoints/model_checkpoint/.0002.{os.getpid()}.tmp"
    for directory in (dead, alive):
        (home / directory / "merged").mkdir(parents=True)
        (home / directory / "merged" / ".model.tmp").write_text("half")
    (home / half).write_text("half")
    assert places(home, clean.HALVES) == {half, dead}
    assert places(home, clean.CHECKPOINTS) == set()


def test_an_unfinished_training_is_kept_while_a_run_may_go_on_from_it(home):
    now = datetime.now(UTC)
    begun = {
        "goes_on": ("model_checkpoint[0003]", now),
        "made_since": ("model_checkpoint[0002]", now - timedelta(hours=12)),
        "begun_again": ("model_checkpoint[0002]", now),
        "given_up": ("model_checkpoint[0003]", now - timedelta(days=2)),
        "takes_days": ("model_checkpoint[0003]", now - timedelta(days=2)),
        "of_no_asset": (None, now),
    }
    for name, (asset, created) in begun.items():
        (home / "training" / name).mkdir(parents=True)
        told = {"asset": asset, "kind": "preference", "start": "initial_policy", "created": created.isoformat()}
        (home / "training" / name / "description.json").write_text(json.dumps(told))
        os.utime(home / "training" / name / "description.json", (created.timestamp(), created.timestamp()))
    (home / "training" / "takes_days" / "checkpoint-500").mkdir()
    (home / "training" / "takes_days" / "checkpoint-500" / "complete.json").write_text("{}")
    assert places(home, clean.TRAININGS) == {"training/made_since", "training/given_up"}


@pytest.mark.parametrize("of", [
    {}, {"created": "soon"}, {"created": 5}, {"created": "2026-01-01T00:00:00"}, {"created": None, "asset": 5},
    {"created": "0001-01-01T00:00:00+14:00"},
])  # fmt: skip
def test_a_training_that_does_not_say_when_it_began_is_left_over(tmp_path, instance, of):
    folder = tmp_path / "training" / "one"
    folder.mkdir(parents=True)
    (folder / "description.json").write_text(json.dumps(of))
    os.utime(folder / "description.json", (0, 0))
    assert [leftover.group for leftover in leftovers(instance, services_in(tmp_path))] == [clean.TRAININGS]


def test_candidates_that_do_not_say_when_they_were_made_are_in_use():
    of = {"partition": "0001", "asset": "search_candidates"}
    made = {"partition": "0001", "asset": "model_checkpoint", "created": "2026-01-02"}
    manifests = {
        "old": of | {"created": "2026-01-01"},
        "new": of | {"created": "2026-01-03"},
        "unknown": of,
        "made": made,
    }
    assert set(clean._without_past_candidates(manifests)) == {"new", "unknown", "made"}
    assert set(clean._without_past_candidates({"old": manifests["old"], "made": of | {"asset": "model_checkpoint"}})) == {
        "old", "made",
    }  # fmt: skip


@pytest.mark.parametrize("lost", ["once.json", "once/*/manifest.json", None])
def test_where_a_checkpoint_is_gone_nothing_is_listed(tmp_path, instance, nano_model, lost):
    services = services_in(tmp_path)
    run([initial_policy], instance, services)
    policy = services.checkpoints.current("initial_policy", None)
    sampling = services.settings.responses.sampling
    row = {"key": 1, "text": "t", "input_tokens": 1, "output_tokens": 1, "finish_reason": "stop"}
    services.language_model.shards_of(policy, sampling).write([row])
    assert leftovers(instance, services) == []
    if lost is None:
        other = create(services.checkpoints, write_weights("other"), asset="initial_policy")
        services.checkpoints.point_to("initial_policy", None, other)
    else:
        next((tmp_path / "checkpoints" / "initial_policy").glob(lost)).unlink()
    with pytest.raises(DamageError, match=r"initial_policy is gone, .* \(`synpo run` does\)"):
        leftovers(instance, services)
    run([initial_policy], instance, services)
    assert leftovers(instance, services) == []


def test_it_is_refused_while_a_run_is_at_work(tmp_path):
    settings = load_settings(write_settings(tmp_path / "settings.yaml", {"preset": "laptop"}))
    with locked(tmp_path), pytest.raises(SettingsError, match="Another `synpo run` is at work"):
        clean.print_clean(services_in(tmp_path, settings), delete=True, with_checkpoints=True)
    with dg.DagsterInstance.ephemeral() as instance:
        killed = DagsterRun(job_name="synpo", status=dg.DagsterRunStatus.STARTED, tags={FOREGROUND_TAG: "true"})
        instance.add_run(killed)
        refuse_while_at_work(instance, tmp_path)
        launched = instance.add_run(DagsterRun(job_name="synpo", status=dg.DagsterRunStatus.STARTING))
        with pytest.raises(SettingsError, match=f"Run {launched.run_id} is at work"):
            refuse_while_at_work(instance, tmp_path)


def test_it_lists_while_a_run_is_at_work(tmp_path):
    write_settings(tmp_path / "settings.yaml", {"preset": "laptop"})
    (tmp_path / "shards" / "old").mkdir(parents=True)
    (tmp_path / "shards" / "old" / "fingerprint.json").write_text("{}")
    with locked(tmp_path):
        listed, refused = (synpo_here("clean", "--home", tmp_path, *more) for more in ([], ["--delete"]))
    assert listed.returncode == 0, listed.stderr
    assert str(tmp_path / "shards" / "old") in listed.stdout
    assert refused.returncode == 2
    assert (tmp_path / "shards" / "old").exists()


def test_a_home_that_was_never_made_is_refused(tmp_path):
    result = synpo_here("clean", "--home", tmp_path / "nowhere")
    assert result.returncode == 2
    assert "is not the home of an experiment" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_in_an_object_store(tmp_path):
    place = f"memory://{uuid.uuid4().hex}"
    changed = {"preset": "laptop", "engine": {"threads": 1}, "storage": {"artifacts": place}}
    settings, root = load_settings(write_settings(tmp_path / "settings.yaml", changed)), UPath(place)
    services = services_in(tmp_path, settings)
    name = "initial_policy/once/0123456789abcdef"
    for directory in (name, "initial_policy/once/fedcba9876543210"):
        manifest = {
            "asset": "initial_policy", "partition": None, "sha": "in use", "run_id": "run", "weights": "merged", "parents": {},
            "files": {"merged/a": {"bytes": 1, "sha256": "0"}}, "trained_on": {}, "settings": {}, "created": "2026-01-01",
        }  # fmt: skip
        (root / "checkpoints" / directory / "manifest.json").write_text(json.dumps(manifest))
    (root / "checkpoints/initial_policy/once.json").write_text(json.dumps({"directory": name}))
    row = {"key": 1, "text": "t", "input_tokens": 1, "output_tokens": 1, "finish_reason": "stop"}
    shards = {}
    for sha, sampling in (
        ("in use", settings.responses.sampling),
        ("superseded", settings.responses.sampling),
        ("in use", Sampling(max_new_tokens=1)),
    ):
        shards[sha, sampling.max_new_tokens] = services.language_model.shards_of(
            Checkpoint("initial_policy", None, sha, "", ""), sampling
        )
        shards[sha, sampling.max_new_tokens].write([row, row | {"key": 2}])
    half = root / "tables" / "seed_pairs" / f".x.parquet.{uuid.uuid4().hex}.tmp"
    half.write_bytes(b"half")
    with dg.DagsterInstance.ephemeral() as instance:
        found = leftovers(instance, services)
    kept = shards["in use", settings.responses.sampling.max_new_tokens].folder
    assert {leftover.place.path for leftover in found} == {
        half.path,
        (root / "checkpoints/initial_policy/once/fedcba9876543210").path,
        *(made.folder.path for made in shards.values() if made.folder != kept),
    }
    assert {leftover.rows for leftover in found if leftover.group == clean.SHARDS} == {2}
    remove(found)
    assert [folder.name for folder in (root / "shards").iterdir()] == [kept.name]
    assert (root / "checkpoints" / name / "manifest.json").exists()
    assert not half.exists()
