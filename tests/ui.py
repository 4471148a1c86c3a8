"""`synpo ui` on a home, driven through the same GraphQL requests that the pages send."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

CONFIGURATION = (Path(__file__).parents[1] / "synpo_assets" / "cli" / "dagster.yaml").read_text()
FINISHED = {"SUCCESS", "FAILURE", "CANCELED"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BACKFILL_FINISHED = {"COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED", "CANCELED", "COMPLETED"}


def wait_for(what, seconds=60.0, pause=0.5):
    """Returns the first true value of `what()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := what():
            return value
        time.sleep(pause)
    raise TimeoutError(f"not within {seconds} s")


def changed(changes):
    """What the Launchpad sends for settings of one run, by dotted name."""
    return {"resources": {"changes": {"config": changes or {}}}}


class Ui:
    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.url = f"http://127.0.0.1:{port}"

    def query(self, text, **variables):
        body = json.dumps({"query": text, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                result = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        assert not result.get("errors"), result["errors"]
        return result["data"]

    def is_ready(self):
        try:
            found = self.query("{ workspaceOrError { ... on Workspace { locationEntries { loadStatus } } } }")
        except OSError:
            return False
        return [entry["loadStatus"] for entry in found["workspaceOrError"]["locationEntries"]] == ["LOADED"]

    def location(self):
        return self.query("{ workspaceOrError { ... on Workspace { locationEntries { name } } } }")["workspaceOrError"][
            "locationEntries"
        ][0]["name"]

    def assets(self):
        """Those that `Materialize all` takes, and whether they have iterations."""
        found = self.query("{ assetNodes { assetKey { path } isPartitioned isMaterializable } }")["assetNodes"]
        return {node["assetKey"]["path"][0]: node["isPartitioned"] for node in found if node["isMaterializable"]}

    def reload(self):
        """The button `Reload` of the code location."""
        found = self.query(
            """mutation L($name: String!) { reloadRepositoryLocation(repositoryLocationName: $name) {
                 ... on WorkspaceLocationEntry { loadStatus } ... on PythonError { message } } }""",
            name=self.location(),
        )
        assert found["reloadRepositoryLocation"] == {"loadStatus": "LOADED"}

    def backfill(self, partitions, assets=None, changes=None):
        """`Materialize` in the dialog, for iterations; returns the id of the backfill."""
        found = self.query(
            """mutation Launch($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
                 __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }""",
            params={"assetSelection": [{"path": [name]} for name in assets or self.assets()],
                    "partitionNames": partitions, "tags": [], "runConfigData": changed(changes)},
        )["launchPartitionBackfill"]  # fmt: skip
        return found["backfillId"]

    def wait_for_backfill(self, backfill, seconds=900):
        def finished():
            found = self.query(
                "query B($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }",
                id=backfill,
            )["partitionBackfillOrError"]["status"]
            return found if found in BACKFILL_FINISHED else None

        return wait_for(finished, seconds, pause=2)

    def runs(self, **filters):
        """Runs, oldest first, with id, status, partition, start and end time, and steps."""
        found = self.query(
            """query R($filter: RunsFilter!) { runsOrError(filter: $filter, limit: 50) { ... on Runs { results {
                 id status startTime endTime tags { key value } assetSelection { path }
                 stepStats { stepKey startTime endTime status } } } } }""",
            filter=filters,
        )["runsOrError"]["results"]
        for run in found:
            run["partition"] = {tag["key"]: tag["value"] for tag in run["tags"]}.get("dagster/partition")
        return found[::-1]

    def launch(self, partition, assets, changes=None):
        """A single run of some assets, of an iteration or made once (None), as the Launchpad starts it; returns its id."""
        found = self.query(
            """mutation L($params: ExecutionParams!) { launchRun(executionParams: $params) {
                 __typename ... on LaunchRunSuccess { run { id } } ... on PythonError { message } } }""",
            params={
                "selector": {
                    "repositoryLocationName": self.location(),
                    "repositoryName": "__repository__",
                    "jobName": "synpo",
                    "assetSelection": [{"path": [name]} for name in assets],
                },
                "runConfigData": changed(changes),
                "executionMetadata": {"tags": [{"key": "dagster/partition", "value": partition}] if partition else []},
            },
        )["launchRun"]
        return found["run"]["id"]

    def status(self, run):
        return self.query(
            "query S($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", id=run
        )["runOrError"]["status"]  # fmt: skip

    def wait_for_run(self, run, seconds=600):
        return wait_for(lambda: self.status(run) if self.status(run) in FINISHED else None, seconds)

    def terminate(self, run):
        """The button `Terminate` of a run."""
        found = self.query(
            """mutation T($id: String!) { terminateRun(runId: $id, terminatePolicy: SAFE_TERMINATE) { __typename
                 ... on TerminateRunFailure { message } ... on PythonError { message } } }""",
            id=run,
        )["terminateRun"]
        assert found["__typename"] == "TerminateRunSuccess", found

    def failure_messages(self, run):
        """The messages of the errors that ended steps of a run, innermost causes included."""
        found = self.query(
            """query E($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
                 ... on ExecutionStepFailureEvent { stepKey error { message causes { message } } } } } } }""",
            id=run,
        )["logsForRun"]["events"]
        return "\n".join(
            " ".join([event["error"]["message"], *(cause["message"] for cause in event["error"]["causes"])])
            for event in found if event.get("error")
        )  # fmt: skip

    def events(self, run):
        """The messages of a run's events with those of their errors."""
        found = self.query(
            """query E($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
                 ... on MessageEvent { message } ... on EngineEvent { error { message } } } } } }""",
            id=run,
        )["logsForRun"]["events"]
        return [(event.get("error") or event)["message"] for event in found if event]

    def check(self, asset):
        """Whether the first check of an asset passed when it was last evaluated, and what it says."""
        found = self.query(
            """query C($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
                 assetChecksOrError { ... on AssetChecks { checks {
                 executionForLatestMaterialization { evaluation { success description } } } } } } } }""",
            key={"path": [asset]},
        )["assetNodeOrError"]["assetChecksOrError"]["checks"][0]["executionForLatestMaterialization"]  # fmt: skip
        return (found["evaluation"]["success"], found["evaluation"]["description"]) if found else None

    def stale(self, asset, partitions):
        found = self.query(
            """query N($key: AssetKeyInput!, $partitions: [String!]) { assetNodeOrError(assetKey: $key) {
                 ... on AssetNode { staleStatusByPartition(partitions: $partitions) } } }""",
            key={"path": [asset]}, partitions=partitions,
        )  # fmt: skip
        return dict(zip(partitions, found["assetNodeOrError"]["staleStatusByPartition"], strict=True))

    def metadata(self, asset, partition):
        """Metadata entries of the newest materialization: name to whichever value the entry has."""
        found = self.query(
            """query M($key: AssetKeyInput!, $partitions: [String!]) { assetOrError(assetKey: $key) { ... on Asset {
                 assetMaterializations(partitions: $partitions, limit: 1) { runId metadataEntries { label
                   ... on TextMetadataEntry { text } ... on IntMetadataEntry { intValue }
                   ... on FloatMetadataEntry { floatValue } ... on MarkdownMetadataEntry { mdStr }
                   ... on UrlMetadataEntry { url } ... on AssetMetadataEntry { assetKey { path } }
                   ... on PipelineRunMetadataEntry { runId } ... on JsonMetadataEntry { jsonString } } } } } }""",
            key={"path": [asset]}, partitions=[partition] if partition else None,
        )["assetOrError"]["assetMaterializations"][0]  # fmt: skip
        entries = {entry.pop("label"): next(iter(entry.values()), None) for entry in found["metadataEntries"]}
        return entries | {"run": found["runId"]}


def processes_of(home):
    """Command lines of the processes whose environment names the home, as those of its runs do, by process id.

    But the mirror of a step's output that nothing ends, which writes nothing: Dagster starts first it and then its watcher, and
    a step that is killed in between leaves it.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"SYNPO_HOME={home}\0".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    watched = {int(command.split()[-1]) for command in found.values() if "watch_orphans" in command}
    return {
        process: command
        for process, command in found.items()
        if process in watched or not command.startswith("tail -F ")
    }


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# How often the daemon looks at the queue can be configured.
QUICK_QUEUE = "\nrun_queue:\n  dequeue_interval_seconds: 2\n"
# How often it looks at backfills cannot. This is read by each Python process as it starts.
QUICK_BACKFILLS = """import sys

if "dagster._daemon" in sys.orig_argv:
    from dagster._daemon import controller

    controller.DEFAULT_DAEMON_INTERVAL_SECONDS = 6
"""


@contextmanager
def running_ui(home: Path, quick: bool = False):
    """`synpo ui` with web server, daemon and code server, until the end of the block.

    Args:
        quick: Whether its daemon looks at backfills every 6 seconds and at the queue every 2, rather than every 30 and 5.
    """
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name not in ("SYNPO_HOME", "DAGSTER_HOME")}
    if quick:
        (home / "dagster.yaml").write_text(CONFIGURATION + QUICK_QUEUE)
        folder = home.with_name("python starts")
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(QUICK_BACKFILLS)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    command = [str(Path(sys.executable).with_name("synpo")), "ui", "--home", str(home), "--port", str(port)]
    log = (home / "ui.log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    ui = Ui(home, port)
    try:
        wait_for(ui.is_ready, 120)
        yield ui
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


@contextmanager
def browser_page(url, width=1600, height=1000):
    """The UI in a headless Chromium, until the end of the block."""
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)
        page.goto(url)
        yield page
