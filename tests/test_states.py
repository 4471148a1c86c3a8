"""Saved states of a training are compared with what was written before a training goes on from one of them."""

import shutil

import pytest

from resources.training.state import MARKER, mark, newest_state


def save(folder, step):
    """A state as the trainer leaves it, with its marker."""
    state = folder / f"checkpoint-{step}"
    (state / "shards").mkdir(parents=True)
    (state / "optimizer.pt").write_bytes(b"moments " * step)
    (state / "shards" / "rank_0.pt").write_bytes(b"weights " * step)
    mark(state, seconds=step)
    return state


def become_a_directory(file):
    file.unlink()
    file.mkdir()


def flip(file):
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a bit of a file": lambda state: flip(state / "optimizer.pt"),
    "a file is gone": lambda state: (state / "shards" / "rank_0.pt").unlink(),
    "a file is cut": lambda state: (state / "optimizer.pt").write_bytes(b"mom"),
    "a directory in a file's place": lambda state: become_a_directory(state / "optimizer.pt"),
    "no marker of this version": lambda state: (state / MARKER).write_text('{"seconds": 1}'),
    "an empty marker": lambda state: (state / MARKER).write_bytes(b""),
    "bytes for a marker": lambda state: (state / MARKER).write_bytes(b"\xff\x00"),
    "a directory for a marker": lambda state: become_a_directory(state / MARKER),
    "a file for the state": lambda state: (shutil.rmtree(state), state.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_set_aside_and_the_one_before_it_is_taken(tmp_path, said, damage):
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    assert newest_state(tmp_path) == (newest, 10)
    assert not said
    DAMAGES[damage](newest)
    assert newest_state(tmp_path)[0] == before
    (line,) = said
    assert f"The saved state {newest} is not as it was written" in line
    assert (tmp_path / "step-10.damaged").exists()
    assert not newest.exists()
    # It is made again, and damaged again.
    DAMAGES[damage](save(tmp_path, 10))
    DAMAGES[damage](before)
    assert newest_state(tmp_path) == (None, 0.0)
    assert len(said) == 3


def test_what_was_only_half_written_is_removed_and_what_is_no_state_is_left(tmp_path, said):
    whole = save(tmp_path, 2)
    (save(tmp_path, 4) / MARKER).unlink()
    (tmp_path / "checkpoint-notes").mkdir()
    assert newest_state(tmp_path)[0] == whole
    assert sorted(place.name for place in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-notes"]
    assert not said


def test_of_a_half_written_state_elsewhere_the_link_is_removed(tmp_path, said):
    whole, elsewhere = save(tmp_path / "here", 2), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").write_text("x")
    (tmp_path / "here" / "checkpoint-4").symlink_to(elsewhere)
    assert newest_state(tmp_path / "here")[0] == whole
    assert [place.name for place in (tmp_path / "here").iterdir()] == ["checkpoint-2"]
    assert [file.name for file in elsewhere.iterdir()] == ["model.safetensors"]


def test_a_link_that_leads_nowhere_is_no_obstacle_to_setting_a_state_aside(tmp_path, said):
    (tmp_path / "step-2.damaged").symlink_to(tmp_path / "gone")
    next(file for file in save(tmp_path, 2).iterdir() if file.name != MARKER).write_bytes(b"")
    assert newest_state(tmp_path)[0] is None
    assert (tmp_path / "step-2.damaged").is_dir()
