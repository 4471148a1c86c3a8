"""A saved state of a training is used only if it is as it was written."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from resources.training.state import MARKER, marking_callback, newest_state

FILES = {"model.safetensors": b"weights" * 9, "optimizer.pt": b"momenta" * 9, "rank/rng_state.pth": b"dice" * 9}


@pytest.fixture
def directory(tmp_path):
    """Two states, saved after steps 3 and 12 as the trainer does."""
    for step in (3, 12):
        for name, content in FILES.items():
            file = tmp_path / f"checkpoint-{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        arguments = SimpleNamespace(
            output_dir=tmp_path, distributed_state=SimpleNamespace(wait_for_everyone=lambda: None)
        )
        state = SimpleNamespace(is_world_process_zero=True, global_step=step)
        marking_callback(float(step)).on_save(arguments, state, None)
    return tmp_path


def become_a_directory(file):
    file.unlink()
    file.mkdir()


DAMAGES = (
    Path.unlink,
    become_a_directory,
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[:-1]),
    lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
)


def test_the_newest_state_is_the_one_of_most_steps(directory):
    state, seconds = newest_state(directory)
    assert state == directory / "checkpoint-12"
    assert seconds == pytest.approx(12, abs=1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_set_aside_and_the_one_before_it_is_taken(directory, said, name, damage):
    damage(directory / "checkpoint-12" / name)
    assert newest_state(directory)[0] == directory / "checkpoint-3"
    aside = directory / "damaged-checkpoint-12"
    assert aside.is_dir()
    assert [line for line in said if f"set aside as {aside}" in line]
    assert newest_state(directory)[0] == directory / "checkpoint-3", "it is not looked at again"


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"seconds": 3}', b'{"seconds": "x", "files": {}}', None])
def test_a_damaged_marker_is_damage_too(directory, content):
    marker = directory / "checkpoint-12" / MARKER
    become_a_directory(marker) if content is None else marker.write_bytes(content)
    assert newest_state(directory)[0] == directory / "checkpoint-3"


def test_without_an_intact_state_the_training_starts_anew(directory):
    for step in (3, 12):
        (directory / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    (directory / "checkpoint-99").write_text("no state")
    (directory / "checkpoint-mine").mkdir()
    assert newest_state(directory) == (None, 0.0)


def test_a_state_that_was_damaged_twice_is_set_aside_once_more(directory):
    (directory / "damaged-checkpoint-12").mkdir()
    marker = directory / "checkpoint-12" / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"files": {}}))
    newest_state(directory)
    assert (directory / "damaged-checkpoint-12" / "optimizer.pt").exists()
