"""Pairs for other trainers: TRL's form by TRL's own checks, the others against models of what their authors document."""

import json
import shutil
from typing import Any, Literal

import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typer.testing import CliRunner

from resources.models.chat import load_tokenizer
from resources.storage.tables import ParquetTables
from synpo_assets.cli.commands import app
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.publishing.forms import CONVERSIONS, openai_row
from tests.conftest import WORK
from tests.nano import nano_settings, write_settings

TEXT = 'Ünïcode, "quotes",\nlines \u2028 and \u202e marks'


def pairs(iteration, count):
    def message(role, text):
        return [{"role": role, "content": f"{text} {iteration}-{count}: {TEXT}"}]

    strings = [name for name, column in PreferencePairs.to_schema().columns.items() if str(column.dtype) == "String"]
    rows = [
        {name: f"{name}-{iteration}-{place}" for name in strings}
        | {"prompt": message("user", "p"), "chosen": message("assistant", "c"), "rejected": message("assistant", "r")}
        | {"chosen_score": 1.5, "rejected_score": 0.25, "margin": 1.25, "iteration": iteration, "rules": ""}
        for place in range(count)
    ]
    return pl.DataFrame(rows, schema=PreferencePairs.empty().schema)


@pytest.fixture
def home(tmp_path, nano_model):
    home = tmp_path / "home"
    (home / "metrics").mkdir(parents=True)
    write_settings(home / "settings.yaml", nano_settings(nano_model))
    tables = ParquetTables(str(home / "tables"))
    for iteration, count in ((1, 3), (2, 2)):
        tables.write("preference_pairs", f"{iteration:04d}", pairs(iteration, count))
    return home


def export(home, form, output, *arguments):
    words = ["export", "--home", home, "--format", form, "--output", output, *arguments]
    return CliRunner().invoke(app, [str(word) for word in words])


def written(home, form, output, *arguments):
    result = export(home, form, output, *arguments)
    assert result.exit_code == 0, result.output
    file = output if output.suffix else output / "preference_pairs.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Lenient(BaseModel):
    """A row whose trainer takes columns by name."""

    pair_id: str
    prompt_id: str
    iteration: int
    margin: float
    chosen_checkpoint_sha: str
    rejected_checkpoint_sha: str
    scorer_sha: str


class HumanTurn(Strict):
    from_: Literal["human"] = Field(alias="from")
    value: str = Field(min_length=1)


class GptTurn(Strict):
    from_: Literal["gpt"] = Field(alias="from")
    value: str = Field(min_length=1)


class LlamaFactoryRow(Lenient):
    """https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md, sharegpt format, preference dataset."""

    conversations: list[HumanTurn] = Field(min_length=1)
    chosen: GptTurn
    rejected: GptTurn


class UserMessage(Strict):
    role: Literal["user"]
    content: str = Field(min_length=1)


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: str = Field(min_length=1)


class AxolotlRow(Lenient):
    """https://docs.axolotl.ai/docs/rlhf.html#chat_template.default."""

    messages: list[UserMessage] = Field(min_length=1)
    chosen: AssistantMessage
    rejected: AssistantMessage


class OpenAIInput(Strict):
    messages: list[UserMessage] = Field(min_length=1)


class OpenAIRow(Strict):
    """https://developers.openai.com/api/docs/guides/direct-preference-optimization: three fields, no others."""

    input: OpenAIInput
    preferred_output: list[AssistantMessage] = Field(min_length=1, max_length=1)
    non_preferred_output: list[AssistantMessage] = Field(min_length=1, max_length=1)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "folder"])
