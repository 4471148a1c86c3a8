"""How far a run is and how long the rest will take: as the same assets took in this home before, or as estimated."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Annotated

import dagster as dg
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.storage.tags import BACKFILL_ID_TAG, PARTITION_NAME_TAG
from pydantic import Field, TypeAdapter, ValidationError

from resources.common.text import duration
from synpo_assets.graph.missing import asset_names
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.services import Services

# Written by `synpo run` and `synpo ui`: the seconds of each asset in iterations 1, 2, ... by the rates of this machine.
EXPECTED_FILE = "expected_seconds.json"
EXPECTED = TypeAdapter(dict[str, Annotated[list[float], Field(min_length=1)]])
# How many iterations the `synpo run` that started a run goes on to.
ITERATIONS_TAG = "synpo/iterations"
# What is being cancelled is no work to come.
AHEAD = [status for status in NOT_FINISHED_STATUSES if status is not DagsterRunStatus.CANCELING]


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What a run has made and has left, and what comes after it; seconds are None where nothing is known of some asset."""

    iteration: int | None
    made: int
    left: int
    seconds: float | None
    later_iterations: int
    later_seconds: float | None

    def __str__(self) -> str:
        """The outlook as a sentence.

        Examples:
            >>> str(Outlook(2, 9, 8, 1100.0, 2, 7000.0))
            'Iteration 2: 9 of 17 assets made, 8 left, about 18 min; with the 2 iterations after it about 2.2 h.'
            >>> str(Outlook(1, 1, 16, None, 0, 0.0))
            'Iteration 1: 1 of 17 assets made, 16 left, for how long is known after an iteration, or by `synpo check --calibrate`.'
            >>> str(Outlook(None, 8, 0, 0.0, 1, 90.0))
            'Made once: 8 of 8 assets made, 0 left; with the iteration after it about 90 s.'
        """
        name = "Made once" if self.iteration is None else f"Iteration {self.iteration}"
        sentence = f"{name}: {self.made} of {self.made + self.left} assets made, {self.left} left"
        if self.seconds is None or self.later_seconds is None:
            return f"{sentence}, for how long is known after an iteration, or by `synpo check --calibrate`."
        sentence += f", about {duration(self.seconds)}" if self.left else ""
        if self.later_iterations:
            after = "iteration" if self.later_iterations == 1 else f"{self.later_iterations} iterations"
            sentence += f"; with the {after} after it about {duration(self.seconds + self.later_seconds)}"
        return f"{sentence}."


@contextlib.contextmanager
def told(context: dg.InitResourceContext, services: Services) -> Iterator[None]:
    """Around a step: says the outlook when its run begins, and when the step has made an asset."""
    run, instance, log = context.run, context.instance, context.log
    # A sensor has no run.
    if run is None or instance is None or log is None:
        yield
        return
    before = _made(instance, run.run_id)
    if not before and not instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_START):
        log.info(str(outlook(instance, services, run, before)))
    yield
    if (made := _made(instance, run.run_id)) - before:
        log.info(str(outlook(instance, services, run, made)))


def outlook(instance: DagsterInstance, services: Services, run: DagsterRun, made: set[str]) -> Outlook:
    """The outlook of a run at work, whose steps with these names have ended well."""
    key, known = run.tags.get(PARTITION_NAME_TAG), _Known(instance, services)
    iteration = None if key is None else int(key)
    planned = _planned(instance, run.run_id)
    made, left = planned & made, planned - made
    later = dict(_of_backfill(instance, run) if BACKFILL_ID_TAG in run.tags else known.unmade_after(run, iteration))
    return Outlook(
        iteration=iteration,
        made=len(made),
        left=len(left),
        seconds=known.total((asset, iteration) for asset in left),
        later_iterations=len(later),
        later_seconds=known.total((asset, number) for number, assets in later.items() for asset in assets),
    )


def _planned(instance: DagsterInstance, run_id: str) -> set[str]:
    """The assets that a run is to make."""
    entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    events = (entry.dagster_event for entry in entries)
    return {event.asset_key.to_user_string() for event in events if event and event.asset_key}


