"""What is gone or damaged is seen, named, and made again as it was."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from resources.common.errors import DamageError
from resources.storage import files
from resources.storage import tables as storage_tables
from resources.storage.shards import Shards, checksum
from resources.storage.tables import ParquetTables
from synpo_assets.cli.healing import damaged_assets
from synpo_assets.graph.history import data_version_of
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.missing import missing_assets, missing_checks
from synpo_assets.graph.used_settings import used_in
from synpo_assets.stages.seed import initial_policy, seed_pairs
from tests.stand_ins import begun_run, run, services_in
from tests.stand_ins import instance as instance
from tests.test_loop import make, planned_check
from tests.test_stores import create, write_weights

MADE = [initial_policy, seed_pairs]


@pytest.fixture(scope="module")
def home(tmp_path_factory, nano_model):
    """A home in which M_0 and the seed pairs are made, with its services and history; each test leaves it as it was."""
    folder = tmp_path_factory.mktemp("home")
    services = services_in(folder)
    with dg.DagsterInstance.ephemeral() as history:
        run(MADE, history, services)
        yield folder, services, history


def flipped(content, generator):
    """Some bytes, one bit of which is another."""
    place = generator.randrange(8 * len(content))
    return content[: place // 8] + bytes([content[place // 8] ^ 1 << place % 8]) + content[place // 8 + 1 :]


def become_a_directory(file):
    file.unlink()
    (file / "inside").mkdir(parents=True)


def become_a_file(folder):
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def have_other_columns(file):
    ParquetTables(str(file.parents[1])).write(file.parent.name, file.stem, pl.DataFrame({"other": [1]}))


def edit_json(**changes):
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


ANY = random.Random(1)
TABLE, CHECKSUM, FIGURES = (
    "tables/seed_pairs.parquet",
    "tables/seed_pairs.parquet.xxh128",
    "metrics/seed_pairs/once.parquet",
)
POINTER, MANIFEST = "checkpoints/initial_policy/once.json", "checkpoints/initial_policy/once/*/manifest.json"
MERGED = "checkpoints/initial_policy/once/*/merged"
DIRECTORY, WEIGHTS = "checkpoints/initial_policy/once/*", "checkpoints/initial_policy/once/*/merged/model.safetensors"
DAMAGES = [
    *((place, damage) for place in (TABLE, FIGURES, POINTER, MANIFEST) for damage in (
        Path.unlink,
        become_a_directory,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
    )),
    (TABLE, lambda file: file.write_bytes(flipped(file.read_bytes(), ANY))),
    (CHECKSUM, lambda file: file.write_bytes(b"\xff")),
    (CHECKSUM, Path.unlink),
    *((POINTER, lambda file, text=text: file.write_text(text)) for text in ("{}", "[]", "null", '{"directory": "../.."}')),
    (POINTER, edit_json(asset="reward_model")),
    (POINTER, edit_json(sha="0" * 64)),
    (POINTER, edit_json(directory="reward_model/once/0123456789abcdef")),
    (MANIFEST, edit_json(files={})),
    (MANIFEST, edit_json(files=[])),
    (MANIFEST, edit_json(sha="0" * 64)),
    (MANIFEST, edit_json(asset="judge_model")),
    (MANIFEST, edit_json(parents={"start": {"asset": "reward_model"}})),
    (MANIFEST, lambda file: file.write_text(file.read_text()[:-2] + f', "number": {"9" * 5000}}}')),
    (CHECKSUM, become_a_directory),
    (FIGURES, have_other_columns),
    ("settings/seed_pairs/once.parquet", have_other_columns),
    (DIRECTORY, shutil.rmtree),
    (DIRECTORY, become_a_file),
    (MERGED, become_a_file),
    (WEIGHTS, Path.unlink),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("place", "damage"), DAMAGES)
def test_what_is_damaged_is_named_and_made_again_as_it_was(home, place, damage):
    folder, services, instance = home
    asset = "seed_pairs" if "seed_pairs" in place else "initial_policy"
    assert damaged_assets(instance, services, None) == {}
    version = data_version_of(instance, asset, None)
    damage(next(folder.glob(place)))
    damaged = damaged_assets(instance, services, None)
    assert list(damaged) == [asset]
    assert asset in missing_assets(instance, services, None, damaged)
    run(MADE, instance, services, selection=[asset])
    assert damaged_assets(instance, services, None) == {}
    assert data_version_of(instance, asset, None) == version
    assert not {"initial_policy", "seed_pairs"} & set(missing_assets(instance, services, None))


def test_a_pointer_to_what_the_history_does_not_know_is_damage(home):
    _, services, instance = home
    own = services.checkpoints.current("initial_policy", None)
    other = create(services.checkpoints, write_weights("other"), asset="initial_policy", partition="0001")
    services.checkpoints.point_to("initial_policy", None, other)
    assert "The history of initial_policy says" in damaged_assets(instance, services, None)["initial_policy"]
    services.checkpoints.point_to("initial_policy", None, own)


def flips_of(content, count):
    generator = random.Random(count)
    return (flipped(content, generator) for _ in range(count))


@pytest.mark.parametrize("flips", [20, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("height", [8, 256])
def test_no_flipped_bit_of_a_table_or_shard_is_read_as_data(tmp_path, said, flips, height):
    rows = pl.DataFrame(
        {"key": [f"key-{row}" for row in range(height)], "text": [f"tree {row} sea" * 9 for row in range(height)]}
    )
    tables, shards = ParquetTables(str(tmp_path)), Shards(str(tmp_path / "shards"), {}, "a test", rows.schema)
    tables.write("pairs", "0001", rows)
    shards.write(rows.to_dicts())
    table, (shard,) = tmp_path / "pairs" / "0001.parquet", list(shards.folder.glob("*.parquet"))
    for content in flips_of(table.read_bytes(), flips):
        table.write_bytes(content)
        for read in (lambda: tables.read("pairs", "0001"), lambda: tables.scan("pairs")):
            with pytest.raises(DamageError, match=r"pairs\[0001\] is not as it was written"):
                read()
    for content in flips_of(shard.read_bytes(), flips):
        shard.write_bytes(content)
        assert shards.rows(rows["key"])["text"].null_count() == height
    assert len(said) == flips


@pytest.mark.parametrize("flips", [5, pytest.param(400, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_weights_is_used(tmp_path, flips):
    services = services_in(tmp_path)
    made = create(services.checkpoints, write_weights("weights " * 99))
    file, manifest = Path(made.weights) / "model.safetensors", Path(made.directory) / "manifest.json"
    whole = file.read_bytes(), manifest.read_bytes()
    for number, content in enumerate(flips_of(whole[0], flips)):
        file.write_bytes(content)
        with pytest.raises(DamageError, match=r"model_checkpoint\[0001\] .* were altered"):
            services.checkpoints.of_run(f"run {number}").current("model_checkpoint", "0001")
        with pytest.raises(DamageError, match=r"holds no manifest\.json"):
            services.checkpoints.current("model_checkpoint", "0001")
        file.write_bytes(whole[0])
        manifest.write_bytes(whole[1])
    assert services.checkpoints.of_run("another run").current("model_checkpoint", "0001") == made


def test_weights_are_read_once_in_each_run(tmp_path, monkeypatch):
    services = services_in(tmp_path)
    create(services.checkpoints, write_weights("M_1"))
    read = []
    monkeypatch.setattr(files, "file_sha256", lambda path, real=files.file_sha256: read.append(path) or real(path))
    for run_id in ("one", "one", "another", None):
        services.checkpoints.of_run(run_id).current("model_checkpoint", "0001")
    assert len(read) == 2


@pytest.mark.parametrize("damage", [become_a_directory, lambda file: file.write_bytes(b"\xff")])
def test_a_mark_of_verification_that_cannot_be_read_says_nothing(tmp_path, damage):
    store = services_in(tmp_path).checkpoints
    made = create(store, write_weights("M_1"))
    damage(Path(made.directory) / "verified_by_run")
    assert store.of_run("one").current("model_checkpoint", "0001") == made
    assert (Path(made.directory) / "verified_by_run").read_text() == "one"


@pytest.mark.parametrize("damage", [
    become_a_directory, *(lambda file, text=text: file.write_bytes(text) for text in (b"[" * 100_000, b"\xff", b"{}\n5\n", b"{")),
])  # fmt: skip
def test_a_log_of_a_training_that_cannot_be_read_is_damage(tmp_path, damage):
    def build(directory):
        write_weights("M_1")(directory)
        (directory / "trainer_log.jsonl").write_text('{"step": 1}\n')
        return "result"

    store = services_in(tmp_path).checkpoints
    log = Path(create(store, build).directory) / "trainer_log.jsonl"
    assert store.training_log("model_checkpoint", "0001") == [{"step": 1}]
    damage(log)
    with pytest.raises(DamageError, match=r"trainer_log.jsonl of model_checkpoint\[0001\] is no log of a training"):
        store.training_log("model_checkpoint", "0001")


def test_metrics_and_settings_in_other_columns_are_damage(tmp_path):
    services = services_in(tmp_path)
    for store in (services.metrics, services.used_settings):
        ParquetTables(str(store._base_path)).write("promotion", "0001", pl.DataFrame({"other": [1]}))
    for read in (lambda: recorded(services.metrics, "0001"), lambda: used_in(services.used_settings, "0001")):
        with pytest.raises(DamageError, match=r"promotion\[0001\] is not as it was written"):
            read()
    assert services.metrics.set_damaged_aside()
    assert recorded(services.metrics, "0001").frame.is_empty()


# Reading it fails as a bad sector does.
BAD_SECTOR = "/proc/self/mem"


def test_a_file_that_the_disk_cannot_read_any_more_is_damage(tmp_path):
    tables, shards = (
        ParquetTables(str(tmp_path / "tables")),
        Shards(str(tmp_path), {"a": 1}, "a test", {"key": pl.String}),
    )
    tables.write("seed_pairs", None, pl.DataFrame({"prompt_id": ["prompt-1"]}))
    shards.write([{"key": "key-1"}])
    (shard,), table = shards.folder.glob("*.parquet"), tmp_path / "tables" / "seed_pairs.parquet"
    for file in (Path(shard), table):
        file.unlink()
        file.symlink_to(BAD_SECTOR)
    with pytest.raises(DamageError, match=r"seed_pairs cannot be read any more .Input/output error."):
        tables.read("seed_pairs", None)
    assert tables.set_damaged_aside()
    assert not table.is_symlink()
    for _ in range(2):
        assert shards.finished(pl.Series(["key-1"])).to_list() == []


def test_a_shard_of_other_settings_is_set_aside_and_an_earlier_versions_is_read(tmp_path):
    """Its keys hold neither checkpoint nor sampling; it lies there where homes were merged by hand."""
    mine, other = (Shards(str(tmp_path), {"temperature": each}, "a test", {"key": pl.String}) for each in (0, 9))
    for shards in (mine, other):
        shards.write([{"key": "key-1"}])
    (shard,) = other.folder.glob("*.parquet")
    (mine.folder / shard.name).write_bytes(shard.read_bytes())
    (own,) = [file for file in mine.folder.glob("*.parquet") if file.name != shard.name]
    own.rename(own.with_name(f"{checksum(own.read_bytes())}.parquet"))
    assert mine.finished(pl.Series(["key-1"])).to_list() == ["key-1"]
    assert [file.stem for file in mine.folder.glob("*.damaged")] == [shard.stem]


def test_a_shard_that_another_process_sets_aside_meanwhile_is_passed_over(tmp_path, monkeypatch):
    shards = Shards(str(tmp_path), {}, "a test", {"key": pl.String})
    shards.write([{"key": "key-1"}])
    (shard,) = shards.folder.glob("*.parquet")
    shard.write_bytes(b"damaged")
    real = type(shard).read_bytes

    def taken(file):
        content = real(file)
        file.unlink(missing_ok=True)
        return content

    monkeypatch.setattr(type(shard), "read_bytes", taken)
    assert shards.finished(pl.Series(["key-1"])).to_list() == []
    monkeypatch.setattr(type(shard), "read_bytes", lambda file: real(file.with_name("gone")))
    shards.write([{"key": "key-1"}])
    assert shards.finished(pl.Series(["key-1"])).to_list() == []


def test_a_directory_in_the_place_of_a_shard_is_set_aside(tmp_path):
    shards, keys = Shards(str(tmp_path), {}, "a test", {"key": pl.String, "row": pl.Int64}), pl.Series(["one"])
    shards.write([{"key": "one", "row": 1}])
    become_a_directory(next(shards.folder.glob("*.parquet")))
    assert shards.rows(keys).rows() == [(None,)]
    shards.write([{"key": "one", "row": 1}])
    assert shards.rows(keys).rows() == [(1,)]


def test_a_superseded_checkpoint_whose_manifest_was_altered_is_passed_over(tmp_path):
    store = services_in(tmp_path).checkpoints
    earlier, newest = (create(store, write_weights(name)) for name in ("M_1", "M_1 made anew"))
    assert store.with_sha("model_checkpoint", "") == sorted((earlier, newest), key=lambda made: made.sha)
    Path(earlier.directory, "manifest.json").write_bytes(b'{"sha": ')
    assert store.with_sha("model_checkpoint", "") == [newest]
    assert (store.manifest_of_sha(earlier.sha), store.manifest_of_sha(newest.sha)["sha"]) == (None, newest.sha)


def test_a_table_without_its_checksum_is_damaged(tmp_path):
    tables = ParquetTables(str(tmp_path))
    tables.write("pairs", "0001", pl.DataFrame({"a": [1]}))
    (tmp_path / "pairs" / "0001.parquet.xxh128").unlink()
    for look in (tables.read, tables.verify, tables.scan):
        with pytest.raises(DamageError, match=r"The checksum of the table .* of pairs\[0001\] is gone"):
            look("pairs", "0001")


def test_a_table_is_whole_at_every_moment_while_it_is_written_anew(tmp_path, monkeypatch):
    tables, fsync, checksum_file = ParquetTables(str(tmp_path)), os.fsync, storage_tables._checksum_file
    tables.write("pairs", "0001", pl.DataFrame({"a": [1]}))
    heights = []

    def read_first(file):
        heights.append(tables.read("pairs", "0001").height)
        fsync(file)

    monkeypatch.setattr("os.fsync", read_first)
    tables.write("pairs", "0001", pl.DataFrame({"a": [1, 2]}))
    assert heights == [1, 1, 2]
    monkeypatch.undo()

    def write_first(path):
        monkeypatch.undo()
        tables.write("pairs", "0001", pl.DataFrame({"a": [1, 2, 3]}))
        return checksum_file(path)

    monkeypatch.setattr(storage_tables, "_checksum_file", write_first)
    assert tables.read("pairs", "0001").height == 3


def test_a_table_that_another_one_lies_in_the_place_of_is_refused_though_its_hash_came_with_it(tmp_path):
    tables = ParquetTables(str(tmp_path))
    for asset, partition in (("pairs", "0001"), ("pairs", "0002"), ("others", "0001")):
        tables.write(asset, partition, pl.DataFrame({"a": [len(asset), int(partition)]}))
    before = tables.read("pairs", "0001")
    for place in ("pairs/0002", "others/0001"):
        for end in (".parquet", ".parquet.xxh128"):
            shutil.copy(tmp_path / f"pairs/0001{end}", tmp_path / f"{place}{end}")
        label = f"{place.replace('/', '[')}]"
        for look in (tables.read, tables.verify, tables.scan):
            with pytest.raises(DamageError, match=re.escape(f"of {label} lies that of pairs[0001]")):
                look(*place.split("/"))
    # As metrics name what is made once.
    tables.write("seed", "once", before)
    assert_frame_equal(tables.read("seed", "once"), before)
    assert tables.set_damaged_aside()
    assert (tables.partitions("pairs"), tables.partitions("others")) == (["0001"], [])
    # As earlier versions wrote it.
    checksum = tmp_path / "pairs/0001.parquet.xxh128"
    checksum.write_text(checksum.read_text().replace("pairs[0001]", "0001.parquet"))
    assert_frame_equal(tables.read("pairs", "0001"), before)


@pytest.mark.parametrize("again", ["0001", "0002"])
def test_a_training_on_pairs_that_were_made_again_is_made_again(tmp_path, instance, again):
    """Also where they are of an iteration before."""
    services = services_in(tmp_path)
    learned = {f"preference_pairs[{key}]": "as then" for key in ("0001", "0002")}
    make(instance, services, partition="0002", trained_on=learned)
    for key, version in (("0001", "as then"), ("0002", "as then"), (again, "made again")):
        assert "model_checkpoint" not in missing_assets(instance, services, "0002")
        tags = {"dagster/data_version": version}
        instance.report_runless_asset_event(dg.AssetMaterialization("preference_pairs", partition=key, tags=tags))
    missing = missing_assets(instance, services, "0002")
    assert {"model_checkpoint", "preference_history", "evaluation"} <= set(missing)
    assert "preference_pairs" not in missing


def test_a_training_whose_check_was_killed_is_checked_and_not_made_again(tmp_path, instance):
    services = services_in(tmp_path)
    make(instance, services)
    assert "model_checkpoint" not in missing_assets(instance, services, "0001")
    killed = begun_run(instance, dg.DagsterRunStatus.STARTED)
    key = dg.AssetCheckKey(dg.AssetKey("model_checkpoint"), "finite_weights")
    instance.event_log_storage.store_event(planned_check(killed, key, "0001"))
    assert key not in missing_checks(instance, services, "0001"), "its run is alive"
    instance.report_run_failed(killed)
    assert key in missing_checks(instance, services, "0001")
    assert "model_checkpoint" not in missing_assets(instance, services, "0001")