def test_trl_reads_its_form_and_renders_it_with_a_chat_template(home, tmp_path, nano_model, name):
    import datasets
    from trl.data_utils import apply_chat_template, is_conversational, maybe_extract_prompt

    output = tmp_path / name
    assert export(home, "trl", output).exit_code == 0
    file = output if output.suffix else output / "preference_pairs.jsonl"
    kind = "parquet" if file.suffix == ".parquet" else "json"
    loaded = datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 5
    assert set(loaded.column_names) == set(PreferencePairs.to_schema().columns)
    tokenizer = load_tokenizer(str(nano_model))
    for row in loaded:
        assert is_conversational(row)
        assert maybe_extract_prompt(row) == row, "the prompt is explicit already"
        rendered = apply_chat_template(row, tokenizer)
        assert rendered["prompt"].endswith("<|im_start|>assistant\n")
        assert rendered["chosen"].startswith(row["chosen"][0]["content"])
        assert rendered["rejected"].startswith(row["rejected"][0]["content"])


@pytest.mark.parametrize(
    ("form", "model"), [("llama-factory", LlamaFactoryRow), ("axolotl", AxolotlRow), ("openai", OpenAIRow)]
)
def test_the_other_forms_are_what_their_authors_document(home, tmp_path, form, model):
    rows = written(home, form, tmp_path / "out")
    assert len(rows) == 5
    for row in rows:
        TypeAdapter(model).validate_python(row)


def test_llama_factory_finds_the_file_and_its_columns(home, tmp_path):
    rows = written(home, "llama-factory", tmp_path / "out")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    (described,) = info.values()
    assert described["formatting"] == "sharegpt"
    assert described["ranking"] is True
    assert (tmp_path / "out" / described["file_name"]).exists()
    assert described["columns"].keys() == {"messages", "chosen", "rejected"}
    assert set(described["columns"].values()) <= rows[0].keys()


def test_axolotls_snippet_names_the_file_and_its_fields(home, tmp_path):
    import datasets

    written(home, "axolotl", tmp_path / "out")
    configuration = yaml.safe_load((tmp_path / "out" / "axolotl.yaml").read_text())
    assert configuration["rl"] == "dpo"
    (dataset,) = configuration["datasets"]
    assert dataset["type"] == "chat_template.default"
    loaded = datasets.load_dataset(
        dataset["ds_type"], data_files=dataset["path"], split=dataset["split"], cache_dir=str(tmp_path / "cache")
    )
    assert {dataset[f"field_{name}"] for name in ("messages", "chosen", "rejected")} <= set(loaded.column_names)


@pytest.mark.parametrize("form", CONVERSIONS)
def test_texts_arrive_unchanged_and_in_order(home, tmp_path, form):
    def contents(value: Any):
        if isinstance(value, dict):
            yield from (text for key, text in value.items() if key in ("content", "value") and isinstance(text, str))
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from contents(part)

    expected = [
        sorted(row[side][0]["content"] for side in ("prompt", "chosen", "rejected"))
        for row in pl.concat([pairs(1, 3), pairs(2, 2)]).to_dicts()
    ]
    assert [sorted(contents(row)) for row in written(home, form, tmp_path / "out")] == expected


@given(chosen=st.text(min_size=1), rejected=st.text(min_size=1))
def test_chosen_and_rejected_are_never_exchanged(chosen, rejected):
    answers = {"chosen": chosen, "rejected": rejected}
    row: dict[str, Any] = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    row |= {"prompt": [{"role": "user", "content": "?"}]}
    converted = {form: convert(row) for form, convert in CONVERSIONS.items()}
    assert converted["trl"] == row
    for side, text in answers.items():
        assert converted["llama-factory"][side]["value"] == text
        assert converted["axolotl"][side]["content"] == text.strip()
    assert openai_row(row)["preferred_output"][0]["content"] == chosen
    assert openai_row(row)["non_preferred_output"][0]["content"] == rejected


@pytest.mark.parametrize(("asked", "iterations"), [(["--only", "2"], {2}), (["--only", "1, 2"], {1, 2}), ([], {1, 2})])
def test_iterations_can_be_chosen(home, tmp_path, asked, iterations):
    rows = written(home, "trl", tmp_path / "pairs.jsonl", *asked)
    assert {row["iteration"] for row in rows} == iterations


