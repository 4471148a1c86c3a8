"""Artifacts in an object store and history in PostgreSQL, against real servers on the loopback interface."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import fsspec
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner
from upath import UPath

from resources.common.errors import DamageError, FinalError
from resources.generation.language_model import LanguageModel
from resources.settings.files import load_settings
from resources.settings.machine import Engine, Storage
from resources.settings.method import Sampling
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.files import opened_atomically, storage_root, write_atomically
from resources.storage.tables import ParquetTables
from synpo_assets.cli.commands import app
from synpo_assets.cli.home import PROJECT, STORAGE_COMMENT, prepare_home
from synpo_assets.cli.preflight import check_storage
from tests.conftest import synpo
from tests.nano import nano_settings, write_settings
from tests.test_stores import SEED, create, table_asset, with_adapter, write_weights
from tests.ui import processes_of, running_ui, wait_for

pytestmark = pytest.mark.slow

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
PASSWORD = "not the default"
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def object_store(environment):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    environment.setenv("AWS_ACCESS_KEY_ID", "key")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield
    server.stop()


@pytest.fixture
def bucket(object_store) -> UPath:
    bucket = storage_root(f"s3://bucket-{next(NUMBERS)}")
    bucket.mkdir()
    return bucket


@pytest.fixture(scope="module")
def postgres(environment):
    """A PostgreSQL server that asks for a password, and the URL of it without one."""
    if not POSTGRES:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    programs = POSTGRES[-1].parent
    # The server refuses to work for root, and pytest's own directories are closed to anybody else.
    account, groups = ("postgres", []) if os.getuid() == 0 else (None, None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="synpo-postgres-") as place:
        secret, data = Path(place) / "password", Path(place) / "data"
        secret.write_text(PASSWORD)
        if account:
            shutil.chown(place, account)
            shutil.chown(secret, account)

        def server(*command: str) -> None:
            subprocess.run(
                command,
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=place,
                user=account,
                group=account,
                extra_groups=groups,
            )

        server(str(programs / "initdb"), "-D", str(data), "-U", "synpo", "-A", "scram-sha-256", "--pwfile", str(secret))
        control = [str(programs / "pg_ctl"), "-D", str(data), "-w"]
        server(*control, "-l", f"{place}/log", "-o", f"-h 127.0.0.1 -p {port} -k {place}", "start")
        environment.setenv("PGPASSWORD", PASSWORD)
        try:
            yield f"postgresql://synpo@127.0.0.1:{port}"
        finally:
            server(*control, "-m", "fast", "stop")


@pytest.fixture
def database(postgres) -> str:
    import psycopg2

    name = f"experiment_{next(NUMBERS)}"
    connection = psycopg2.connect(f"{postgres}/postgres")
    connection.autocommit = True
    connection.cursor().execute(f"CREATE DATABASE {name}")
    connection.close()
    return f"{postgres}/{name}"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A new home; what `prepare_home` puts into the environment is taken back afterwards."""
    for name in ("SYNPO_HOME", "DAGSTER_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def names_in(folder: UPath) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_tables_go_through_an_object_store(bucket):
    tables = ParquetTables(str(bucket / "tables"))

    @dg.asset
    def reader(some_table: pl.DataFrame):
        assert some_table.equals(SEED)

    @dg.asset
    def lazy_reader(some_table: pl.LazyFrame):
        assert some_table.select("prompt").filter(pl.col("prompt") == "b").collect().height == 1

    assert dg.materialize([table_asset(SEED), reader, lazy_reader], resources={"tables": tables}).success
    assert dg.materialize([table_asset(SEED.lazy()), reader, lazy_reader], resources={"tables": tables}).success
    tables.write("preference_history", "0002", SEED)
    tables.write("preference_history", "0002", SEED.head(1))
    assert tables.read("preference_history", "0002").equals(SEED.head(1))
    assert names_in(bucket / "tables" / "preference_history") == ["0002.parquet", "0002.parquet.xxh128"]
    with pytest.raises(DamageError, match=r"s3://.*of preference_pairs\[0001\] does not exist: materialize"):
        tables.read("preference_pairs", "0001")


def test_what_another_process_writes_after_a_look_is_seen(bucket, tmp_path):
    tables = ParquetTables(str(bucket / "tables"))
    tables.write("keyword_sets", "0001", SEED)
    assert len(tables.of_partition("0001")) == 1
    ParquetTables(str(tmp_path / "elsewhere")).write("evaluation", "0001", SEED)
    elsewhere = fsspec.filesystem("s3", skip_instance_cache=True)
    for name in ("0001.parquet", "0001.parquet.xxh128"):
        elsewhere.put(str(tmp_path / "elsewhere/evaluation" / name), str(bucket / "tables/evaluation" / name))
    assert len(tables.of_partition("0001")) == 2
    assert tables.read("evaluation", "0001").equals(SEED)


def test_a_write_that_fails_leaves_the_earlier_file(bucket):
    def stop_in_the_middle():
        with opened_atomically(bucket / "table.parquet") as file:
            file.write(b"half")
            raise RuntimeError

    write_atomically(bucket / "table.parquet", b"whole")
    with pytest.raises(RuntimeError):
        stop_in_the_middle()
    assert (bucket / "table.parquet").read_bytes() == b"whole"
    assert names_in(bucket) == ["table.parquet"]


def test_a_checkpoint_is_found_from_another_machine(bucket, tmp_path):
    made = create(CheckpointStore(str(bucket / "checkpoints"), str(tmp_path / "here")), write_weights("one"))
    there = CheckpointStore(str(bucket / "checkpoints"), str(tmp_path / "there"))
    found = there.current("model_checkpoint", "0001")
    assert (found.sha, found.manifest) == (made.sha, made.manifest)
    assert (Path(found.weights) / "model.safetensors").read_text() == "one"
    assert found.directory.startswith(str(tmp_path / "there"))
    there.verify(found)
    there.point_to("policy", "0002", found)
    assert there.current("policy", "0002") == found


def test_m0_is_uploaded_so_that_other_machines_have_it(bucket, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("M_0")
    store = CheckpointStore(str(bucket), str(tmp_path / "here"))

    @dg.asset(io_manager_key="checkpoints")
    def initial_policy(context: dg.AssetExecutionContext):
        return store.adopt(context, tmp_path / "model", {"source": "directory"})

    assert dg.materialize([initial_policy], resources={"checkpoints": store}).success
    shutil.rmtree(tmp_path / "model")
    found = CheckpointStore(str(bucket), str(tmp_path / "there")).current("initial_policy", None)
    assert (Path(found.weights) / "model.safetensors").read_text() == "M_0"
    # The machine that made it lost the files that its cache points to, and fetches them.
    assert (Path(store.current("initial_policy", None).weights) / "model.safetensors").read_text() == "M_0"


def test_a_damaged_checkpoint_in_the_bucket_is_refused_and_made_whole_again(bucket, tmp_path):
    store = CheckpointStore(str(bucket), str(tmp_path / "here"))
    made = create(store, write_weights("one"))
    stored = bucket / "model_checkpoint" / "0001" / made.sha[:16]
    (stored / "merged" / "model.safetensors").write_text("0ne")
    with pytest.raises(DamageError, match=r"model_checkpoint\[0001\] in s3://.* were altered"):
        store.verify(made)
    # What is known to be damaged has no manifest any more.
    with pytest.raises(DamageError, match=r"holds no manifest.json, so no finished checkpoint"):
        CheckpointStore(str(bucket), str(tmp_path / "there")).current("model_checkpoint", "0001")
    assert not list((tmp_path / "there").rglob("*.safetensors"))
    create(store, write_weights("one"))
    (stored / "merged" / "model.safetensors").unlink()
    with pytest.raises(DamageError, match=r"s3://.*model.safetensors .* is missing or has changed size"):
        store.current("model_checkpoint", "0001")
    store.verify(create(store, write_weights("one")))


def test_a_damaged_copy_is_fetched_again(bucket, tmp_path):
    store = CheckpointStore(str(bucket), str(tmp_path))
    made = create(store, write_weights("one"))
    file = Path(made.weights) / "model.safetensors"
    file.write_text("0ne")
    store.verify(made)
    assert file.read_text() == "one"
    file.unlink()
    store.current("model_checkpoint", "0001")
    assert file.read_text() == "one"


def test_equal_weights_of_two_machines_keep_what_lies_beside_them_in_each_place(bucket, tmp_path):
    for machine, log in (("here", "{}"), ("there", '{"step": 1}')):
        store = CheckpointStore(str(bucket), str(tmp_path / machine))
        made = create(store, with_adapter("one", log))
        store.verify(made)
    stored = bucket / "model_checkpoint" / "0001" / made.sha[:16]
    assert (stored / "trainer_log.jsonl").read_text() == "{}"
    elsewhere = CheckpointStore(str(bucket), str(tmp_path / "elsewhere"))
    elsewhere.verify(elsewhere.current("model_checkpoint", "0001"))
    (stored / "adapter" / "adapter_model.safetensors").write_text("0ne")
    with pytest.raises(DamageError, match=r"in s3://.* were altered"):
        elsewhere.verify(elsewhere.current("model_checkpoint", "0001"))


def test_what_somebody_put_into_the_cache_is_refused_as_it_would_be_loaded(bucket, tmp_path):
    store = CheckpointStore(str(bucket), str(tmp_path))
    made = create(store, write_weights("one"))
    (Path(made.weights) / "chat_template.jinja").write_text("x")
    with pytest.raises(FinalError, match=r"chat_template\.jinja lies beside the weights"):
        store.verify(made)


def test_half_an_upload_is_no_checkpoint(bucket, tmp_path, monkeypatch):
    store, put_file = CheckpointStore(str(bucket), str(tmp_path / "here")), bucket.fs.put_file

    def breaks_before_the_end(local, remote):
        if remote.endswith("manifest.json"):
            raise OSError("the network is gone")
        put_file(local, remote)

    with monkeypatch.context() as broken:
        broken.setattr(bucket.fs, "put_file", breaks_before_the_end)
        with pytest.raises(OSError, match="the network is gone"):
            create(store, write_weights("one"))
    assert [file.name for file in bucket.glob("*/*/*/*/*")] == ["model.safetensors"]
    with pytest.raises(DamageError, match=r"model_checkpoint\[0001\] has no checkpoint in s3://"):
        store.current("model_checkpoint", "0001")
    made = create(store, write_weights("one"))
    assert CheckpointStore(str(bucket), str(tmp_path / "there")).current("model_checkpoint", "0001").sha == made.sha
    (bucket / "model_checkpoint" / "0001" / made.sha[:16] / "manifest.json").unlink()
    with pytest.raises(DamageError, match=r"s3://.* holds no manifest\.json"):
        store.current("model_checkpoint", "0001")


def test_finished_shards_are_found_in_the_bucket(bucket, nano_checkpoint):
    asked = [(str(number), [{"role": "user", "content": f"Question {number}?"}]) for number in range(5)]
    model = LanguageModel(
        shards=str(bucket / "shards"), engine=Engine(threads=1, shard_rows=2, dtype="float32"), random_seed=1
    )
    sampling = Sampling(max_new_tokens=4)
    first, usage = model.answer(nano_checkpoint, asked[:3], sampling)
    assert usage.reused == 0
    everything, usage = model.answer(nano_checkpoint, asked, sampling)
    assert usage.reused == 3
    assert everything.head(3).equals(first)


def settings_with(tmp_path: Path, **storage: str) -> Settings:
    return load_settings(write_settings(tmp_path / "mine.yaml", {"preset": "laptop", "storage": storage}))


@pytest.mark.parametrize(("storage", "sentence"), [
    ({"artifacts": "s4://bucket/x"}, r"`storage.artifacts`: 's4://bucket/x' is not a URL that fsspec knows: write it as s3:"),
    ({"artifacts": "bucket/x"}, "is not a URL that fsspec knows"),
    ({"artifacts": "s3://"}, "is not a URL that fsspec knows"),
    ({"dagster_database": "mysql://u:secret@h/d"}, "`storage.dagster_database`: This is not the URL of a PostgreSQL database"),
])  # fmt: skip
def test_wrong_urls_are_refused_at_once(tmp_path, storage, sentence):
    with pytest.raises(SettingsError, match=sentence) as error:
        settings_with(tmp_path, **storage)
    assert "secret" not in str(error.value)


def test_a_bucket_that_is_not_there_ends_in_one_sentence(object_store):
    with pytest.raises(SettingsError, match=r"s3://absent/x \(storage\.artifacts\) cannot be written to: .*bucket"):
        check_storage(Storage(artifacts="s3://absent/x", dagster_database=None))


@pytest.fixture
def closed_store(monkeypatch) -> Iterator[None]:
    """An object store that refuses every connection."""
    from s3fs import S3FileSystem

    address = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    for name, value in (address | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
        monkeypatch.setenv(name, value)
    # Opened file systems keep the address that they were opened with.
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("command", [["run"], ["trace", "pair-1"], ["clean"], ["ui"]])
def test_a_home_whose_artifacts_cannot_be_reached_ends_the_command_in_one_sentence(closed_store, tmp_path, command):
    write_settings(tmp_path / "settings.yaml", {"preset": "laptop", "storage": {"artifacts": "s3://any/x"}})
    result = CliRunner().invoke(app, [*command, "--home", str(tmp_path)])
    assert result.exit_code == 2, result.output
    assert "synpo: s3://any/x (storage.artifacts) cannot be written to: Could not connect" in result.stderr


def test_artifacts_of_an_earlier_version_are_refused_and_left_as_they_are(bucket):
    table = bucket / "tables" / "seed_pairs.parquet"
    table.write_bytes(b"")
    storage = Storage(artifacts=str(bucket), dagster_database=None)
    with pytest.raises(SettingsError, match=rf"The home {bucket} was made by an earlier version of SynPO"):
        check_storage(storage)
    assert (names_in(bucket), names_in(bucket / "tables")) == (["tables"], ["seed_pairs.parquet"])
    (bucket / "metrics" / "seed_pairs" / "once.parquet").write_bytes(b"")
    check_storage(storage)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dagster_postgres", None)
    with pytest.raises(SettingsError, match=r"needs dagster_postgres.*pip install 'synpo\[postgres\]'"):
        check_storage(Storage(artifacts=None, dagster_database="postgresql://user@localhost/x"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SettingsError, match=r"s3a://x \(storage\.artifacts\).*pip install 'synpo\[s3\]'"):
        check_storage(Storage(artifacts="s3a://x", dagster_database=None))


def test_no_driver_is_imported_where_nothing_needs_it():
    drivers = ["boto3", "botocore", "dagster_postgres", "psycopg2", "s3fs"]
    code = f"import sys, definitions, synpo_assets.cli.preflight; print([name for name in {drivers} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert result.stdout.strip() == "[]"


def test_an_unreachable_database_ends_the_command_in_one_sentence(tmp_path):
    settings = {"preset": "laptop", "storage": {"dagster_database": "postgresql://user@127.0.0.1:1/history"}}
    file = write_settings(tmp_path / "mine.yaml", settings)
    result = CliRunner().invoke(app, ["run", "--settings", str(file), "--home", str(tmp_path / "home")])
    assert result.exit_code == 2
    assert "synpo: The database of storage.dagster_database cannot be used: connection to server" in result.stderr
    assert not (tmp_path / "home").exists()


def test_what_exists_answers_the_check(bucket, database):
    check_storage(Storage(artifacts=str(bucket / "experiment"), dagster_database=database))
    assert names_in(bucket) == []


def test_the_configuration_follows_the_setting_and_keeps_what_a_user_wrote(home):
    plain, url = settings_with(home), "postgresql://synpo@localhost/history"
    prepare_home(home, plain)
    file = home / "dagster.yaml"
    original = file.read_text()
    file.write_text(original + "\n# mine\nretention:\n  schedule:\n    purge_after_days: 30\n")
    edited = file.read_text()
    prepare_home(home, plain)
    assert file.read_text() == edited
    for _ in range(2):
        prepare_home(home, settings_with(home, dagster_database=url))
        configuration = yaml.safe_load(file.read_text())
        assert configuration["storage"] == {"postgres": {"postgres_url": url.replace(":", "+psycopg2:", 1)}}
        assert file.read_text().startswith(edited.rstrip())
        assert file.read_text().count(STORAGE_COMMENT) == 1
    prepare_home(home, plain)
    assert file.read_text() == edited


def test_a_storage_block_of_the_users_own_is_replaced_only_by_the_setting(home):
    file = home / "dagster.yaml"
    file.write_text("telemetry:\n  enabled: false\nstorage:\n  sqlite:\n    base_dir: /somewhere")
    prepare_home(home, settings_with(home))
    assert yaml.safe_load(file.read_text())["storage"] == {"sqlite": {"base_dir": "/somewhere"}}
    prepare_home(home, settings_with(home, dagster_database="postgresql://localhost/x"))
    assert file.read_text().count("storage:") == 1
    assert yaml.safe_load(file.read_text())["telemetry"] == {"enabled": False}


def test_history_is_kept_in_postgres(home, database):
    prepare_home(home, settings_with(home, dagster_database=database))

    @dg.asset
    def some_asset():
        return dg.MaterializeResult(metadata={"rows": 7})

    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert dg.materialize([some_asset], instance=instance).success
    with dg.DagsterInstance.from_config(str(home)) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("some_asset"))
        assert event.asset_materialization.metadata["rows"].value == 7
    assert list(home.rglob("*.db")) == []


def test_what_a_killed_ui_had_at_work_is_reported_in_postgres(home, database, nano_model):
    """There the next `synpo ui` takes no run for dead: it may be that of another machine."""
    values = nano_settings(nano_model) | {"storage": {"dagster_database": database}}
    prepare_home(home, load_settings(write_settings(home / "mine.yaml", values)))
    with running_ui(home) as ui:
        ui.launch(None, ["initial_policy", "seed_pairs", "keyword_pool", "prompt_generator"])
        wait_for(lambda: any("forkserver" in command for command in processes_of(home).values()), 60)
        (daemon,) = [number for number, command in processes_of(home).items() if "dagster._daemon run" in command]
        os.kill(daemon, signal.SIGKILL)
        wait_for(lambda: not processes_of(home), 20)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        (run,) = instance.get_runs()
        assert run.is_failure_or_canceled


def test_an_iteration_with_both_and_the_next_one_from_another_home(tmp_path, nano_model, bucket, database):
    storage = {"artifacts": str(bucket / "experiment"), "dagster_database": database}
    file = write_settings(tmp_path / "nano.yaml", nano_settings(nano_model) | {"storage": storage})
    first, other = tmp_path / "first", tmp_path / "other"
    result = synpo("run", "--settings", file, "--home", first)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{storage['artifacts']}/tables/preference_pairs/0001.parquet" in result.stdout
    root = UPath(storage["artifacts"])
    assert {"evaluation", "keyword_pool.parquet", "preference_pairs"} <= set(names_in(root / "tables"))
    assert {"initial_policy", "model_checkpoint", "policy"} <= set(names_in(root / "checkpoints"))
    assert list(root.glob("shards/*/*.parquet"))
    assert not any((first / folder).exists() for folder in ("tables", "checkpoints", "shards"))
    assert list(first.rglob("*.db")) == []

    def runs() -> list[str | None]:
        with dg.DagsterInstance.from_config(str(first)) as instance:
            return [run.tags.get("dagster/partition") for run in instance.get_runs()]

    assert sorted(runs(), key=str) == ["0001", None]
    again = synpo("run", "--home", first)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(runs()) == 2
    result = synpo("run", "--settings", file, "--home", other, "--iterations", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    # The page of the report is the home's own, and this one has none yet.
    assert sorted(runs(), key=str) == ["0001", "0001", "0002", None]
    assert list(other.glob("cache/checkpoints/model_checkpoint/0001/*/manifest.json"))
