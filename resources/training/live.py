"""What a training says of itself while it is under way, beside its log lines: its loss, and where a tracker shows it."""

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from resources.common.errors import without_secrets

if TYPE_CHECKING:
    from transformers import TrainerCallback

# Values of one moment by name; where a tracker shows the training, under `TRACKED`.
Observe = Callable[[Mapping[str, float | str]], None]
TRACKED = "tracker"
PROJECT = "synpo"
MOST_OBSERVATIONS = 50
# Loss, and of two answers how often and how far the better one wins, as the trainers of TRL call it.
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "accuracy", "margin")
# What another process says to the one of the step, among its lines for people.
MARK = "observed "


def observe_asset() -> Observe:
    """Shows values as observations of the asset whose step this is, which the UI plots; does nothing outside of Dagster."""
    try:
        context = dg.AssetExecutionContext.get()
    except dg.DagsterInvariantViolationError:
        return lambda _: None
    partition = context.partition_key if context.has_partition_key else None

    def observe(values: Mapping[str, float | str]) -> None:
        context.log_event(dg.AssetObservation(context.asset_key, partition=partition, metadata=values))

    return observe


def print_observed(values: Mapping[str, float | str]) -> None:
    """Says values to the process of the step, which reads what this process prints."""
    print(MARK + json.dumps(values), flush=True)  # noqa: T201


def observing_callback(observe: Observe, report_to: str) -> "TrainerCallback":
    """Observes at most about fifty steps of a training, evenly, the last one included."""
    from transformers import TrainerCallback

    class Observing(TrainerCallback):
        """Comes after the callback of the tracker, which opens its run when the training begins."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and report_to != "none":
                observe({TRACKED: tracker_place(report_to)})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            every = math.ceil(state.max_steps / MOST_OBSERVATIONS)
            is_due = state.global_step % every == 0 or state.global_step == state.max_steps
            if is_due and state.is_world_process_zero and "loss" in (logs or {}):
                observe({"step": state.global_step, **{name: float(logs[name]) for name in SHOWN if name in logs}})

    return Observing()


def tracker_place(report_to: str) -> str:
    """Where a tracker shows the run that is open: its address, or the command that opens its pages."""
    if report_to == "wandb":
        import wandb

        run = wandb.run
        return (run and run.url) or f"wandb sync {run.dir if run else ''}"
    if report_to == "mlflow":
        import mlflow

        run, store = mlflow.active_run(), mlflow.get_tracking_uri()
        store = without_secrets(store)
        page = f"{store}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" if run else store
        return page if store.startswith("http") else f"mlflow ui --backend-store-uri {store}"
    from trackio import context_vars

    space = context_vars.current_space_id.get()
    return f"https://huggingface.co/spaces/{space}" if space else f"trackio show --project {PROJECT}"