@pytest.mark.parametrize(("form", "name"), [("trl", "out.parquet"), ("openai", "out.jsonl"), ("axolotl", "out")])
def test_what_exists_is_replaced_only_when_asked(home, tmp_path, form, name):
    assert export(home, form, tmp_path / name).exit_code == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("out*") if file.is_file()}
    refused = export(home, form, tmp_path / name, "--only", "1")
    assert refused.exit_code == 2
    assert "exists: choose another --output, or replace it with --overwrite" in refused.stderr
    assert {file: file.read_bytes() for file in before} == before
    assert export(home, form, tmp_path / name, "--only", "1", "--overwrite").exit_code == 0
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("arguments", [(), ("--overwrite",)])
def test_other_entries_of_a_dataset_info_are_kept(home, tmp_path, arguments):
    info = tmp_path / "data" / "dataset_info.json"
    info.parent.mkdir()
    info.write_text('{"mine": {"file_name": "mïne.json"}}', encoding="utf-8")
    assert len(written(home, "llama-factory", info.parent, *arguments)) == 5
    described = json.loads(info.read_text())
    assert list(described) == ["mine", "synpo_preference_pairs"]
    assert described["mine"] == {"file_name": "mïne.json"}


def test_our_entry_of_a_dataset_info_is_replaced_only_when_asked(home, tmp_path):
    info = tmp_path / "data" / "dataset_info.json"
    info.parent.mkdir()
    before = '{"synpo_preference_pairs": {"file_name": "elsewhere.jsonl"}, "mine": {}}'
    info.write_text(before)
    refused = export(home, "llama-factory", info.parent)
    assert refused.exit_code == 2
    assert "dataset_info.json exists and names synpo_preference_pairs: choose another --output" in refused.stderr
    assert info.read_text() == before
    assert [file.name for file in info.parent.iterdir()] == ["dataset_info.json"]
    written(home, "llama-factory", info.parent, "--overwrite")
    described = json.loads(info.read_text())
    assert described["synpo_preference_pairs"]["file_name"] == "preference_pairs.jsonl"
    assert described["mine"] == {}


@pytest.mark.parametrize("content", [b'{"mine"', b'["mine"]', b"\xff"])
@pytest.mark.parametrize("arguments", [(), ("--overwrite",)])
def test_a_dataset_info_that_is_no_json_object_is_refused(home, tmp_path, content, arguments):
    info = tmp_path / "data" / "dataset_info.json"
    info.parent.mkdir()
    info.write_bytes(content)
    refused = export(home, "llama-factory", info.parent, *arguments)
    assert refused.exit_code == 2
    assert "dataset_info.json is no JSON object" in refused.stderr
    assert info.read_bytes() == content
    assert [file.name for file in info.parent.iterdir()] == ["dataset_info.json"]


