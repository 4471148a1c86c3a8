"""Publishing: what the folders hold, what the cards say, where it goes, and that nothing is published unasked."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import polars as pl
import pytest

from definitions import build
from resources.common.errors import FinalError
from resources.settings.files import load_settings
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import CheckpointStore
from synpo_assets.cli.automation import ALL_ASSETS_JOB, next_iteration
from synpo_assets.graph.metrics import Metric, Metrics, record, recorded
from synpo_assets.graph.missing import asset_names, missing_assets
from synpo_assets.graph.services import USED_SETTINGS
from synpo_assets.publishing.cards import TAGS, metrics_table, without_folder
from synpo_assets.publishing.published import _adapter_of, published_dataset, published_model
from synpo_assets.reports.rows import DIFFERING, Row
from tests.conftest import HOME
from tests.nano import active_settings, nano_settings, write_settings
from tests.stand_ins import run, services_in, shown
from tests.test_report import WRITER, make_iteration

PUBLISHED = {"published_dataset", "published_model"}
OPT_IN = PUBLISHED | {"benchmark_scores", "benchmark_answers"}


@pytest.fixture(scope="module")
def instance():
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture(scope="module")
def home(tmp_path_factory, instance, nano_model):
    """Two stand-in iterations, and M_0."""
    home = tmp_path_factory.mktemp("home")
    services = services_in(home)

    @dg.asset(io_manager_key="checkpoints")
    def initial_policy(context: dg.AssetExecutionContext):
        return services.checkpoints.adopt(context, nano_model, {"source": "directory", "name": str(nano_model)})

    run([initial_policy], instance, services)
    for iteration in (1, 2):
        make_iteration(instance, services, iteration)
        for asset in ("synthetic_prompts", "base_responses"):
            services.tables.write(asset, f"000{iteration}", pl.DataFrame({"checkpoint_sha": [WRITER]}))
    return home


@pytest.fixture
def publish(home, instance, tmp_path, nano_model):
    """Materializes one of the two assets with settings of the section `publishing`."""

    def made(stage, partition=None, **options):
        settings = load_settings(
            write_settings(tmp_path / "mine.yaml", nano_settings(nano_model) | {"publishing": options})
        )
        return materialize(stage, instance, services_in(home, settings), partition)

    return made


def materialize(stage, instance, services, partition=None):
    asset = stage.asset(services.settings, {}, [])
    source = dg.AssetSpec("model_checkpoint", partitions_def=asset.partitions_def).with_io_manager_key("checkpoints")
    assert run([asset, source], instance, services, partition).success
    return shown(instance, stage.name, partition)


def names(folder: Path):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_a_dry_run_is_the_default_and_writes_a_folder_that_datasets_loads(publish, home, tmp_path):
    import datasets

    about = publish(published_dataset)
    folder = home / "published" / "preference_pairs"
    assert about["published_to"] == "nowhere (dry run)"
    assert about["path"] == str(folder)
    assert names(folder) == ["README.md", "data/iteration-0001.parquet", "data/iteration-0002.parquet"]
    listed = {record.data["file"]: record.data["bytes"] for record in about["files"].records}
    assert listed == {name: (folder / name).stat().st_size for name in names(folder)}
    assert about["card"] == (folder / "README.md").read_text()
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == about["rows"] == 10
    stored = pl.concat([pl.read_parquet(home / "tables" / "preference_pairs" / f"000{n}.parquet") for n in (1, 2)])
    assert pl.DataFrame(loaded.to_list(), schema=stored.schema).sort("pair_id").equals(stored.sort("pair_id"))


def test_the_card_of_the_pairs_says_how_they_were_made(publish):
    from huggingface_hub import DatasetCard

    card = DatasetCard(publish(published_dataset, license="apache-2.0", dataset_repository="an-org/pairs")["card"])
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["size_categories"] == "n<1K"
    assert data["annotations_creators"] == "machine-generated"
    assert set(TAGS) <= set(data["tags"])
    for word in (
        "synthetic and was not reviewed by people", 'load_dataset("an-org/pairs"', "`nano`", "0123456789abcdef-and-more",
        "| 0002 | chosen |", "unparsable | 19 | 19 |", "near duplicate | 1 | 1 |", "preference_pairs: margin | 5 | 5 |",
        "margin_threshold: -100", "trl 1.", "| **Held-out** | | |", '"pair_id": "pair_id-2-2"', "a reward model trained from M_0",
    ):  # fmt: skip
        assert word in card.text, word


def test_the_card_of_the_pairs_names_each_judge_of_the_held_out_figures(publish, home, instance):
    from synpo_assets.reports.boosting_report import read_iteration
    from synpo_assets.reports.rows import judge_labels

    iterations = [read_iteration(instance, services_in(home), key) for key in ("0001", "0002")]
    card = publish(published_dataset)["card"]
    assert judge_labels(iterations)
    for label in judge_labels(iterations):
        assert f"{label}, over M_0" in card


def test_only_finished_iterations_are_published(publish, home, instance):
    make_iteration(instance, services_in(home), 3, without=("evaluation",))
    assert publish(published_dataset)["iterations"] == "0001, 0002"
    with pytest.raises(
        FinalError, match=r"^model_checkpoint\[0003\] was not evaluated since it was made, or its pairs"
    ):
        publish(published_model, "0003")


def test_cards_say_what_people_read(publish, home):
    from huggingface_hub import DatasetCard

    services = services_in(home)
    ids = services.tables.read("preference_pairs", "0001")["pair_id"]
    # Of a pair that a filter dropped, too.
    said = pl.DataFrame({"pair_id": [ids[0], ids[1], "another"], "outcome": ["confirmed", "flipped", "flipped"]})
    services.tables.write("pair_verdicts", "0001", said)
    unread = publish(published_dataset)["card"]
    made = recorded(services.metrics, "0001").frame.filter(asset="preference_pairs")
    as_people_want = [*Metrics(made).every("dropped"), Metric("dropped", 1, of="people")]
    kept = (home / "metrics" / "preference_pairs" / "0001.parquet").read_bytes()
    record(services.metrics, "preference_pairs", "0001", as_people_want)
    try:
        pairs, model = publish(published_dataset)["card"], publish(published_model, "0002")["card"]
    finally:
        services.metrics.write("preference_pairs", "0001", pl.read_parquet(io.BytesIO(kept)))
    assert "**Everything here is synthetic and was not reviewed by people.**" in unread
    assert "flipped" not in unread
    assert "expert-generated" in DatasetCard(pairs).data.to_dict()["annotations_creators"]
    for card in (pairs, model):
        assert "People read 2 of the pairs: they confirmed 1 and flipped 1." in card
    assert "**Everything here is synthetic, and people reviewed a part of it.**" in pairs
    assert "Then the sides of the pairs that people flipped were exchanged" in pairs
    assert "synthetic, people reviewed a part of it, and this model was not reviewed by people**." in model
    assert "not reviewed by people" not in pairs


def test_a_card_does_not_tell_where_files_lie(publish, home, instance, tmp_path, nano_model):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "read.csv").write_text("pair_id,verdict\n")
    values = nano_settings(nano_model)
    values["preferences"] |= {"reviewed": "private/read.csv"}
    values["prompt_generator"]["sampling"] |= {"stop": ["/end"]}
    settings = load_settings(write_settings(tmp_path / "mine.yaml", values))
    card = materialize(published_dataset, instance, services_in(home, settings))["card"]
    assert "reviewed: read.csv" in card
    assert "private" not in card
    assert "- /end" in card
    assert without_folder("/home/a/private/rm") == "rm"
    assert without_folder("an-org/model") == "an-org/model"


def test_a_card_says_how_iterations_differ_and_names_no_place():
    rows = [
        Row(DIFFERING, "preferences.reviewed", ("/home/a/b.csv", "null")),
        Row(DIFFERING, "judge.server.url", ("http://inside:1", "http://inside:2")),
        Row(DIFFERING, "response_improver.samples", ("1", "4")),
    ]
    assert metrics_table(rows, ["0001", "0002"]).splitlines()[3:] == [
        "| preferences.reviewed | b.csv | null |",
        "| response_improver.samples | 1 | 4 |",
    ]


def test_the_card_of_pairs_says_that_settings_differ_between_iterations(publish, home):
    told = "Settings differ between iterations, as the first rows of the table below say"
    assert told not in publish(published_dataset)["card"]
    for key, samples in (("0001", "1"), ("0002", "4")):
        rows = [("best_rewrites", "response_improver.samples", samples)]
        used = pl.DataFrame(rows, schema=USED_SETTINGS, orient="row")
        services_in(home).used_settings.write("best_rewrites", key, used)
    card = publish(published_dataset)["card"]
    assert told in card
    assert "| response_improver.samples | 1 | 4 |" in card


def test_without_a_finished_iteration_there_is_nothing_to_publish(tmp_path, nano_model):
    settings = load_settings(write_settings(tmp_path / "mine.yaml", nano_settings(nano_model)))
    with (
        dg.DagsterInstance.ephemeral() as empty,
        pytest.raises(FinalError, match="No iteration is finished, so there are no pairs to publish"),
    ):
        materialize(published_dataset, empty, services_in(tmp_path, settings))
    assert not (tmp_path / "published").exists()


def test_a_model_says_what_it_was_made_from(publish, home):
    from huggingface_hub import ModelCard

    options = {"model_repository": "an-org/model", "dataset_repository": "an-org/pairs"}
    about = publish(published_model, "0002", **options)
    folder = home / "published" / "model_checkpoint" / "0002"
    assert names(folder) == ["README.md", "manifest.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "M_2"
    card = ModelCard(about["card"])
    assert card.data.to_dict()["datasets"] == "an-org/pairs"
    words = (
        "an-org/model-iteration-2",
        "model_checkpoint[0002]",
        about["sha"],
        "not reviewed by people",
        "| M_1 | M_2 |",
    )
    for word in words:
        assert word in card.text, word
    assert "| | M_1 |\n" in publish(published_model, "0001")["card"], "it says nothing of later iterations"


def test_a_directory_stands_in_for_the_hub(publish, home, tmp_path):
    target = tmp_path / "published here"
    about = publish(published_dataset, directory=str(target), dry_run=False)
    assert about["published_to"] == str(target / "preference_pairs")
    assert names(target / "preference_pairs") == names(home / "published" / "preference_pairs")
    (target / "preference_pairs" / "data" / "iteration-0009.parquet").write_text("of an earlier experiment")
    publish(published_dataset, directory=str(target), dry_run=False)
    assert names(target / "preference_pairs") == names(home / "published" / "preference_pairs")
    publish(published_model, "0001", directory="published here", dry_run=False)
    assert names(target / "model_checkpoint" / "0001") == ["README.md", "manifest.json", "model.safetensors"]
    assert not list(target.rglob("*.tmp"))
    assert not list((home / "published").rglob("*.tmp"))


def test_a_dry_run_leaves_the_directory_alone(publish, tmp_path):
    publish(published_dataset, directory=str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()


def test_a_folder_of_somebody_else_is_not_replaced(publish, tmp_path):
    theirs = tmp_path / "target" / "preference_pairs"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("years of work")
    with pytest.raises(FinalError, match="was not published from here: move it away"):
        publish(published_dataset, directory=str(tmp_path / "target"), dry_run=False)
    assert names(theirs) == ["thesis.tex"]


@pytest.mark.parametrize("below", [(), ("below",), ("below", "it")])
def test_a_directory_that_cannot_be_made_is_said_in_a_sentence(publish, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FinalError, match=r"\(publishing.directory\) cannot be made: .*\. Choose another\."):
        publish(published_dataset, directory=str(tmp_path.joinpath("file", *below)), dry_run=False)


def test_a_copy_that_fails_leaves_what_was_there(publish, tmp_path, monkeypatch):
    import shutil

    from resources.storage import hub

    target = tmp_path / "target"
    publish(published_dataset, directory=str(target), dry_run=False)
    before = {name: (target / name).read_bytes() for name in names(target)}

    def half(source, place, **options):
        shutil.copy(Path(source) / "README.md", place)
        raise OSError("disk full")

    monkeypatch.setattr(hub.shutil, "copytree", half)
    folder = tmp_path / "finished"
    folder.mkdir()
    (folder / "README.md").write_text("new")
    with pytest.raises(OSError, match="disk full"):
        hub._copy(folder, target / "preference_pairs")
    assert {name: (target / name).read_bytes() for name in names(target)} == before


@pytest.mark.parametrize(("asset", "partition", "kind"), [
    (published_dataset, None, "dataset"), (published_model, "0001", "model"),
])  # fmt: skip
def test_without_a_token_or_a_place_it_ends_before_anything_is_written(
    publish, home, monkeypatch, tmp_path, asset, partition, kind
):
    import shutil

    shutil.rmtree(home / "published", ignore_errors=True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(FinalError, match=f"nowhere to publish to: set publishing.{kind}_repository"):
        publish(asset, partition, dry_run=False)
    with pytest.raises(FinalError, match="There is no token for the hub") as error:
        publish(asset, partition, dry_run=False, **{f"{kind}_repository": "an-org/name"})
    assert "HF_TOKEN" in str(error.value)
    assert not (home / "published").exists()


class StubHub:
    """In place of HfApi: keeps what it is asked. That the hub itself accepts it is tested nowhere."""

    calls: list[tuple[str, dict[str, object]]] = []  # noqa: RUF012

    def __init__(self, **_options):
        pass

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options):
        self.calls.append(("upload", {**options, "files": names(Path(options["folder_path"]))}))
        return type("Commit", (), {"commit_url": f"https://hub/{options['repo_id']}/commit/1"})


@pytest.mark.slow
@pytest.mark.parametrize("private", [True, False])
def test_what_the_hub_is_asked_for(publish, home, monkeypatch, private):
    """With a stub of HfApi: which repositories, of which kind and privacy, and which folder."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi", StubHub)
    monkeypatch.setattr(StubHub, "calls", [])
    options = {
        "dry_run": False,
        "private": private,
        "dataset_repository": "an-org/pairs",
        "model_repository": "an-org/m",
    }
    pairs = publish(published_dataset, **options)
    model = publish(published_model, "0002", **options)
    kinds = [(name, call["repo_id"], call["repo_type"]) for name, call in StubHub.calls]
    assert kinds == [
        ("create", "an-org/pairs", "dataset"), ("upload", "an-org/pairs", "dataset"),
        ("create", "an-org/m-iteration-2", "model"), ("upload", "an-org/m-iteration-2", "model"),
    ]  # fmt: skip
    for name, call in StubHub.calls:
        assert call.get("private", private) is private
        assert name == "upload" or call["exist_ok"]
    assert StubHub.calls[1][1]["files"] == names(home / "published" / "preference_pairs")
    assert pairs["published_to"] == "https://hub/an-org/pairs/commit/1"
    assert "hf_secret" not in str([pairs, model])


