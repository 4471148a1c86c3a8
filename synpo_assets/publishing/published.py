"""Publishing: all pairs so far, and each M_t, as folders with a card, for the hub or a directory.

Paper: it publishes neither data nor models. Here: opt-in. No job, no sensor and no `synpo run` makes these
assets, and with `publishing.dry_run`, the default, they only show what would be published.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.common.text import asset_label, visible
from resources.settings.method import RewardTraining
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.storage.files import replace_directory, temporary_directory_beside
from resources.storage.hub import check_destination, publish
from resources.storage.manifests import ADAPTER
from synpo_assets.graph.history import failed_checks
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import table_version, written_output
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.pairs import middle_pair
from synpo_assets.method.reviews import OUTCOMES
from synpo_assets.publishing.cards import DATA_SETTINGS, CardData, dataset_card, model_card, without_folder
from synpo_assets.reports.boosting_report import READ_ASSETS, iterations_of, read_iteration
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.stages.preferences import WRITER_COLUMNS

# Of what an iteration makes, the settings that decide what a pair is.
CARD_SETTINGS = {"random_seed", *DATA_SETTINGS}
# Which of them may name a file or directory.
PLACES = (("preferences", "reviewed"), ("scorer", "name"))
# Who had a part in a pair: by their own tables, and by the columns of the pairs.
WRITERS = {"prompt": "synthetic_prompts", "answer of the policy": "base_responses"}
TEXT_LIMIT = 2000


@Stage(
    group="publishing",
    once=True,
    opt_in=True,
    kinds=("huggingface",),
    reads=("publishing",),
    deps=READ_ASSETS,
    deps_where_made=("pair_verdicts",),
)
def published_dataset(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.MaterializeResult:
    """The pairs of all finished iterations as parquet files with a card, published if `publishing.dry_run` is off.

    `published_to` says where it went; with a dry run, only into the home. Read the `card` first.
    """
    options = services.settings.publishing
    check_destination(options, "dataset")
    keys, _ = iterations_of(context.instance, services)
    if not keys:
        raise FinalError("No iteration is finished, so there are no pairs to publish: materialize an iteration first.")
    iterations = [read_iteration(context.instance, services, key) for key in keys]
    pairs = pl.concat([iteration.pairs for iteration in iterations])
    card = _dataset_card(services, iterations, pairs)

    def build(folder: Path) -> None:
        (folder / "data").mkdir()
        for iteration in iterations:
            iteration.pairs.write_parquet(folder / "data" / f"iteration-{iteration.key}.parquet")

    place = _write(services.home, "preference_pairs", card, build)
    to = publish(options, place, "preference_pairs", options.dataset_repository, "dataset", ["data/*"])
    rows = [Metric("rows", pairs.height)]
    return _result(context, services, place, card, to, table_version(pairs), rows, iterations=", ".join(keys))


@Stage(
    group="publishing",
    opt_in=True,
    kinds=("huggingface",),
    reads=("publishing",),
    deps=READ_ASSETS,
    deps_where_made=("pair_verdicts",),
)
def published_model(
    context: dg.AssetExecutionContext, model_checkpoint: Checkpoint, services: dg.ResourceParam[Services]
) -> dg.MaterializeResult:
    """M_t's merged weights, and its adapter if it has one, with a card, published if `publishing.dry_run` is off.

    `published_to` says where it went; with a dry run, only into the home. Read the `card` first.
    """
    options, key = services.settings.publishing, context.partition_key
    check_destination(options, "model")
    if failed := failed_checks(context.instance, services.graph, "model_checkpoint", key):
        raise FinalError(f"{model_checkpoint.label} did not pass its blocking checks ({', '.join(failed)}).")
    repository = f"{options.model_repository}-iteration-{iteration_of(context)}" if options.model_repository else None
    iterations = _iterations_up_to(context.instance, services, model_checkpoint)
    data = _card_data(services, iterations, repository)
    card = model_card(
        data,
        dataset_repository=options.dataset_repository,
        label=model_checkpoint.label,
        manifest=model_checkpoint.manifest,
        adapter=_adapter_of(model_checkpoint) is not None,
    )
    name = f"model_checkpoint/{key}"
    build = functools.partial(_copy_model, model_checkpoint, data.base_model_name)
    place = _write(services.home, name, card, build)
    to = publish(options, place, name, repository, "model", ["*.safetensors", "adapter/*"])
    version = model_checkpoint.sha[:16]
    return _result(context, services, place, card, to, version, [], sha=model_checkpoint.sha)


def _dataset_card(services: Services, iterations: Sequence[FinishedIteration], pairs: pl.DataFrame) -> str:
    """The card of the pairs of these iterations, with the settings as they are."""
    settings = services.settings
    unused = set() if settings.trains_improver else {"response_improver"}
    stated = settings.model_dump(include=CARD_SETTINGS, exclude=unused)
    for section, name in PLACES:
        if stated[section].get(name):
            stated[section][name] = without_folder(stated[section][name])
    return dataset_card(
        _card_data(services, iterations, settings.publishing.dataset_repository),
        pairs=pairs,
        columns={name: str(column.description) for name, column in PreferencePairs.to_schema().columns.items()},
        writers=list(_writers(services, iterations)),
        ranked_samples=None if settings.trains_improver else settings.preferences.ranked_samples,
        rewrites=settings.response_improver.samples,
        own_answers=settings.response_improver.own_answers,
        settings=stated,
    )


def _iterations_up_to(instance: dg.DagsterInstance, services: Services, model: Checkpoint) -> list[FinishedIteration]:
    """The finished iterations that led to M_t, its own last.

    Raises:
        FinalError: Its own is not finished, so what was measured is about another M_t.
    """
    key = str(model.partition)
    keys = [each for each in iterations_of(instance, services)[0] if each <= key]
    if key not in keys:
        raise FinalError(
            f"{model.label} was not evaluated since it was made, or its pairs were made again since, so its card would tell "
            f"of another model: materialize {asset_label('evaluation', key)} first, and before it, for new pairs, {model.label}."
        )
    return [read_iteration(instance, services, each) for each in keys]


def _adapter_of(model: Checkpoint) -> Path | None:
    """The adapter that turns M_0 into this model; None where there is none, or where it belongs to an M_t that is not M_0."""
    adapter = Path(model.directory) / ADAPTER
    return adapter if adapter.exists() and model.manifest["parents"]["start"]["asset"] == "initial_policy" else None


def _copy_model(model: Checkpoint, base: str, folder: Path) -> None:
    """Weights, manifest, and the adapter if there is one, which then names its base; no card but the one written here."""
    without_card = shutil.ignore_patterns("README.md")
    shutil.copytree(model.weights, folder, dirs_exist_ok=True, ignore=without_card)
    shutil.copy(Path(model.directory) / "manifest.json", folder)
    if adapter := _adapter_of(model):
        shutil.copytree(adapter, folder / ADAPTER, ignore=without_card)
        _name_base(folder / ADAPTER / "adapter_config.json", base)


def _write(home: Path, name: str, card: str, build: Callable[[Path], None]) -> Path:
    """Writes a folder with its card into the home, in place of an earlier one, whole or not at all."""
    place = home / "published" / name
    with temporary_directory_beside(place) as temporary:
        build(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        replace_directory(temporary, place)
    return place


def _result(
    context: dg.AssetExecutionContext,
    services: Services,
    place: Path,
    card: str,
    to: str,
    version: str,
    measured: Sequence[Metric],
    **shown: Any,
) -> dg.MaterializeResult:
    sizes = {file.relative_to(place).as_posix(): file.stat().st_size for file in place.rglob("*") if file.is_file()}
    files = [dg.TableRecord({"file": name, "bytes": sizes[name]}) for name in sorted(sizes)]
    context.log.info(f"{place}: {len(files)} files, {sum(sizes.values()) / 1e6:,.1f} MB. Published to: {to}")
    metadata = {"path": dg.MetadataValue.path(place), "published_to": to, "bytes": sum(sizes.values()), **shown}
    metadata |= {"files": dg.MetadataValue.table(files), "card": dg.MetadataValue.md(card)}
    return written_output(context, services, version, measured, **metadata)


def _card_data(services: Services, iterations: Sequence[FinishedIteration], repository: str | None) -> CardData:
    """What both cards say."""
    settings = services.settings
    description, hub_id, name = _base_model(services.checkpoints)
    return CardData(
        repository=repository,
        license_name=settings.publishing.license,
        language=settings.prompt_generator.language,
        base_model=description,
        base_model_id=hub_id,
        base_model_name=name,
        iterations=iterations,
        scorer=_scorer(settings),
        sample=_sample(iterations[-1].pairs),
        verdicts=_verdicts(services, iterations),
    )


def _verdicts(services: Services, iterations: Sequence[FinishedIteration]) -> dict[str, int]:
    """How many of the pairs people confirmed, and how many they flipped."""
    said = [pl.Series("outcome", dtype=pl.String)]
    for iteration in iterations:
        # Recorded where pairs were made as people want them.
        if iteration.metrics.find("dropped", "people", asset="preference_pairs") is not None:
            read = services.tables.read("pair_verdicts", iteration.key)
            said.append(read.filter(pl.col("pair_id").is_in(iteration.pairs["pair_id"].implode()))["outcome"])
    outcomes = pl.concat(said)
    return {outcome: int((outcomes == outcome).sum()) for outcome in OUTCOMES if outcome != "dropped"}


def _base_model(checkpoints: CheckpointStore) -> tuple[str, str | None, str]:
    """M_0 in words, its hub id if it has one, and its name; the path of a local directory is nobody's business."""
    manifest = checkpoints.manifest("initial_policy", None)
    if manifest is None:
        raise FinalError("initial_policy has no checkpoint, so a card cannot say what M_0 is: materialize it again.")
    origin = manifest["settings"]
    if origin["source"] == "directory":
        name = Path(origin["name"]).name
        return f"a model from a local directory named `{name}`, sha `{manifest['sha']}`", None, name
    if origin["source"] == "wheel":
        return f"the model in the Python package `{origin['name']}`, sha `{manifest['sha']}`", None, origin["name"]
    return f"`{origin['name']}` at commit `{origin['commit']}`", origin["name"], origin["name"]


