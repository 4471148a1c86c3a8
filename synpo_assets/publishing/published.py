"""Publishing: all pairs so far, and each M_t, as folders with a card, for the hub or a directory.

Paper: it publishes neither data nor models. Here: opt-in. No job, no sensor and no `synpo run` makes these
assets, and with `publishing.dry_run`, the default, they only show what would be published.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.common.text import visible
from resources.settings.files import home_directory
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.storage.files import replace_directory, temporary_directory_beside
from resources.storage.hub import check_destination, publish
from resources.storage.tables import ParquetTables
from synpo_assets.graph.checks import failed_checks
from synpo_assets.graph.history import metadata_of
from synpo_assets.graph.partitions import GROUP, ITERATIONS, OPT_IN_TAG, RETRIES, code_version, iteration_of
from synpo_assets.graph.presentation import made_from, table_version
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.publishing import cards as cards_method
from synpo_assets.publishing.cards import dataset_card, model_card
from synpo_assets.reports.boosting_report import iterations_of, read_iteration
from synpo_assets.reports.rows import FinishedIteration, report_rows

# Of what an iteration makes, the settings that decide what a pair is.
CARD_SETTINGS: dict[str, Any] = {
    "random_seed": True,
    "prompt_generator": True,
    "responses": True,
    "response_improver": True,
    "scorer": {"kind", "pair_convention", "max_length", "training"},
    "preferences": True,
}
WRITERS = {
    "prompt": "synthetic_prompts",
    "answer of the policy": "base_responses",
    "chosen": "refined_responses",
    "rejected": "initial_responses",
}
TEXT_LIMIT = 2000
PUBLISHED: dict[str, Any] = {
    "group_name": GROUP,
    "tags": {OPT_IN_TAG: "true"},
    "kinds": {"huggingface"},
    "retry_policy": RETRIES,
}


@dg.asset(deps=["preference_pairs", "evaluation"], code_version=code_version("publishing", cards_method), **PUBLISHED)
def published_dataset(
    context: dg.AssetExecutionContext,
    tables: dg.ResourceParam[ParquetTables],
    checkpoints: dg.ResourceParam[CheckpointStore],
    settings: dg.ResourceParam[Settings],
) -> dg.MaterializeResult:
    """The pairs of all finished iterations as parquet files with a card, published if `publishing.dry_run` is off."""
    options = settings.publishing
    check_destination(options, "dataset")
    keys, _ = iterations_of(context.instance)
    if not keys:
        raise FinalError("No iteration is finished, so there are no pairs to publish: materialize an iteration first.")
    iterations = [read_iteration(context.instance, tables, key) for key in keys]
    pairs = pl.concat([iteration.pairs for iteration in iterations])
    newest = checkpoints.manifest("model_checkpoint", keys[-1]) or {}
    card = dataset_card(
        repository=options.dataset_repository,
        license_name=options.license,
        language=settings.prompt_generator.language,
        base_model=_base_model(checkpoints)[0],
        keys=keys,
        rows=report_rows(iterations),
        pairs=pairs.height,
        columns={name: str(column.description) for name, column in PreferencePairs.to_schema().columns.items()},
        writers=list(_writers(context, iterations)),
        scorer=_scorer(settings),
        score_conventions=pairs["score_convention"].unique().sort().to_list(),
        ranked_samples=None if settings.trains_improver else settings.preferences.ranked_samples,
        settings=settings.model_dump(
            include=CARD_SETTINGS, exclude=set() if settings.trains_improver else {"response_improver"}
        ),
        libraries=newest.get("libraries", {}),
        sample=_sample(iterations[-1].pairs),
    )

    def build(folder: Path) -> None:
        (folder / "data").mkdir()
        for iteration in iterations:
            iteration.pairs.write_parquet(folder / "data" / f"iteration-{iteration.key}.parquet")

    place = _write("preference_pairs", card, build)
    to = publish(options, place, "preference_pairs", options.dataset_repository, "dataset", ["data/*"])
    return _result(context, place, card, to, table_version(pairs), pairs=pairs.height, iterations=", ".join(keys))


@dg.asset(
    partitions_def=ITERATIONS,
    deps=["evaluation"],
    code_version=code_version("publishing", cards_method),
    **PUBLISHED,
)
def published_model(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    tables: dg.ResourceParam[ParquetTables],
    checkpoints: dg.ResourceParam[CheckpointStore],
    settings: dg.ResourceParam[Settings],
) -> dg.MaterializeResult:
    """M_t's merged weights, and its adapter if it has one, with a card, published if `publishing.dry_run` is off."""
    options, key = settings.publishing, context.partition_key
    check_destination(options, "model")
    if failed := failed_checks(context.instance, "model_checkpoint", key):
        raise FinalError(f"{model_checkpoint.label} did not pass its blocking checks ({', '.join(failed)}).")
    checkpoints.verify(model_checkpoint)
    repository = f"{options.model_repository}-iteration-{iteration_of(context)}" if options.model_repository else None
    keys = [*(earlier for earlier in iterations_of(context.instance)[0] if earlier < key), key]
    iterations = [read_iteration(context.instance, tables, each) for each in keys]
    base_model, base_model_id, base_model_name = _base_model(checkpoints)
    adapter = Path(model_checkpoint.directory) / "adapter"
    card = model_card(
        repository=repository,
        dataset_repository=options.dataset_repository,
        license_name=options.license,
        language=settings.prompt_generator.language,
        base_model=base_model,
        base_model_id=base_model_id,
        label=model_checkpoint.label,
        keys=keys,
        rows=report_rows(iterations),
        manifest=model_checkpoint.manifest,
        scorer=_scorer(settings),
        adapter=adapter.exists(),
        sample=_sample(iterations[-1].pairs),
    )

    def build(folder: Path) -> None:
        without_card = shutil.ignore_patterns("README.md")
        shutil.copytree(model_checkpoint.weights, folder, dirs_exist_ok=True, ignore=without_card)
        shutil.copy(Path(model_checkpoint.directory) / "manifest.json", folder)
        if adapter.exists():
            shutil.copytree(adapter, folder / "adapter", ignore=without_card)
            _name_base(folder / "adapter" / "adapter_config.json", base_model_name)

    name = f"model_checkpoint/{key}"
    place = _write(name, card, build)
    to = publish(options, place, name, repository, "model", ["*.safetensors", "adapter/*"])
    return _result(context, place, card, to, model_checkpoint.sha[:16], sha=model_checkpoint.sha)