def test_the_hubs_refusal_is_a_sentence_and_not_tried_again(publish, monkeypatch):
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    def refuses(self, repo_id, **options):
        request = httpx.Request("POST", "https://hub/api/repos/create")
        raise HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=request))

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi", StubHub)
    monkeypatch.setattr(StubHub, "create_repo", refuses)
    with pytest.raises(FinalError, match="The hub does not take an-org/pairs: 403 Forbidden"):
        publish(published_dataset, dry_run=False, dataset_repository="an-org/pairs")


def test_an_altered_checkpoint_is_not_published(publish, home):
    store = CheckpointStore(str(home / "checkpoints"))
    weights = Path(store.current("model_checkpoint", "0001").weights) / "model.safetensors"
    before = weights.read_bytes()
    weights.write_text("M_X")
    try:
        with pytest.raises(FinalError, match="were altered"):
            publish(published_model, "0001")
    finally:
        weights.write_bytes(before)


@pytest.mark.parametrize("name", ["dataset_repository", "model_repository"])
def test_a_wrong_hub_id_is_refused_in_a_sentence(tmp_path, name):
    with pytest.raises(SettingsError, match="is no hub id such as your-org/your-name") as error:
        load_settings(write_settings(tmp_path / "x.yaml", {"preset": "laptop", "publishing": {name: "a/b/c d"}}))
    assert "\n" not in str(error.value)