def _made(instance: DagsterInstance, run_id: str) -> set[str]:
    """The steps of a run that have ended well: by these events alone, because those of what was made are large."""
    entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_SUCCESS)
    return {entry.step_key for entry in entries if entry.step_key}


def _seconds_of_steps(instance: DagsterInstance, run_id: str) -> dict[str, float]:
    """How long the steps of a run took that ended well: by these events alone, as in `_made`."""
    entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_SUCCESS)
    events = (entry.dagster_event for entry in entries)
    return {event.step_key: event.step_success_data.duration_ms / 1000 for event in events if event and event.step_key}


def _of_backfill(instance: DagsterInstance, run: DagsterRun) -> Iterator[tuple[int, set[str]]]:
    """The iterations of the same backfill that wait or are at work, and their assets."""
    same = RunsFilter(tags={BACKFILL_ID_TAG: run.tags[BACKFILL_ID_TAG]}, statuses=AHEAD)
    for other in instance.get_runs(same):
        if other.run_id != run.run_id and (key := other.tags.get(PARTITION_NAME_TAG)):
            yield int(key), _planned(instance, other.run_id)


class _Known:
    """How long assets took in this home, or are expected to take."""

    def __init__(self, instance: DagsterInstance, services: Services) -> None:
        self._instance, self._graph = instance, services.graph
        self._expected = dict[str, list[float]]()
        # What is damaged tells nothing; the next `synpo run` writes it anew.
        with contextlib.suppress(OSError, ValidationError):
            self._expected = EXPECTED.validate_json((services.home / EXPECTED_FILE).read_bytes())
        self._took = dict[str, tuple[int, float] | None]()
        self._runs = dict[str, dict[str, float]]()
        self._records = {
            record.asset_entry.asset_key.to_user_string(): record.asset_entry.last_materialization_record
            for record in instance.get_asset_records(sorted(services.graph.materializable_asset_keys))
        }

    def unmade_after(self, run: DagsterRun, iteration: int | None) -> Iterator[tuple[int, set[str]]]:
        """The iterations that the `synpo run` of a run goes on to, and the assets that they lack."""
        numbers = range((iteration or 0) + 1, int(run.tags.get(ITERATIONS_TAG, 0)) + 1)
        names = asset_names(self._graph, partitioned=True) if numbers else []
        made = {name: self._instance.get_materialized_partitions(dg.AssetKey(name)) for name in names}
        for number in numbers:
            yield number, {name for name in names if partition_key(number) not in made[name]}

    def total(self, wanted: Iterable[tuple[str, int | None]]) -> float | None:
        """The seconds of assets in iterations (None: made once); None if those of one are not known."""
        found = [self._seconds(asset, iteration or 1) for asset, iteration in wanted]
        return None if None in found else sum(seconds for seconds in found if seconds)

    def _seconds(self, asset: str, iteration: int) -> float | None:
        if asset not in self._took:
            self._took[asset] = self._newest(asset)
        expected, took = self._expected.get(asset), self._took[asset]
        if expected is None:
            # Where others are expected to take a time, it is one that takes next to nothing.
            return took[1] if took else 0.0 if self._expected else None
        # The settings may name more iterations by now.
        now = expected[min(iteration, len(expected)) - 1]
        if took is None:
            return now
        before = expected[min(took[0], len(expected)) - 1]
        # M_t is trained on the pairs of all iterations so far, and so takes longer each time.
        return took[1] * now / before if before else took[1]

    def _newest(self, asset: str) -> tuple[int, float] | None:
        """The iteration (1 for what is made once) that was made last, and how long it took."""
        record = self._records.get(asset)
        if record is None:
            return None
        if record.run_id not in self._runs:
            self._runs[record.run_id] = _seconds_of_steps(self._instance, record.run_id)
        # What looks up the iteration before is reported by another asset, and then has no step in that run.
        return int(record.partition_key or 1), self._runs[record.run_id].get(asset, 0.0)