def _write(name: str, card: str, build: Callable[[Path], None]) -> Path:
    """Writes a folder with its card into the home, in place of an earlier one, whole or not at all."""
    place = home_directory() / "published" / name
    with temporary_directory_beside(place) as temporary:
        build(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        replace_directory(temporary, place)
    return place


def _result(
    context: dg.AssetExecutionContext, place: Path, card: str, to: str, version: str, **metadata: Any
) -> dg.MaterializeResult:
    sizes = {file.relative_to(place).as_posix(): file.stat().st_size for file in place.rglob("*") if file.is_file()}
    files = [dg.TableRecord({"file": name, "bytes": sizes[name]}) for name in sorted(sizes)]
    context.log.info(f"{place}: {len(files)} files, {sum(sizes.values()) / 1e6:,.1f} MB. Published to: {to}")
    about = {"path": dg.MetadataValue.path(place), "published_to": to, **metadata}
    about |= {"files": dg.MetadataValue.table(files), "bytes": sum(sizes.values()), "card": dg.MetadataValue.md(card)}
    # The pairs of all iterations have no single version that `made_from` could show.
    about |= {"made_from": made_from(context)} if context.has_partition_key else {}
    return dg.MaterializeResult(data_version=dg.DataVersion(version), metadata=about)


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
    if settings.scorer.name is None:
        return "a reward model trained from M_0 on seed prompts, gold answers over M_0's own"
    name = Path(settings.scorer.name).name if Path(settings.scorer.name).is_dir() else settings.scorer.name
    return f"`{name}` ({settings.scorer.kind})"


def _writers(context: dg.AssetExecutionContext, iterations: Sequence[FinishedIteration]) -> Iterator[dict[str, str]]:
    """Which checkpoint wrote what in each iteration, and which one scored it."""
    for iteration in iterations:
        for role, asset in WRITERS.items():
            about = metadata_of(context.instance, asset, iteration.key)
            label, sha = (str(about.get(name, "unknown")) for name in ("checkpoint", "checkpoint_sha"))
            yield {"iteration": iteration.key, "role": role, "checkpoint": label, "sha": sha}
        for sha in iteration.pairs["scorer_sha"].unique().sort():
            yield {"iteration": iteration.key, "role": "scorer", "checkpoint": "reward_model", "sha": sha}


def _sample(pairs: pl.DataFrame) -> str:
    """The pair with the median margin as JSON, long texts cut, control characters shown as their numbers."""
    row = pairs.sort("margin", "pair_id").row(pairs.height // 2, named=True)
    for side in ("prompt", "chosen", "rejected"):
        row[side] = [message | {"content": _shown(message["content"])} for message in row[side]]
    return json.dumps(row, indent=2, ensure_ascii=False)


def _shown(text: str) -> str:
    return visible(text) if len(text) <= TEXT_LIMIT else f"{visible(text[:TEXT_LIMIT])}…"


def _name_base(config: Path, name: str) -> None:
    """Puts the name of M_0 in place of the path that it had on this machine."""
    values = json.loads(config.read_text()) | {"base_model_name_or_path": name}
    config.write_text(json.dumps(values, indent=2))