def test_nothing_else_makes_what_is_opt_in():
    definitions, services = build(active_settings(), HOME)
    repository, graph = definitions.get_repository_def(), services.graph
    for job in ("foundation", "iteration", ALL_ASSETS_JOB):
        selected = {key.to_user_string() for key in repository.get_job(job).asset_layer.selected_asset_keys}
        assert not selected & OPT_IN, job
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} > OPT_IN
    every = {key.to_user_string() for key in graph.materializable_asset_keys}
    selected = {key.to_user_string() for key in repository.get_job(ALL_ASSETS_JOB).asset_layer.selected_asset_keys}
    assert selected == every - OPT_IN
    for partitioned in (True, False):
        assert not set(asset_names(services.graph, partitioned)) & OPT_IN
    with dg.DagsterInstance.ephemeral() as empty:
        missing = missing_assets(empty, services, "0001") + missing_assets(empty, services, None)
        assert not set(missing) & OPT_IN


def test_the_sensor_never_asks_for_it(nano_model, tmp_path):
    definitions, services = build(active_settings(), HOME)
    with dg.DagsterInstance.ephemeral() as empty:
        context = dg.build_sensor_context(
            instance=empty, resources={"experiment": services}, repository_def=definitions.get_repository_def()
        )
        request = next_iteration(context)
    assert not {key.to_user_string() for key in request.asset_selection} & OPT_IN


