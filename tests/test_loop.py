"""The loop edge on real Dagster instances: what enters an iteration, and when it refuses."""

import dataclasses
import shutil
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationPlanned

from resources.common.errors import DamageError
from resources.judging.judge_choice import INDEPENDENT
from resources.settings.evaluation import Gate
from resources.storage.checkpoint_store import Checkpoint, CheckpointError, CheckpointStore
from synpo_assets.evaluation.promotion import promotion
from synpo_assets.graph.history import data_version_of
from synpo_assets.graph.metrics import Metric, recorded
from synpo_assets.graph.presentation import checkpoint_output, made_by, table_version
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.graph.services import Services
from synpo_assets.stages import loop
from synpo_assets.stages.loop import experiment_of, policy, preference_history, report_history
from tests.nano import active_settings
from tests.stand_ins import ITERATIONS, begun_run, judged_answers, measured, run, services_in, win_rates
from tests.stand_ins import instance as instance
from tests.test_stores import write_weights


@pytest.fixture
def services(tmp_path):
    return services_in(tmp_path, gated(minimum={"win_rate_over_initial": 0.5}))


def gated(**limits):
    return active_settings().model_copy(update={"gate": Gate(**({"minimum": {}} | limits))})


def with_gate(services, **limits):
    return dataclasses.replace(services, settings=gated(**limits))


@dg.asset(io_manager_key="checkpoints")
def initial_policy(context: dg.AssetExecutionContext, checkpoints: dg.ResourceParam[CheckpointStore]) -> Checkpoint:
    made, _ = checkpoints.create(context, write_weights("M_0"), parents={}, trained_on={}, settings={}, random_seed=0)
    return made


def model_checkpoint_asset(text="M_1", fails=False, random_seed=None, passes_check=True, trained_on=None):
    @dg.asset(name="model_checkpoint", partitions_def=ITERATIONS, io_manager_key="checkpoints")
    def made(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]):
        checkpoints = services.checkpoints
        if fails:
            raise RuntimeError("out of memory")
        settings = active_settings().model_copy(update={} if random_seed is None else {"random_seed": random_seed})
        experiment = experiment_of(context.instance, checkpoints.current("initial_policy", None), settings)
        checkpoint, _ = checkpoints.create(
            context, write_weights(text), parents={}, trained_on=trained_on or {}, settings={"experiment": experiment},
            random_seed=0,
        )  # fmt: skip
        return checkpoint_output(context, services, checkpoint)

    @dg.asset_check(asset=made, name="finite_weights", blocking=True, partitions_def=ITERATIONS)
    def finite_weights():
        return dg.AssetCheckResult(passed=passes_check)

    return made, finite_weights


def evaluation_asset(*metrics):
    """Says of the checkpoint that is there what it is told to, instead of asking judges."""

    @dg.asset(name="evaluation", partitions_def=ITERATIONS, deps=["model_checkpoint"])
    def made(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]):
        judged = services.checkpoints.current("model_checkpoint", context.partition_key)
        own = [win_rates(0.6, INDEPENDENT), *(metrics or [Metric("mean_repetition", 0.1, of="candidate")])]
        own = [dataclasses.replace(each, checkpoint_sha=judged.sha) for each in own]
        measured(services, "evaluation", *own, partition=context.partition_key)
        services.tables.write("evaluation", context.partition_key, judged_answers(["win"] * 20))
        return dg.MaterializeResult(metadata=made_by(judged))

    return made


def planned_check(run, key, partition):
    """The event that Dagster logs when a run starts that is going to evaluate a check."""
    planned = AssetCheckEvaluationPlanned(
        asset_key=key.asset_key, check_name=key.name,
        partitions_subset=ITERATIONS.subset_with_partition_keys([partition]),
    )  # fmt: skip
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED.value, job_name=run.job_name,
        event_specific_data=planned,
    )  # fmt: skip
    return dg.EventLogEntry(
        error_info=None, user_message="", level=20, run_id=run.run_id, timestamp=time.time(), job_name=run.job_name,
        dagster_event=event,
    )  # fmt: skip


