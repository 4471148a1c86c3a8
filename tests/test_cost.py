"""Money beside time, and a budget that ends runs between steps."""

import dagster as dg
import pytest

from resources.settings.cost import Cost
from synpo_assets.cli.automation import reason_to_wait
from synpo_assets.graph.budget import budget_refusal, seconds_used
from synpo_assets.graph.changes import run_resources
from tests.nano import active_settings
from tests.stand_ins import instance as instance
from tests.stand_ins import services_in


@pytest.mark.parametrize(("per_hour", "stop_after", "money", "seconds"), [
    ("$2.40", None, "$1.20", None), ("2.4 EUR", "12 h", "1.20 EUR", 43200),
    (None, "0.5h", None, 1800), ("£1", "£3", "£0.50", 10800),
    (None, "1 hour", None, 3600),
])  # fmt: skip
def test_rates_and_budgets(per_hour, stop_after, money, seconds):
    cost = Cost(per_hour=per_hour, stop_after=stop_after)
    assert (cost.money(1800), cost.budget_seconds) == (money, seconds)


@pytest.mark.parametrize(("stated", "words"), [
    ({"stop_after": "30 EUR"}, "cost.per_hour is not stated"), ({"per_hour": "2 EUR", "stop_after": "$30"}, "in one currency"),
    ({"per_hour": "0 EUR"}, "not above zero"), ({"per_hour": "-2 EUR"}, "not above zero"),
    ({"stop_after": "-1 h"}, "not above zero"),
    ({"stop_after": 0}, "not a number with one unit"), ({"per_hour": 2.5}, "write it as `2.50 EUR`"),
    ({"per_hour": "2 h"}, "no money"),
    ({"stop_after": "nan h"}, "not a number"), ({"stop_after": ""}, "not a number"), ({"per_hour": "$2 EUR"}, "not a number"),
    ({"per_hour": "1e3 EUR"}, "not a number"), ({"per_hour": True}, "valid string"),
])  # fmt: skip
def test_what_is_no_rate_or_budget_is_refused(stated, words):
    with pytest.raises(ValueError, match=words):
        Cost(**stated)


def services_with(home, **cost):
    settings = active_settings()
    return services_in(home, settings.model_copy(update={"cost": Cost(**cost)}))


def two_steps(made):
    @dg.asset(required_resource_keys={"services"}, retry_policy=dg.RetryPolicy(max_retries=2))
    def first(context):
        made.append("first")

    @dg.asset(required_resource_keys={"services"}, deps=[first])
    def second(context):
        made.append("second")

    return [first, second]


def materialize(instance, services, made):
    resources = run_resources(services, lambda *_: services)
    del resources["io_manager"]
    return dg.materialize(two_steps(made), instance=instance, resources=resources, raise_on_error=False)


def test_the_time_of_overlapping_steps_counts_once_and_that_of_failed_and_killed_ones_too(
    instance, monkeypatch, tmp_path
):
    def steps(*spans):
        return [type("Stats", (), {"start_time": start, "end_time": end, "step_key": "a"}) for start, end in spans]

    runs = {"a": steps((0, 100), (50, 150)), "b": steps((200, 210), (None, None)), "c": steps((300, None))}
    for run_id in runs:
        instance.add_run(dg.DagsterRun("job", run_id=run_id, status=dg.DagsterRunStatus.FAILURE))
    monkeypatch.setattr(instance, "get_run_step_stats", lambda run_id, **_: runs[run_id])
    said = [
        type("Entry", (), {"timestamp": when, "step_key": key}) for when, key in ((310, "a"), (325, "a"), (999, None))
    ]
    monkeypatch.setattr(instance, "all_logs", lambda run_id, **_: said)
    assert seconds_used(instance) == 150 + 10 + 25
    services = services_with(tmp_path, per_hour="3600 EUR", stop_after="100 EUR")
    assert budget_refusal(instance, services) == (
        "The budget is spent: this home has used 3.1 min, 185.00 EUR, and cost.stop_after is 100 EUR. Everything finished is kept. "
        f"To go on, raise cost.stop_after in {tmp_path / 'settings.yaml'} and start the run again."
    )
    assert reason_to_wait(instance, services, 1).startswith("Stopped. The budget is spent")
    assert budget_refusal(instance, services_with(tmp_path, stop_after="1 h")) is None


def test_no_step_begins_once_the_budget_is_spent_and_the_reason_stands_in_the_run(instance, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("synpo_assets.graph.outlook.asset_names", lambda *_, **__: [])
    assert materialize(instance, services_with(tmp_path, stop_after="1 h"), made).success
    assert made == ["first", "second"]
    # As in the process of a step.
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "a run")
    result = materialize(instance, services_with(tmp_path, stop_after="0.000001 h"), made)
    assert not result.success
    assert made == ["first", "second"]
    said = " ".join(str(entry.dagster_event or entry.user_message) for entry in instance.all_logs(result.run_id))
    assert "The budget is spent: this home has used" in said
