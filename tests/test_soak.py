"""A home whose runs are killed, whose files are damaged and whose settings are edited at random ends as an undisturbed one.

SYNPO_SOAK_SECONDS says for how long, and without it nothing is tried; SYNPO_SOAK_SEED which moments and victims are drawn:
`SYNPO_SOAK_SECONDS=1200 pytest -n 0 -m slow tests/test_soak.py`.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal

from resources.storage.manifests import Pointer
from tests.conftest import synpo
from tests.nano import nano_settings, write_settings
from tests.test_healing import flipped
from tests.ui import processes_of, running_ui

SECONDS = float(os.environ.get("SYNPO_SOAK_SECONDS", "0"))
SEED = int(os.environ.get("SYNPO_SOAK_SEED", "1"))
# Of a run: past its start, in which nothing is at work yet, until well into the iteration.
MOMENTS = (4.0, 40.0)
ENDS_WITHIN = 60


def victims_of(home):
    """Ids of the home's processes but one kind: Dagster ends the mirror of a step's output by a watcher that nothing watches."""
    return [process for process, command in processes_of(home).items() if "watch_orphans" not in command]


def kill_one_of(home, run, draw):
    """Kills the run itself, or one of the processes that it started, a step or what steps are forked from; says which."""
    victim = draw.choice([run.pid, *victims_of(home)])
    how = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    with suppress(ProcessLookupError):
        os.kill(victim, how)
    return f"{how.name} to {'the run' if victim == run.pid else 'a process of the run'}"


def damage_a_file(home, draw):
    """Does to one finished file what a failing disk does; says of which kind it is."""
    files = [file for place in ("tables/**/*.parquet", "metrics/**/*.parquet", "shards/**/*.parquet", "checkpoints/*/*.json",
                                "checkpoints/**/manifest.json") for file in sorted(home.glob(place))]  # fmt: skip
    if files:
        file = draw.choice(files)
        content = file.read_bytes()
        damaged = draw.choice([None, b"", content[: len(content) // 2], flipped(content, draw) if content else b"?"])
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        return f"damage in {file.relative_to(home).parts[0]}"
    return "nothing to damage"


def launch_in_the_ui(home, draw):
    """Materializes the first iteration in the UI, whose processes are then ended with it, or killed one by one."""
    with running_ui(home) as ui:
        ui.launch("0001", [asset for asset, has_iterations in ui.assets().items() if has_iterations])
        time.sleep(draw.uniform(*MOMENTS))
        if draw.random() < 0.5:
            # Nothing may be left to kill, and who is drawn may have ended since.
            with suppress(ProcessLookupError, IndexError):
                os.kill(draw.choice(victims_of(home)), signal.SIGKILL)
            return "UI, a process of which is killed"
    return "UI that ends beside its run"


def edit_settings(home, draw):
    """Changes what decides how work is done and not what comes of it, or leaves a file that nobody can read."""
    file = home / "settings.yaml"
    whole = file.read_bytes()
    if draw.random() < 0.3:
        file.write_bytes(draw.choice([b"", b"\xff", b"engine: [", whole[: len(whole) // 2] + b"\n: :"]))
        refused = synpo("run", "--home", home)
        file.write_bytes(whole)
        assert (refused.returncode, refused.stderr.count("Traceback")) == (2, 0), refused.stderr
        return "unreadable settings"
    values = yaml.safe_load(whole)
    values["engine"]["shard_rows"] = draw.choice([1, 3, 16])
    values["training_processes"]["save_every_steps"] = draw.choice([1, 2, 50])
    write_settings(file, values)
    return "edited settings"


def wait_for_the_end_of(home):
    ended = time.monotonic() + ENDS_WITHIN
    while processes_of(home):
        assert time.monotonic() < ended, processes_of(home)
        time.sleep(0.2)


def made_in(home):
    """The tables and the sha of the checkpoints of the first iteration, and of what is made once, by place."""
    places = [*home.glob("tables/*.parquet"), *home.glob("tables/*/0001.parquet")]
    tables = {file.relative_to(home).as_posix(): pl.read_parquet(file) for file in places}
    pointers = [*home.glob("checkpoints/*/once.json"), *home.glob("checkpoints/*/0001.json")]
    shas = {file.relative_to(home).as_posix(): Pointer.model_validate_json(file.read_bytes()).sha for file in pointers}
    return tables, shas


@pytest.mark.slow
@pytest.mark.skipif(not SECONDS, reason="SYNPO_SOAK_SECONDS is not set")
def test_a_home_whose_runs_are_killed_ends_as_an_undisturbed_one(nano_model, tmp_path):
    draw, home, undisturbed = random.Random(SEED), tmp_path / "home", tmp_path / "undisturbed"
    settings = write_settings(tmp_path / "nano.yaml", nano_settings(nano_model))
    whole = synpo("run", "--settings", settings, "--home", undisturbed)
    assert whole.returncode == 0, whole.stderr[-2000:]
    command = [str(Path(sys.executable).with_name("synpo")), "run", "--home", str(home)]
    environment = {name: value for name, value in os.environ.items() if name not in ("SYNPO_HOME", "DAGSTER_HOME")}
    deadline, kills, launches = time.monotonic() + SECONDS, 0, 0
    done = Counter[str]()
    while time.monotonic() < deadline:
        # On a busy machine the first run may be killed before it has made its home.
        if kills > launches and (home / "settings.yaml").exists() and draw.random() < 0.4:
            done[launch_in_the_ui(home, draw)] += 1
            launches += 1
            wait_for_the_end_of(home)
        first = [] if (home / "settings.yaml").exists() else ["--settings", str(settings)]
        with subprocess.Popen(
            [*command, *first], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as run:
            with suppress(subprocess.TimeoutExpired):
                run.wait(min(draw.uniform(*MOMENTS), max(1.0, deadline - time.monotonic())))
            if run.poll() is None:
                done[kill_one_of(home, run, draw)] += 1
                kills += 1
            # Where a step was killed, the run goes on, or tries again.
            with suppress(subprocess.TimeoutExpired):
                run.wait(draw.uniform(1, 10))
            run.kill()
        wait_for_the_end_of(home)
        if (home / "settings.yaml").exists():
            done[edit_settings(home, draw)] += 1
            done[damage_a_file(home, draw)] += 1
    sys.stdout.write(f"{dict(done)}\n")
    last = synpo("run", "--home", home)
    assert last.returncode == 0, last.stderr[-2000:]
    assert kills, "a soak in which nothing is killed shows nothing: give it more time"
    (tables, shas), (undisturbed_tables, undisturbed_shas) = made_in(home), made_in(undisturbed)
    assert shas == undisturbed_shas
    assert tables.keys() == undisturbed_tables.keys()
    # A run that went on scored the rest in other batches, and sums are rounded by batch.
    for place, table in tables.items():
        assert_frame_equal(table, undisturbed_tables[place], abs_tol=1e-5)
    assert [file for file in home.rglob("*.tmp") if "training" not in file.parts] == []
