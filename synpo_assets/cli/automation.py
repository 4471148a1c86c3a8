"""Jobs, and going on by itself: a sensor that starts the next iteration until the target is reached or the gate says stop.

Paper: four iterations, "until performance no longer improves". Here: off until it is switched on in the UI; whether the
newest M_t was promoted decides (promotion.py), and the reason to stop is shown with each tick of the sensor.
"""

import dagster as dg
from dagster import DagsterInstance, RunsFilter
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.storage.tags import PARTITION_NAME_TAG

from resources.settings.files import settings_problem
from synpo_assets.graph.budget import budget_refusal
from synpo_assets.graph.history import CONSIDERED, never_began, newest
from synpo_assets.graph.missing import missing_assets, missing_checks
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import FIRST, OPT_IN_TAG
from synpo_assets.stages.loop import promotion_refusal

ALL_ASSETS_JOB = "synpo"

# What can be made, less what is made only when it is asked for by name.
MADE = dg.AssetSelection.all() - dg.AssetSelection.tag(OPT_IN_TAG, "true")
# The UI sorts jobs by name: these are in the order of use.
JOBS = [
    dg.define_asset_job(
        "foundation",
        selection=dg.AssetSelection.assets(FIRST).upstream(include_self=False),
        description="First, once: what all iterations share. M_0, the seed, the keyword pool, the prompt generator, the "
        "baseline, the scorer, the judge.",
        # dagster.yaml lets one run with this tag at a time.
        tags={"synpo/made_once": "true"},
    ),
    dg.define_asset_job(
        "iteration",
        selection=dg.AssetSelection.assets(FIRST).downstream() & MADE,
        description="Then, again and again: one whole iteration, and the report. Several partitions run one after the other.",
    ),
    dg.define_asset_job(
        ALL_ASSETS_JOB,
        selection=MADE,
        description="Nothing to press: what `synpo run` and the sensor launch, any of the assets.",
    ),
]


@dg.sensor(
    job_name=ALL_ASSETS_JOB,
    minimum_interval_seconds=30,
    description="Starts the next iteration until automation.target_iterations, or until M_t is not promoted.",
)
def next_iteration(
    context: dg.SensorEvaluationContext, experiment: dg.ResourceParam[Services]
) -> dg.RunRequest | dg.SkipReason:
    """Asks for the first iteration that is not finished, or says why it does not."""
    if (problem := settings_problem(experiment.home)) is not None:
        return dg.SkipReason(problem)
    iteration = first_unfinished(context.instance, experiment)
    if (reason := reason_to_wait(context.instance, experiment, iteration)) is not None:
        return dg.SkipReason(reason)
    key = partition_key(iteration)
    missing = {place: missing_assets(context.instance, experiment, place) for place in (None, key)}
    checks = [
        check
        for place, names in missing.items()
        for check in missing_checks(context.instance, experiment, place, names)
    ]
    return dg.RunRequest(
        partition_key=key,
        asset_selection=[dg.AssetKey(name) for names in missing.values() for name in names],
        asset_check_keys=checks,
        tags={"synpo/automation": "true"},
    )


def first_unfinished(instance: DagsterInstance, services: Services) -> int:
    """The first iteration in which something is missing; max_iterations + 1 if there is none."""
    for number in range(1, services.settings.max_iterations + 1):
        key = partition_key(number)
        if missing_assets(instance, services, key) or missing_checks(instance, services, key):
            return number
    return services.settings.max_iterations + 1


def reason_to_wait(instance: DagsterInstance, services: Services, iteration: int) -> str | None:
    """Why an iteration is not to be started now, as a sentence; None if it is."""
    settings = services.settings
    target = min(settings.automation.target_iterations or settings.max_iterations, settings.max_iterations)
    if iteration > target:
        return f"Stopped: iteration {target} is finished, which is the target (automation.target_iterations)."
    if spent := budget_refusal(instance, services):
        return f"Stopped. {spent}"
    if live := instance.get_runs(RunsFilter(statuses=NOT_FINISHED_STATUSES), limit=1):
        return f"Run {live[0].run_id} is at work."
    of_iteration = instance.get_runs(RunsFilter(tags={PARTITION_NAME_TAG: partition_key(iteration)}), limit=CONSIDERED)
    last = next((run for run in of_iteration if not never_began(instance, run.run_id)), None)
    if last and not last.is_success and not _was_let_in_since(instance, last.run_id, iteration):
        return (
            f"Stopped: the newest run of iteration {iteration} ({last.run_id}) ended as {last.status.value}. "
            "Mend the cause and run it again; this sensor goes on after it."
        )
    if iteration > 1 and (refusal := promotion_refusal(services, partition_key(iteration - 1))):
        return f"Stopped after iteration {iteration - 1}: {refusal}"
    return None


def _was_let_in_since(instance: DagsterInstance, run_id: str, iteration: int) -> bool:
    """Whether a run got no further than the policy, and M_{t-1} was judged again since: as in a backfill that the gate stopped."""
    judged = newest(instance, "promotion", partition_key(iteration - 1)) if iteration > 1 else None
    run = instance.get_run_record_by_id(run_id)
    if judged is None or run is None or run.end_time is None or judged.timestamp < run.end_time:
        return False
    return {step.step_key for step in instance.get_run_step_stats(run_id)} == {"policy"}