def test_nothing_of_an_iteration_waits_for_it():
    """They are leaves, so a backfill that includes them is cut into the same runs as one without."""
    from definitions import defs

    graph = defs.get_repository_def().asset_graph
    for name in OPT_IN:
        node = graph.get(dg.AssetKey(name))
        assert not node.child_keys
    model = graph.get(dg.AssetKey("published_model"))
    assert model.partitions_def == graph.get(dg.AssetKey("model_checkpoint")).partitions_def
    assert model.partition_mappings == {}


@pytest.mark.parametrize(("start", "published"), [("initial_policy", True), ("model_checkpoint[0001]", False)])
def test_an_adapter_of_another_model_than_m_0_is_not_published(tmp_path, start, published):
    """Its base is not there to be loaded, and with M_0 it would be another model."""
    (tmp_path / "adapter").mkdir()
    model = SimpleNamespace(directory=str(tmp_path), manifest={"parents": {"start": {"asset": start}}})
    assert (_adapter_of(model) is not None) == published


def test_a_real_home_is_published_and_loads(nano_run, tmp_path):
    """Both assets over two real iterations: the weights load, and no path of this machine is in any text."""
    import datasets
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = nano_run.home
    stored = load_settings(home / "settings.yaml")
    options = stored.publishing.model_copy(update={"directory": str(tmp_path / "target"), "dry_run": False})
    settings = stored.model_copy(update={"publishing": options})
    with dg.DagsterInstance.from_config(str(home)) as instance:
        pairs = materialize(published_dataset, instance, services_in(home, settings))
        model = materialize(published_model, instance, services_in(home, settings), "0002")
    loaded = datasets.load_dataset(pairs["published_to"], split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == pairs["rows"]
    assert set(loaded["iteration"]) == {1, 2}
    for word in ("response_improver[0001]", "response_improver[0002]", "model_checkpoint[0001]", "initial_policy"):
        assert word in pairs["card"], word
    folder = Path(model["published_to"])
    AutoTokenizer.from_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(
        CheckpointStore(str(home / "checkpoints")).current("initial_policy", None).weights
    )
    adapted = PeftModel.from_pretrained(base, folder, subfolder="adapter").merge_and_unload()
    name, weight = next((name, weight) for name, weight in adapted.named_parameters() if "q_proj" in name)
    assert (weight - merged.get_parameter(name)).abs().max() < 1e-5
    for place in (Path(pairs["published_to"]), folder):
        for file in place.rglob("*"):
            if file.suffix in (".md", ".json", ".jinja"):
                assert str(home.parent) not in file.read_text(), file
    assert json.loads((folder / "manifest.json").read_text())["sha"] == model["sha"]
