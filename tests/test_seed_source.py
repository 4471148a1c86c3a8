"""Where seed and corpus are read from: files, folders and names as people have them."""

import gzip
import json

import datasets
import polars as pl
import pytest
import yaml

from resources.common.errors import ModelSourceError
from resources.settings.files import load_settings
from resources.settings.sections import SettingsError
from resources.storage.seed_source import read_rows
from tests.nano import nano_settings

ROWS = [{"text": "one"}, {"text": "zwei"}, {"text": "三"}]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def corpus(tmp_path, stated, **more):
    """What is read of a corpus that a settings file in another folder states."""
    (tmp_path / "settings").mkdir(exist_ok=True)
    file = tmp_path / "settings" / "some.yaml"
    values = nano_settings(tmp_path / "nano") | {"keyword_pool": {"corpus": {"path": stated, **more}}}
    file.write_text(yaml.safe_dump(values))
    source = load_settings(file).keyword_pool.corpus
    return [row["text"] for _, row in read_rows(source, "keyword_pool.corpus", ("text",))]


@pytest.mark.parametrize(
    "name", ["plain.jsonl", "LOUD.JSONL", "what?#%20.jsonl", "~tilde.jsonl", "data [v2] *.parquet", "Größe ü.Parquet"]
)
def test_any_name_of_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir("/")
    if name.lower().endswith("parquet"):
        pl.DataFrame(ROWS).write_parquet(tmp_path / name)
    else:
        write_jsonl(tmp_path / name)
    assert corpus(tmp_path, f"../{name}") == ["one", "zwei", "三"]
    (tmp_path / "settings" / "link").symlink_to(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpus(tmp_path, f"~/{name}") == ["one", "zwei", "三"]


def test_folders(tmp_path):
    for name in ("b [2].jsonl", "a.jsonl"):
        (tmp_path / "lines").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "lines" / name, ROWS[:1] if name == "a.jsonl" else ROWS[1:])
    assert corpus(tmp_path, "../lines") == ["one", "zwei", "三"]
    (tmp_path / "tables").mkdir()
    pl.DataFrame(ROWS).write_parquet(tmp_path / "tables" / "part [0].parquet")
    assert corpus(tmp_path, "../tables") == ["one", "zwei", "三"]
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    assert corpus(tmp_path, "../saved") == ["one", "zwei", "三"]
    datasets.DatasetDict(first=saved).save_to_disk(tmp_path / "splits")
    assert corpus(tmp_path, "../splits", split="first") == ["one", "zwei", "三"]
    with pytest.raises(
        SettingsError, match=r"has no split `train`; it has first: name one in keyword_pool.corpus.split"
    ):
        corpus(tmp_path, "../splits")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        SettingsError, match=r"empty \(keyword_pool.corpus\) holds no file that ends in .jsonl or .parq"
    ):
        corpus(tmp_path, "../empty")
    with pytest.raises(SettingsError, match=r"nowhere.jsonl \(keyword_pool.corpus\) does not exist"):
        corpus(tmp_path, "../nowhere.jsonl")


def test_a_dataset_whose_connection_breaks_is_tried_again(tmp_path, monkeypatch):
    def broken(*_, **__):
        yield from ROWS * 100
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    # No SettingsError, after which a step is not retried.
    with pytest.raises(
        ModelSourceError, match=r"some/dataset, split train \(keyword_pool.corpus\), cannot be had now: Server"
    ):
        corpus(tmp_path, "some/dataset")


def test_bytes_that_are_no_text_cost_their_line_alone(tmp_path):
    lines = [json.dumps({"text": f"line {number}"}).encode() for number in range(400)]
    lines[350] = b'{"text": "caf\xe9"}'
    (tmp_path / "latin.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    source = load_settings_of(tmp_path / "latin.jsonl")
    found = dict(read_rows(source, "keyword_pool.corpus", ("text",)))
    assert [line for line, row in found.items() if not row] == [351]
    assert found[1] == {"text": "line 0"}
    assert len(found) == 400


@pytest.mark.parametrize("content", [
    gzip.compress(b'{"text": "one"}'), '{"text": "one"}'.encode("utf-16"), json.dumps(ROWS).encode(), b"text\none\n",
    json.dumps(ROWS, indent=1).encode(), b'{"text": "one"},\n{"text": "two"},\n', repr(ROWS[0]).encode(),
], ids=["gzip", "UTF-16", "array", "CSV", "array of lines", "commas", "Python"])  # fmt: skip
def test_a_file_of_another_kind_is_refused_with_what_it_should_be(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(
        SettingsError, match=r"rows.jsonl \(keyword_pool.corpus\) is .*: save the file as one JSON object"
    ):
        list(read_rows(load_settings_of(tmp_path / "rows.jsonl"), "keyword_pool.corpus", ("text",)))


def test_a_damaged_file_is_named_wherever_the_damage_is(tmp_path):
    frame = pl.DataFrame({"text": [str(number) * 50 for number in range(2000)]})
    frame.write_parquet(tmp_path / "rows.parquet", row_group_size=200, compression="uncompressed", statistics=False)
    damaged = bytearray((tmp_path / "rows.parquet").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 4000] = b"\xff" * 4000
    (tmp_path / "rows.parquet").write_bytes(damaged)
    with pytest.raises(SettingsError, match=r"rows.parquet \(keyword_pool.corpus\) cannot be read: "):
        list(read_rows(load_settings_of(tmp_path / "rows.parquet"), "keyword_pool.corpus", ("text",)))


@pytest.mark.parametrize("files", [
    {"state.json": "{}", "dataset_info.json": "{}"}, {"state.json": "[]", "dataset_info.json": "[]"},
    {"dataset_dict.json": '{"splits": 5}'}, {"dataset_dict.json": "{}"}, {"dataset_dict.json": "[" * 100_000},
    {"state.json": "\x1b{"},
])  # fmt: skip
def test_a_damaged_dataset_that_was_saved_is_named(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=r"\(keyword_pool.corpus\) cannot be read: .*\. Save it again\.$"):
        list(read_rows(load_settings_of(tmp_path), "keyword_pool.corpus", ("text",)))


def load_settings_of(path):
    from resources.settings.data import DataSource

    return DataSource(path=str(path))


def test_a_tilde_that_names_no_user_is_a_letter(tmp_path):
    (tmp_path / "settings").mkdir()
    write_jsonl(tmp_path / "settings" / "~rows.jsonl")
    assert corpus(tmp_path, "~rows.jsonl") == ["one", "zwei", "三"]
