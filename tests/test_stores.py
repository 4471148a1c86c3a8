"""What is written can be read back, and half-written things do not exist."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from resources.common.errors import DamageError, FinalError
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.files import remove_abandoned, temporary_directory_beside, write_atomically
from resources.storage.manifests import weights_manifest
from resources.storage.shards import Shards
from resources.storage.tables import ParquetTables, table_metadata
from synpo_assets.graph.schemas import KeywordPool, PreferencePairs, SeedPairs
from synpo_assets.graph.tables import check, column_schema, frame_type

SEED = pl.DataFrame({"prompt_id": ["prompt-1", "prompt-2"], "prompt": ["a", "b"], "answer": ["x", "y"],
                     "constraints": [[{"rule": "all_lowercase", "value": ""}], []], "split": ["train", "test"],
                     "line": [1, 1]})  # fmt: skip


def test_shards_give_the_row_of_each_key_in_the_order_of_the_keys(tmp_path):
    columns = {"key": pl.String, "row": pl.Int64}
    shards = Shards(str(tmp_path), {}, "a test", columns)
    assert shards.rows(pl.Series(["key-1"])).rows() == [(None,)]
    for first in (0, 3, 2):
        shards.write([{"key": f"key-{row}", "row": row} for row in range(first, first + 3)])
    every = [f"key-{row}" for row in range(6)]
    for asked in ([], ["none"], ["key-4"], every, every[::-1], ["key-3", "none", "key-0", "key-3"]):
        found = shards.rows(pl.Series(asked, dtype=pl.String))
        assert found.schema == {"row": pl.Int64}
        assert found["row"].to_list() == [None if key == "none" else int(key[4:]) for key in asked]


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "deep" / "file.txt"
    write_atomically(file, b"old")
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["file.txt"]


def test_what_a_killed_process_was_writing_is_removed_and_what_others_write_is_kept(tmp_path):
    dead, alive = (
        tmp_path / "tables" / f".0001.parquet.{uuid.uuid4().hex}.{pid}.tmp" for pid in (4194305, os.getppid())
    )
    dead.parent.mkdir()
    for file in (dead, alive):
        file.write_bytes(b"half")
    writing = "import os, sys; from resources.storage.files import *\nwith opened_atomically(sys.argv[1]): os._exit(1)"
    subprocess.run([sys.executable, "-c", writing, tmp_path / "file"], check=False)
    assert len(list(tmp_path.glob(".file.*.tmp"))) == 1
    remove_abandoned(tmp_path, "**/.*.tmp")
    assert list(tmp_path.rglob("*.tmp")) == [alive]


def test_leftovers_of_dead_processes_are_removed_and_live_ones_kept(tmp_path):
    place = tmp_path / "0001"
    dead, alive = tmp_path / ".0001.4194305.tmp", tmp_path / f".0001.{os.getppid()}.tmp"
    dead.mkdir()
    alive.mkdir()
    with temporary_directory_beside(place) as directory:
        (directory / "file").write_text("x")
    assert not dead.exists()
    assert alive.exists()
    assert not directory.exists()


def write_weights(text):
    def build(directory: Path):
        (directory / "merged").mkdir()
        (directory / "merged" / "model.safetensors").write_text(text)
        return "result"

    return build


def create(store, build, partition=None, asset="model_checkpoint"):
    """Runs `create` inside a real asset, as it is used."""
    made = {}

    @dg.asset(name=asset, io_manager_key="checkpoints", partitions_def=dg.StaticPartitionsDefinition(["0001", "0002"]))
    def checkpoint_asset(context: dg.AssetExecutionContext):
        made["it"], result = store.create(
            context, build, parents={}, trained_on={"pairs": "v1"}, settings={"beta": 2}, random_seed=1
        )
        assert result == "result"
        return made["it"]

    dg.materialize([checkpoint_asset], resources={"checkpoints": store}, partition_key=partition or "0001")
    return made["it"]


def test_a_checkpoint_has_a_manifest_and_is_found_again(tmp_path):
    store = CheckpointStore(str(tmp_path))
    made = create(store, write_weights("one"))
    assert store.current("model_checkpoint", "0001") == made
    assert made.manifest["trained_on"] == {"pairs": "v1"}
    assert made.manifest["libraries"]["trl"]
    assert made.manifest["run_id"]
    assert made.label == "model_checkpoint[0001]"
    store.verify(made)


def test_equal_weights_have_equal_shas_and_old_checkpoints_stay(tmp_path):
    store = CheckpointStore(str(tmp_path))
    first = create(store, write_weights("one"))
    assert create(store, write_weights("one")).sha == first.sha
    second = create(store, write_weights("two"))
    assert second.sha != first.sha
    assert store.current("model_checkpoint", "0001") == second
    store.verify(first)


def test_equal_weights_made_again_carry_the_manifest_of_the_newest_run(tmp_path):
    store = CheckpointStore(str(tmp_path))
    before = create(store, write_weights("one")).manifest
    after = create(store, write_weights("one")).manifest
    assert after["sha"] == before["sha"]
    assert after["run_id"] != before["run_id"]
    assert len(list(tmp_path.rglob("manifest.json"))) == 1


def test_a_failed_build_leaves_nothing(tmp_path):
    def fails(directory):
        (directory / "merged").mkdir()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        create(CheckpointStore(str(tmp_path)), fails)
    assert list(tmp_path.rglob("*.json")) == []
    assert list(tmp_path.rglob("merged")) == []


def test_damage_is_named(tmp_path):
    store = CheckpointStore(str(tmp_path))
    made = create(store, write_weights("one"))
    file = Path(made.weights) / "model.safetensors"
    file.write_text("0ne")
    with pytest.raises(DamageError, match=r"model_checkpoint\[0001\].*were altered"):
        store.verify(made)
    create(store, write_weights("one"))
    file.unlink()
    with pytest.raises(DamageError, match="is missing or has changed size"):
        store.current("model_checkpoint", "0001")
    (Path(made.directory) / "manifest.json").unlink()
    with pytest.raises(DamageError, match=r"no manifest\.json"):
        store.current("model_checkpoint", "0001")
    with pytest.raises(DamageError, match=r"model_checkpoint\[0002\] has no checkpoint"):
        store.current("model_checkpoint", "0002")


def with_adapter(text, log="{}"):
    def build(directory: Path):
        (directory / "adapter").mkdir()
        (directory / "adapter" / "adapter_model.safetensors").write_text(text)
        (directory / "trainer_log.jsonl").write_text(log)
        return write_weights("one")(directory)

    return build


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "trainer_log.jsonl"])
def test_damage_beside_the_weights_is_seen_too(tmp_path, name):
    store = CheckpointStore(str(tmp_path))
    made = create(store, with_adapter("one"))
    store.verify(made)
    (Path(made.directory) / name).write_text("0ne")
    with pytest.raises(DamageError, match=r"model_checkpoint\[0001\].*were altered"):
        store.verify(made)
    store.verify(create(store, with_adapter("one")))
    # Equal weights that another training made: what was kept of the first is what the manifest tells of.
    store.verify(create(store, with_adapter("one", log='{"step": 1}')))
    assert (Path(made.directory) / "trainer_log.jsonl").read_text() == "{}"


def test_files_that_somebody_puts_beside_the_weights_cost_no_checkpoint(tmp_path):
    store = CheckpointStore(str(tmp_path))
    made = create(store, write_weights("one"))
    for name in (".DS_Store", "merged/.DS_Store", "merged/model.gguf", "merged/notes.md", ".nfs0001"):
        (Path(made.directory) / name).write_text("x")
    store.verify(made)
    foreign = Path(made.weights) / "chat_template.jinja"
    foreign.write_text("x")
    with pytest.raises(FinalError, match=r"chat_template\.jinja lies beside the weights.*remove it"):
        store.verify(made)
    foreign.unlink()
    store.verify(made)
    assert create(store, write_weights("one")) == made


def test_materializing_a_damaged_checkpoint_again_makes_it_whole(tmp_path):
    store = CheckpointStore(str(tmp_path))
    made = create(store, write_weights("one"))
    (Path(made.weights) / "model.safetensors").write_text("0ne")
    store.verify(create(store, write_weights("one")))
    (Path(made.directory) / "manifest.json").unlink()
    store.verify(create(store, write_weights("one")))


def test_a_manifest_is_read_once_for_all_that_it_says(tmp_path, monkeypatch):
    made = create(CheckpointStore(str(tmp_path)), write_weights("one"))
    read, reads = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda file: reads.append(file.name) or read(file))
    assert made.manifest["settings"] == {"beta": 2}
    assert reads == ["manifest.json"]


def test_a_second_copy_of_the_weights_makes_no_other_model_of_it(nano_model, tmp_path):
    twice = shutil.copytree(nano_model, tmp_path / "model")
    shutil.copy(twice / "model.safetensors", twice / "consolidated.safetensors")
    assert weights_manifest(twice) == weights_manifest(nano_model)


def test_an_adopted_model_is_linked_and_not_copied(tmp_path):
    model, store = tmp_path / "model", CheckpointStore(str(tmp_path / "checkpoints"))
    model.mkdir()
    (model / "model.safetensors").write_text("M_0")

    @dg.asset(io_manager_key="checkpoints")
    def initial_policy(context: dg.AssetExecutionContext):
        return store.adopt(context, model, {"source": "directory"})

    for _ in range(2):
        assert dg.materialize([initial_policy], resources={"checkpoints": store}).success
    adopted = store.current("initial_policy", None)
    store.verify(adopted)
    assert (Path(adopted.weights) / "model.safetensors").resolve() == (model / "model.safetensors").resolve()
    (model / "model.safetensors").write_text("M_1")
    with pytest.raises(DamageError, match=r"initial_policy in .* were altered"):
        store.verify(adopted)


def table_asset(frame, **options):
    @dg.asset(io_manager_key="tables", **options)
    def some_table():
        return frame

    return some_table


def test_tables_come_back_equal_and_show_a_sample(tmp_path):
    asset = table_asset(SEED, dagster_type=frame_type(SeedPairs))
    tables = ParquetTables(str(tmp_path), "synpo trace {} --home 'my home'")
    result = dg.materialize([asset], resources={"tables": tables})
    assert pl.read_parquet(tmp_path / "some_table.parquet").equals(SEED)
    assert sorted(os.listdir(tmp_path)) == ["some_table.parquet", "some_table.parquet.xxh128"]
    metadata = result.asset_materializations_for_node("some_table")[0].metadata
    assert metadata["dagster/row_count"].value == 2
    row = metadata["sample"].records[0].data
    assert (row["prompt"], row["look_up"]) == ("a", f"synpo trace {SEED['prompt_id'][0]} --home 'my home'")
    assert "statistics" in metadata


def test_a_broken_table_is_never_written_and_its_bad_rows_are_shown(tmp_path):
    bad = SEED.with_columns(split=pl.Series(["train", "held_out"]))
    with pytest.raises(dg.DagsterTypeCheckDidNotPass) as error:
        dg.materialize([table_asset(bad, dagster_type=frame_type(SeedPairs))],
                       resources={"tables": ParquetTables(str(tmp_path))})  # fmt: skip
    assert "split: isin(['train', 'judge', 'scorer', 'dev', 'test']) fails on 'held_out' in row 1" in str(error.value)
    assert "'prompt': 'b'" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_lazy_tables_are_streamed(tmp_path):
    frame = pl.LazyFrame({"keyword_set_id": ["keywords-1"], "keywords": [["a", "b", "c"]], "paragraph": ["p"]})
    asset = table_asset(frame, dagster_type=frame_type(KeywordPool, pl.LazyFrame))

    @dg.asset
    def reader(some_table: pl.LazyFrame):
        assert isinstance(some_table, pl.LazyFrame)
        return some_table.collect().height

    result = dg.materialize([asset, reader], resources={"tables": ParquetTables(str(tmp_path))})
    assert result.output_for_node("reader") == 1


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(DamageError, match=r"of preference_pairs\[0001\] does not exist: materialize"):
        ParquetTables(str(tmp_path)).read("preference_pairs", "0001")


@pytest.mark.parametrize("change", [
    {"prompt": pl.Series([None, "b"], dtype=pl.String)}, {"prompt": pl.Series(["", "b"])},
    {"prompt_id": pl.Series(["prompt-1", "prompt-1"])}, {"line": pl.Series([0, 1])}, {"extra": pl.Series([1, 2])},
    {"line": pl.Series(["1", "2"])},
])  # fmt: skip
def test_schemas_refuse(change):
    assert check(SeedPairs, SEED) is None
    assert check(SeedPairs, SEED.with_columns(**change)) is not None


def test_every_column_is_described():
    schemas = [SeedPairs, KeywordPool, PreferencePairs]
    assert all(column.description for schema in schemas for column in column_schema(schema).columns)


def test_generated_text_reaches_the_ui_as_text_and_not_as_markup():
    shown = table_metadata(pl.DataFrame({"text": ["<script>alert(1)</script> | **x**"], "long": ["y" * 1000]}))
    assert shown.records[0].data["text"] == "<script>alert(1)</script> | **x**"
    assert len(shown.records[0].data["long"]) < 310
    assert json.dumps(shown.records[0].data)