def _scorer(settings: Settings) -> str:
    if isinstance(settings.scorer, RewardTraining):
        trained = "a reward model trained from M_0 on seed prompts, gold answers over M_0's own"
        rules = "a program where a prompt states rules that it can check, elsewhere "
        return f"{rules if settings.scorer.kind == 'verifier' else ''}{trained}"
    return f"`{without_folder(settings.scorer.name)}` ({settings.scorer.kind})"


def _writers(services: Services, iterations: Sequence[FinishedIteration]) -> Iterator[dict[str, str]]:
    """Which checkpoint wrote what in each iteration, and which one scored it."""
    for iteration in iterations:
        key = iteration.key
        shas = {role: services.tables.read(asset, key)["checkpoint_sha"] for role, asset in WRITERS.items()}
        shas |= {role: iteration.pairs[name] for role, name in WRITER_COLUMNS.items()}
        for role, column in shas.items():
            for sha in column.unique().sort():
                manifest = services.checkpoints.manifest_of_sha(sha)
                label = asset_label(manifest["asset"], manifest["partition"]) if manifest else "unknown"
                yield {"iteration": key, "role": role, "checkpoint": label, "sha": sha}


def _sample(pairs: pl.DataFrame) -> str:
    """The pair with the median margin as JSON, long texts cut, control characters shown as their numbers."""
    row = middle_pair(pairs)
    for side in ("prompt", "chosen", "rejected"):
        row[side] = [message | {"content": _shown(message["content"])} for message in row[side]]
    return json.dumps(row, indent=2, ensure_ascii=False)


def _shown(text: str) -> str:
    return visible(text) if len(text) <= TEXT_LIMIT else f"{visible(text[:TEXT_LIMIT])}…"


def _name_base(config: Path, name: str) -> None:
    """Puts the name of M_0 in place of the path that it had on this machine."""
    values = json.loads(config.read_text()) | {"base_model_name_or_path": name}
    config.write_text(json.dumps(values, indent=2))
