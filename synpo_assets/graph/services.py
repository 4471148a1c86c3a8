"""Everything that stages work with, in one bundle: settings, models, storage, and the graph that they are part of."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from resources.generation.language_model import LanguageModel
from resources.models.embeddings import SentenceEmbedder
from resources.models.evaluation_harness import EvaluationHarness
from resources.models.likelihood import AnswerLikelihood
from resources.scoring.scorer import RewardScorer
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.tables import ParquetTables
from resources.training.trainer import Trainer
from synpo_assets.graph.metrics import SCHEMA

# The columns of the tables that say which settings an asset was made with.
USED_SETTINGS = {"asset": pl.String, "setting": pl.String, "value": pl.String}


@dataclasses.dataclass(frozen=True)
class Services:
    """What the stages of one experiment work with; lists of assets are derived from its graph."""

    settings: Settings
    home: Path
    graph: AssetGraph
    language_model: LanguageModel
    trainer: Trainer
    scorer: RewardScorer
    embedder: SentenceEmbedder
    likelihood: AnswerLikelihood
    harness: EvaluationHarness
    tables: ParquetTables
    metrics: ParquetTables
    used_settings: ParquetTables
    checkpoints: CheckpointStore
    # What differs from the settings of the home, in words, for one run alone.
    changes: Sequence[str] = ()


def open_services(settings: Settings, home: Path, graph: AssetGraph, changes: Sequence[str] = ()) -> Services:
    """Opens the services of an experiment; no model is loaded, and nothing is written."""
    root = settings.storage.root(home)
    engine, shards, random_seed = settings.engine, f"{root}/shards", settings.random_seed
    return Services(
        settings=settings,
        home=home,
        graph=graph,
        language_model=LanguageModel(shards=shards, engine=engine, random_seed=random_seed),
        trainer=Trainer(
            states=f"{home}/training", processes=settings.training_processes, engine=engine, random_seed=random_seed
        ),
        scorer=RewardScorer(shards=shards, engine=engine, scorer=settings.scorer),
        embedder=SentenceEmbedder(engine=engine),
        likelihood=AnswerLikelihood(engine=engine),
        harness=EvaluationHarness(scores=f"{root}/benchmarks/scores", engine=engine),
        tables=ParquetTables(f"{root}/tables", f"synpo trace {{}} --home {shlex.quote(str(home))}"),
        metrics=ParquetTables(f"{root}/metrics", columns=SCHEMA),
        used_settings=ParquetTables(f"{root}/settings", columns=USED_SETTINGS),
        checkpoints=CheckpointStore(
            f"{root}/checkpoints", str(home / "cache" / "checkpoints") if settings.storage.artifacts else None, changes
        ),
        changes=changes,
    )
