"""How much machine time a home has used, and whether its budget is spent."""

import time
from collections.abc import Iterator

from dagster import DagsterInstance, DagsterRun

from synpo_assets.graph.services import Services

SPENT = "The budget is spent"


def seconds_used(instance: DagsterInstance) -> float:
    """The time in which a step of any run was at work: also of failed steps, and once where steps overlap."""
    spans = sorted(span for run in instance.get_runs() for span in _spans(instance, run))
    total, until = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _spans(instance: DagsterInstance, run: DagsterRun) -> Iterator[tuple[float, float]]:
    for step in instance.get_run_step_stats(run.run_id):
        if step.start_time is None:
            continue
        end = step.end_time
        if end is None and run.is_finished:
            # It was killed: what it said last is the end that is known.
            said = (entry.timestamp for entry in instance.all_logs(run.run_id) if entry.step_key == step.step_key)
            end = max(said, default=step.start_time)
        yield step.start_time, end or time.time()


def budget_refusal(instance: DagsterInstance, services: Services) -> str | None:
    """Why no further step begins, as a sentence; None if the budget is not spent, or there is none."""
    cost = services.settings.cost
    if cost.budget_seconds is None or (used := seconds_used(instance)) < cost.budget_seconds:
        return None
    return (
        f"{SPENT}: this home has used {cost.text(used)}, and cost.stop_after is {cost.stop_after}. Everything finished "
        f"is kept. To go on, raise cost.stop_after in {services.home / 'settings.yaml'} and start the run again."
    )