@pytest.mark.parametrize(("form", "name", "arguments", "words"), [
    ("openai", "x.parquet", (), "is written as .jsonl"),
    ("llama-factory", "x.jsonl", (), "give --output a folder"),
    ("trl", "x.jsonl", ("--only", "1,7"), "Iteration 7 has no preference pairs; iterations that have: 1, 2."),
    ("trl", "x.jsonl", ("--only", "first"), "is no list of iterations such as 2,3"),
    ("trl", "x.jsonl", ("--only", "²"), "is no list of iterations such as 2,3"),
    ("trl", "x.jsonl", ("--only", "1,\u0661"), "is no list of iterations such as 2,3"),
    ("trl", "x.jsonl", ("--only", f"1,{'9' * 5000}"), "is no list of iterations such as 2,3"),
    ("gguf", "x.gguf", ("--iteration", "9" * 5000), "name its iteration, such as --iteration 2"),
    ("trl", "x.csv", (), "give --output a folder (one with a dot in its name must exist), a .jsonl file, or for trl a .parquet"),
    ("openai", f"{__file__}/x.jsonl", ("--overwrite",), "x.jsonl cannot be written: "),
    ("axolotl", f"{__file__}/x", (), "x cannot be written: "),
    ("trl", f"{__file__}/folder/x.parquet", (), "x.parquet cannot be written: Not a directory."),
    ("trl", "/proc/x/y.jsonl", (), "--output /proc/x/y.jsonl cannot be written: "),
    ("trl", f"{'x' * 300}.jsonl", (), "cannot be written: File name too long."),
])  # fmt: skip
def test_what_cannot_be_written_is_refused_in_a_sentence(home, tmp_path, form, name, arguments, words):
    result = export(home, form, tmp_path / name, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("arguments", [(), ("--overwrite",)])
def test_a_folder_in_the_place_of_a_file_is_refused(home, tmp_path, arguments):
    (tmp_path / "x.jsonl").mkdir()
    result = export(home, "trl", tmp_path / "x.jsonl", *arguments)
    assert result.exit_code == 2
    assert "x.jsonl is a folder: give --output a file" in result.stderr
    assert not list((tmp_path / "x.jsonl").iterdir())


def test_a_folder_with_a_dot_in_its_name_may_be_there(home, tmp_path):
    (tmp_path / "pairs-1.2").mkdir()
    assert export(home, "trl", tmp_path / "pairs-1.2").exit_code == 0
    assert [file.name for file in (tmp_path / "pairs-1.2").iterdir()] == ["preference_pairs.jsonl"]


def test_a_home_without_pairs_is_refused(tmp_path, nano_model):
    write_settings(tmp_path / "settings.yaml", nano_settings(nano_model))
    result = export(tmp_path, "trl", tmp_path / "x.jsonl")
    assert result.exit_code == 2
    assert "holds no preference pairs yet" in result.stderr


def test_a_write_that_fails_leaves_nothing(home, tmp_path, monkeypatch):
    from synpo_assets.publishing import export as module

    def fails(row):
        raise RuntimeError("disk full")

    monkeypatch.setitem(module.CONVERSIONS, "openai", fails)
    assert export(home, "openai", tmp_path / "x.jsonl").exit_code == 1
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(("name", "arguments", "words"), [
    ("m.gguf", (), "name its iteration"),
    ("m.gguf", ("--iteration", "1,2"), "name its iteration"),
    ("m.gguf", ("--iteration", "0"), "name --iteration 1 or later"),
    ("m.bin", ("--iteration", "1"), "give --output a .gguf file"),
    ("m.gguf", ("--iteration", "1"), "Iteration 1 has no finished model"),
])  # fmt: skip
def test_a_model_that_cannot_be_exported_is_refused(home, tmp_path, name, arguments, words):
    result = export(home, "gguf", tmp_path / name, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert not (tmp_path / name).exists()


def test_the_model_of_an_iteration_is_exported(home, tmp_path, adapted_checkpoint, nano_model):
    shutil.copytree(WORK / "adapted", home / "checkpoints", symlinks=True)
    target = tmp_path / "m.gguf"
    result = export(home, "gguf", target, "--iteration", "1")
    assert result.exit_code == 0, result.output
    assert target.read_bytes()[:4] == b"GGUF"
    again = export(home, "gguf", target, "--iteration", "1")
    assert (again.exit_code, "--overwrite" in again.output) == (2, True)


@pytest.mark.parametrize(("form", "place"), [
    ("trl", "tables/preference_pairs/0001.parquet"), ("trl", "tables/preference_pairs/0003.parquet"), ("axolotl", "metrics"),
    ("review", "review.csv"), ("llama-factory", "../linked"),
])  # fmt: skip
def test_nothing_is_exported_into_a_home(home, tmp_path, form, place):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "dataset_info.json").symlink_to(home / "settings.yaml")
    before = {file: file.read_bytes() for file in home.rglob("*") if file.is_file()}
    refused = export(home, form, home / place, "--overwrite")
    assert refused.exit_code == 2
    assert "lies in the home" in refused.stderr or "is no JSON object" in refused.stderr
    assert {file: file.read_bytes() for file in home.rglob("*") if file.is_file()} == before
