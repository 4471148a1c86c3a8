"""A disk that is full in the midst of a run: one sentence, and nothing is lost."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal

from resources.common.errors import full_disk
from synpo_assets.cli.errors import sentence_of
from tests.conftest import synpo
from tests.nano import nano_settings, write_settings
from tests.test_soak import made_in

FAILED = sqlite3.OperationalError("disk I/O error")


@pytest.mark.parametrize(
    ("free", "sentence"),
    [
        (0, "A disk is full (disk I/O error). Finished work is kept"),
        (1 << 30, "/history cannot be used: disk I/O error."),
    ],
)
def test_sqlite_says_the_same_of_a_disk_that_fails_and_of_one_that_is_full(tmp_path, monkeypatch, free, sentence):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": free}))
    assert sentence in sentence_of(FAILED)


def test_what_pytorch_says_of_a_full_disk_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert full_disk(error) is None
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1 << 20}))
    assert sentence_of(error).startswith("A disk is full (inline_container.cc). Finished work is kept")


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place):
    """Writes until nothing more fits, and returns the file that is to be deleted."""
    file = place / "fill"
    with file.open("wb", buffering=0) as full:
        try:
            while full.write(bytes(4096)):
                pass
        except OSError:
            return file


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_midst_of_a_run_costs_nothing_that_is_finished(nano_model, tmp_path, small_disk):
    home, settings = small_disk / "home", write_settings(tmp_path / "nano.yaml", nano_settings(nano_model))
    command = [str(Path(sys.executable).with_name("synpo")), "run", "--settings", str(settings), "--home", str(home)]
    environment = {name: value for name, value in os.environ.items() if name not in ("SYNPO_HOME", "DAGSTER_HOME")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not (home / "tables" / "seed_pairs.parquet").exists():
            assert run.poll() is None
            time.sleep(0.2)
        filler = fill(small_disk)
        _, said = run.communicate(timeout=180)
    assert run.returncode == 2, said
    assert said.splitlines()[-1].startswith("synpo: A disk is full ("), said
    assert "Traceback" not in said
    filler.unlink()
    last, undisturbed = synpo("run", "--home", home), tmp_path / "undisturbed"
    whole = synpo("run", "--settings", settings, "--home", undisturbed)
    assert (last.returncode, whole.returncode) == (0, 0), last.stderr[-2000:]
    (tables, shas), (undisturbed_tables, undisturbed_shas) = made_in(home), made_in(undisturbed)
    assert shas == undisturbed_shas
    assert tables.keys() == undisturbed_tables.keys()
    for place, table in tables.items():
        assert_frame_equal(table, undisturbed_tables[place], abs_tol=1e-5)
