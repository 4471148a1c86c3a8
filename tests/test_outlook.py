"""How long the rest of a run will take, with times that are set."""

import json

import dagster as dg
import pytest

from synpo_assets.graph import outlook as module
from synpo_assets.graph.changes import run_resources
from synpo_assets.graph.outlook import EXPECTED_FILE, ITERATIONS_TAG, outlook
from tests.stand_ins import ITERATIONS, instance, services_in  # noqa: F401

TOOK = {"keyword_sets": 30.0, "model_checkpoint": 600.0, "promotion": 12.0}


def assets(heard=None):
    """Three assets of an iteration, one after the other; the last ones say what the outlook was as they began."""

    def named(name, deps):
        @dg.asset(name=name, deps=deps, partitions_def=ITERATIONS)
        def asset(context: dg.AssetExecutionContext):
            if heard is not None:
                heard(context)

        return asset

    names = list(TOOK)
    return [named(name, names[place - 1 : place] if place else []) for place, name in enumerate(names)]


@pytest.fixture
def home(tmp_path, monkeypatch, instance):  # noqa: F811
    """Each asset took what `TOOK` says, in whichever iteration it was made."""
    monkeypatch.setattr(module, "_seconds_of_steps", lambda *_: TOOK)
    # The graph of an experiment has more assets than are made here.
    monkeypatch.setattr(module, "asset_names", lambda _graph, partitioned: list(TOOK))
    return tmp_path


def told(instance, home, partition="0001", **tags):  # noqa: F811
    """The outlook of a run at each of its three steps."""
    services, heard = services_in(home), []

    def hear(context):
        heard.append(str(outlook(instance, services, context.run, module._made(instance, context.run.run_id))))

    dg.materialize(assets(hear), instance=instance, partition_key=partition, tags=tags)
    return heard


@pytest.mark.parametrize("written", [
    None, b"", b"\xff", pytest.param(b"[" * 100_000, id="deep"), b'{"model_checkpoint": []}'
])  # fmt: skip
def test_without_history_and_rates_it_says_how_to_know(instance, home, written):  # noqa: F811
    if written is not None:
        (home / EXPECTED_FILE).write_bytes(written)
    first, *_ = told(instance, home)
    assert first == (
        "Iteration 1: 0 of 3 assets made, 3 left, for how long is known after an iteration, or by `synpo check --calibrate`."
    )


def test_the_estimate_counts_until_there_is_history(instance, home):  # noqa: F811
    (home / EXPECTED_FILE).write_text(json.dumps({"model_checkpoint": [100.0, 200.0, 300.0, 400.0]}))
    assert told(instance, home, **{ITERATIONS_TAG: "2"}) == [
        "Iteration 1: 0 of 3 assets made, 3 left, about 100 s; with the iteration after it about 5 min.",
        # Of an asset that was made, what it took tells more than an estimate: from now on also of the next iteration.
        "Iteration 1: 1 of 3 assets made, 2 left, about 100 s; with the iteration after it about 5.5 min.",
        "Iteration 1: 2 of 3 assets made, 1 left, about 0 s; with the iteration after it about 20 min.",
    ]


def test_history_counts_and_what_grows_grows(instance, home):  # noqa: F811
    dg.materialize(assets(), instance=instance, partition_key="0001")
    assert told(instance, home, "0002", **{ITERATIONS_TAG: "4"})[0] == (
        "Iteration 2: 0 of 3 assets made, 3 left, about 11 min; with the 2 iterations after it about 32 min."
    )
    (home / EXPECTED_FILE).write_text(json.dumps({"model_checkpoint": [100.0, 200.0, 300.0, 400.0]}))
    assert told(instance, home, "0003")[:2] == [
        # 12 s, and of iteration 2, the newest, 600 s times 300 / 200.
        "Iteration 3: 0 of 3 assets made, 3 left, about 16 min.",
        "Iteration 3: 1 of 3 assets made, 2 left, about 15 min.",
    ]


def test_what_waits_of_the_same_backfill_counts(instance, home):  # noqa: F811
    dg.materialize(assets(), instance=instance, partition_key="0001")
    job = dg.define_asset_job("iteration", "*").resolve(
        asset_graph=dg.Definitions(assets=assets()).resolve_asset_graph()
    )
    for partition, backfill in (("0003", "mine"), ("0004", "another")):
        tags = {"dagster/partition": partition, "dagster/backfill": backfill}
        instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.NOT_STARTED)
    assert told(instance, home, "0002", **{"dagster/backfill": "mine"})[0] == (
        "Iteration 2: 0 of 3 assets made, 3 left, about 11 min; with the iteration after it about 21 min."
    )


def test_a_run_says_it_when_it_begins_and_after_each_asset(instance, home):  # noqa: F811
    services = services_in(home)
    resources = run_resources(services, lambda settings, changes: services)
    del resources["io_manager"]

    @dg.asset(partitions_def=ITERATIONS, required_resource_keys={"services"})
    def keyword_sets():
        pass

    result = dg.materialize([keyword_sets], instance=instance, partition_key="0001", resources=resources)
    said = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert [line for line in said if "assets made" in line] == [
        "Iteration 1: 0 of 1 assets made, 1 left, for how long is known after an iteration, or by `synpo check --calibrate`.",
        "Iteration 1: 1 of 1 assets made, 0 left.",
    ]