def make(instance, services, *args, partition="0001", metrics=(), **options):
    """Makes M_t, evaluates and promotes it; a failure of it or of its check is left to the history."""
    run([initial_policy], instance, services)
    assets = [*model_checkpoint_asset(*args, **options), evaluation_asset(*metrics), promotion]
    return run(assets, instance, services, partition, raise_on_error=False)


def job_of(assets, services):
    resources = {"services": services, "tables": services.tables, "checkpoints": services.checkpoints}
    return dg.Definitions(assets, resources=resources).resolve_implicit_global_asset_job_def()


def enter(instance, services, partition):
    """Materializes the policy of an iteration and returns it."""
    result = run([initial_policy, policy], instance, services, partition, selection=["initial_policy", "policy"])
    return result.output_for_node("policy")


def test_m0_enters_the_first_iteration(instance, services):
    assert enter(instance, services, "0001").asset == "initial_policy"


def test_the_checkpoint_of_the_iteration_before_enters_the_next(instance, services):
    make(instance, services)
    entering = enter(instance, services, "0002")
    assert entering.label == "model_checkpoint[0001]"


def test_a_promoted_checkpoint_is_reported_as_the_policy_of_the_next_iteration(instance, services):
    make(instance, services)
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey("policy"), asset_partitions=["0002"]), limit=1
    ).records
    event = records[0].asset_materialization
    made = services.checkpoints.current("model_checkpoint", "0001")
    assert event.metadata["checkpoint"].value == "model_checkpoint[0001]"
    assert event.metadata["checkpoint_sha"].value == made.sha
    assert event.metadata["checkpoint_run"].value == made.manifest["run_id"]
    assert event.metadata["reported_by"].value == "promotion[0001]"
    assert event.tags["dagster/data_version"] == made.sha[:16]


def test_a_missing_checkpoint_is_refused_with_the_remedy(instance, services):
    with pytest.raises(
        CheckpointError, match=r"model_checkpoint\[0001\] was never materialized: run that iteration first"
    ):
        enter(instance, services, "0002")


def test_a_failed_newest_attempt_is_refused_even_if_an_older_checkpoint_exists(instance, services):
    make(instance, services)
    failed = make(instance, services, fails=True)
    with pytest.raises(CheckpointError) as error:
        enter(instance, services, "0002")
    assert failed.run_id in str(error.value)
    assert "FAILURE" in str(error.value)
    make(instance, services, "M_1 again")
    assert enter(instance, services, "0002").label == "model_checkpoint[0001]"


def test_an_altered_checkpoint_is_refused(instance, services):
    make(instance, services)
    made = services.checkpoints.current("model_checkpoint", "0001")
    with open(f"{made.weights}/model.safetensors", "w") as file:
        file.write("M_X")
    with pytest.raises(DamageError, match="were altered"):
        enter(instance, services, "0002")


@pytest.mark.parametrize("damage", ["delete", "empty", "lose the manifest"])
def test_a_checkpoint_directory_that_was_deleted_or_emptied_is_refused(instance, services, damage):
    make(instance, services)
    directory = Path(services.checkpoints.current("model_checkpoint", "0001").directory)
    if damage == "lose the manifest":
        (directory / "manifest.json").unlink()
    else:
        shutil.rmtree(directory)
        if damage == "empty":
            directory.mkdir()
    with pytest.raises(DamageError, match=r"materialize .*again"):
        enter(instance, services, "0002")


def test_a_checkpoint_made_with_another_random_seed_is_refused_and_the_setting_named(instance, services):
    make(instance, services, random_seed=7)
    with pytest.raises(CheckpointError, match=r"made with other settings \(random_seed 7 then, 42 now\)"):
        enter(instance, services, "0002")


def test_a_directory_that_was_exchanged_by_hand_is_refused(instance, services):
    make(instance, services)
    first = services.checkpoints.current("model_checkpoint", "0001")
    make(instance, services, "M_1 again")
    services.checkpoints.point_to("model_checkpoint", "0001", first)
    with pytest.raises(CheckpointError, match="was exchanged by hand"):
        enter(instance, services, "0002")


def test_a_manifest_that_was_altered_is_refused(instance, services):
    make(instance, services)
    directory = services.checkpoints.current("model_checkpoint", "0001").directory
    for content in ("{}", "", "[1"):
        (Path(directory) / "manifest.json").write_text(content)
        with pytest.raises(DamageError, match="is no manifest any more"):
            enter(instance, services, "0002")


