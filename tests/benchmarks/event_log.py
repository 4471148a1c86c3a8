"""The event log of a home with many iterations: its size, and how long the UI's pages take to open.

    python -m tests.benchmarks.event_log HOME ITERATIONS

HOME is a home with two finished iterations and `max_iterations` of at least ITERATIONS. It is copied, and the events of the
runs of iteration 2 are stored again for each further one, under run ids of their own. Pages are opened in a headless Chromium,
on the copy with two iterations and again on that with all of them; a page is open when the text named beside it stands there.
"""

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.storage.tags import PARTITION_NAME_TAG
from dagster._serdes import deserialize_value, serialize_value

from synpo_assets.graph.partitions import partition_key
from tests.ui import Ui, browser_page, running_ui

LAST_MADE = 2
# The path of a page below the UI's address, with the partition it shows, and a whole text that stands there when it is open.
PAGES = {
    "runs": ("/runs", "Success"),
    "catalog": ("/assets", "model_checkpoint"),
    "lineage": ("/asset-groups", "optimization"),
    "model_checkpoint, partition": ("/assets/model_checkpoint?view=partitions&partition={partition}", "trained_on"),
    "model_checkpoint, events": ("/assets/model_checkpoint?view=events", "trained_on"),
    "evaluation, partition": ("/assets/evaluation?view=partitions&partition={partition}", "boosting"),
    "preference_pairs, checks": ("/assets/preference_pairs?view=checks", "blocking"),
    "boosting_report, partition": ("/assets/boosting_report?view=partitions&partition={partition}", "boosting"),
}  # fmt: skip


def stored_again(instance: dg.DagsterInstance, iterations: int) -> int:
    """Stores the runs of the last iteration and their events for each further iteration; returns the number of events."""
    last, events = partition_key(LAST_MADE), 0
    runs = instance.get_runs(dg.RunsFilter(tags={PARTITION_NAME_TAG: last}))[::-1]
    for number, run in itertools.product(range(LAST_MADE + 1, iterations + 1), runs):
        run_id = str(uuid.uuid4())
        renamed = partial(_renamed, {run.run_id: run_id, f'"{last}"': f'"{partition_key(number)}"'})
        instance.run_storage.add_run(renamed(run))
        for entry in instance.all_logs(run.run_id):
            # An hour after that of the iteration before.
            later = entry.timestamp + 3600 * (number - LAST_MADE)
            instance.event_log_storage.store_event(renamed(entry)._replace(timestamp=later))
            events += 1
    return events


def _renamed(names: Mapping[str, str], value: Any) -> Any:
    """A value of Dagster's with other texts in place of some of its own."""
    text = serialize_value(value)
    for name, other in names.items():
        text = text.replace(name, other)
    return deserialize_value(text)


def size_of(home: Path) -> float:
    """MiB of the databases of the home: Dagster's runs and events."""
    return round(sum(file.stat().st_size for file in (home / "history").rglob("*.db*")) / 2**20, 1)


def seconds_by_page(ui: Ui, partition: str) -> Iterator[tuple[str, float]]:
    with browser_page(ui.url) as page:
        page.get_by_text("Runs").first.wait_for()  # The scripts of the UI are in the browser's cache from here on.
        for name, (path, text) in PAGES.items():
            started = time.monotonic()
            page.goto(ui.url + path.format(partition=partition))
            page.get_by_text(text, exact=True).first.wait_for()
            yield name, round(time.monotonic() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("iterations", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        shutil.copytree(arguments.home, home)
        measured = {}
        for iterations in (LAST_MADE, arguments.iterations):
            if iterations > LAST_MADE:
                os.environ["DAGSTER_HOME"] = str(home)
                with dg.DagsterInstance.get() as instance:
                    events = stored_again(instance, iterations)
                measured["events stored again"] = events
            with running_ui(home) as ui:
                pages = dict(seconds_by_page(ui, partition_key(iterations)))
            measured[f"{iterations} iterations"] = {"MiB of databases": size_of(home), "seconds": pages}
    print(json.dumps(measured, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