def test_what_an_iteration_reads_does_not_change_while_it_runs(instance, services):
    """Iteration 1 is made again while iteration 2 is at work: all steps of 2 see the policy that entered."""
    make(instance, services)
    seen = []
    policy_input = {"policy": dg.AssetIn(input_manager_key="checkpoints")}

    @dg.asset(partitions_def=ITERATIONS, ins=policy_input)
    def early(policy):
        seen.append(policy.sha)
        make(instance, services, "M_1 again")

    @dg.asset(partitions_def=ITERATIONS, ins=policy_input, deps=[early])
    def late(policy):
        seen.append(policy.sha)

    assets = [initial_policy, policy, early, late]
    assert run(assets, instance, services, "0002", selection=["policy", "early", "late"]).success
    assert len(set(seen)) == 1
    assert data_version_of(instance, "policy", "0002") != seen[0][:16], "the next run of iteration 2 sees the new one"


def test_it_waits_for_the_blocking_check_of_a_live_run(instance, services, monkeypatch):
    """The checkpoint is materialized before its check has run, in a run that is still alive."""
    assert make(instance, services).success
    key = dg.AssetCheckKey(dg.AssetKey("model_checkpoint"), "finite_weights")
    live = begun_run(instance, dg.DagsterRunStatus.STARTED)
    instance.event_log_storage.store_event(planned_check(live, key, "0001"))
    waits = []

    def end_meanwhile(seconds):
        waits.append(seconds)
        instance.report_run_failed(live)

    monkeypatch.setattr(loop.time, "sleep", end_meanwhile)
    with pytest.raises(CheckpointError, match="ended without it"):
        enter(instance, services, "0002")
    assert waits == [loop.POLL_SECONDS]


def test_a_checkpoint_made_from_another_m0_is_refused(instance, services):
    make(instance, services)

    @dg.asset(name="initial_policy", io_manager_key="checkpoints")
    def other(context: dg.AssetExecutionContext, checkpoints: dg.ResourceParam[CheckpointStore]) -> Checkpoint:
        return checkpoints.create(
            context, write_weights("other"), parents={}, trained_on={}, settings={}, random_seed=0
        )[0]

    with pytest.raises(CheckpointError, match=r"made with other settings \(initial_policy "):
        run([other, policy], instance, services, "0002", selection=["initial_policy", "policy"])


def test_a_checkpoint_that_failed_a_blocking_check_is_refused_until_it_passes(instance, services):
    assert not make(instance, services, passes_check=False).success
    with pytest.raises(CheckpointError, match=r"did not pass its blocking checks \(finite_weights\)"):
        enter(instance, services, "0002")
    assert make(instance, services, passes_check=True).success
    assert enter(instance, services, "0002").label == "model_checkpoint[0001]"


def test_a_run_waits_for_an_older_run_of_the_same_iteration(instance, services, monkeypatch):
    job = dg.Definitions([dg.AssetSpec("anything")]).resolve_implicit_global_asset_job_def()
    tags = ITERATIONS.get_tags_for_partition_key("0001")
    older = instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTED)
    waits = []

    def end_meanwhile(seconds):
        waits.append(seconds)
        instance.report_run_failed(older)

    monkeypatch.setattr(loop.time, "sleep", end_meanwhile)
    assert enter(instance, services, "0001").asset == "initial_policy"
    assert waits == [loop.POLL_SECONDS]


def test_it_waits_while_a_live_run_is_making_the_checkpoint(instance, services, monkeypatch):
    """The waiting guard asks again until the run that was planned has ended."""
    waits = []
    asset, _ = model_checkpoint_asset()
    job = job_of([asset], services)
    planned = instance.create_run_for_job(job, tags=ITERATIONS.get_tags_for_partition_key("0001"),
                                          asset_selection=frozenset([dg.AssetKey("model_checkpoint")]))  # fmt: skip

    def finish_meanwhile(seconds):
        waits.append(seconds)
        make(instance, services)

    monkeypatch.setattr(loop.time, "sleep", finish_meanwhile)
    assert enter(instance, services, "0002").label == "model_checkpoint[0001]"
    assert waits == [loop.POLL_SECONDS]
    assert not instance.get_run_by_id(planned.run_id).is_finished


def test_it_waits_while_a_live_run_is_judging_the_checkpoint(instance, services, monkeypatch):
    """M_1 is there, but whether it enters iteration 2 is still open."""
    run([initial_policy], instance, services)
    run([*model_checkpoint_asset(), evaluation_asset()], instance, services, "0001")
    job = job_of([promotion.asset(services.settings, {}, [])], services)
    instance.create_run_for_job(job, tags=ITERATIONS.get_tags_for_partition_key("0001"),
                                asset_selection=frozenset([dg.AssetKey("promotion")]))  # fmt: skip
    waits = []

    def judge_meanwhile(seconds):
        waits.append(seconds)
        run([promotion], instance, services, "0001")

    monkeypatch.setattr(loop.time, "sleep", judge_meanwhile)
    assert enter(instance, services, "0002").label == "model_checkpoint[0001]"
    assert waits == [loop.POLL_SECONDS]


def pairs(iteration, count):
    messages = [[{"role": "user", "content": "x"}]] * count
    columns = PreferencePairs.to_schema().columns
    texts = {name: [f"{name}-{iteration}-{n}" for n in range(count)] for name, column in columns.items()
             if str(column.dtype) == "String"}  # fmt: skip
    frame = PreferencePairs.empty().clear()
    rows = [
        {name: texts[name][n] if name in texts else messages[n] if name in ("prompt", "chosen", "rejected")
         else iteration if name == "iteration" else 0.5 for name in columns}
        | {"chosen_finish_reason": "stop", "rejected_finish_reason": "length", "rules": ""}
        for n in range(count)
    ]  # fmt: skip
    return frame.vstack(type(frame)(rows, schema=frame.schema))


def pairs_asset(count):
    @dg.asset(name="preference_pairs", partitions_def=ITERATIONS, io_manager_key="tables")
    def made(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]):
        iteration = int(context.partition_key)
        history = services.tables.read("preference_history", context.partition_key)
        frame = pairs(iteration, count)
        report_history(context, services, history, frame)
        return frame

    return made


def history(instance, services, partition):
    return run([initial_policy, policy, preference_history], instance, services, partition,
               selection=["preference_history"]).output_for_node("preference_history")  # fmt: skip


def test_history_is_all_pairs_before_and_grows(instance, services):
    assert history(instance, services, "0001").is_empty()
    run([pairs_asset(3)], instance, services, "0001")
    second = history(instance, services, "0002")
    assert second["iteration"].to_list() == [1, 1, 1]
    reported = data_version_of(instance, "preference_history", "0002")
    run([pairs_asset(2)], instance, services, "0002")
    assert data_version_of(instance, "preference_history", "0003") != reported
    assert history(instance, services, "0003")["iteration"].to_list() == [1, 1, 1, 2, 2]


def test_the_history_that_was_reported_has_the_content_version_of_the_one_that_is_made(instance, services):
    history(instance, services, "0001")
    run([pairs_asset(3)], instance, services, "0001")
    reported = data_version_of(instance, "preference_history", "0002")
    assert reported == table_version(history(instance, services, "0002"))


def test_nothing_is_reported_beyond_the_last_iteration(instance, services):
    assert make(instance, services, partition=ITERATIONS.get_partition_keys()[-1]).success
    assert recorded(services.metrics, ITERATIONS.get_partition_keys()[-1]).value("promoted", "candidate") == 1
    assert instance.get_materialized_partitions(dg.AssetKey("policy")) == set()


def test_history_refuses_a_gap(instance, services):
    with pytest.raises(CheckpointError, match=r"preference_pairs\[0001\] was never materialized"):
        history(instance, services, "0002")


def test_a_prompt_may_come_back_in_a_later_iteration(instance, services):
    """Ids of prompts are unique within an iteration, not over all of them."""
    from synpo_assets.graph.schemas import PreferenceHistory
    from synpo_assets.graph.tables import check

    first, second = pairs(1, 2), pairs(2, 2)
    second = second.with_columns(prompt_id=first["prompt_id"])
    assert check(PreferenceHistory, first.vstack(second)) is None
    assert check(PreferencePairs, first.vstack(second)) is not None
