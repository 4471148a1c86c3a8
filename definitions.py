"""The code location: assets of all stages, on the resources that the settings choose."""

import os
import warnings
from typing import Any

import dagster as dg

from resources.common.processes import end_with_parent
from resources.generation.language_model import LanguageModel
from resources.models.embeddings import SentenceEmbedder
from resources.models.evaluation_harness import EvaluationHarness
from resources.models.likelihood import AnswerLikelihood
from resources.scoring.scorer import RewardScorer
from resources.settings.files import active_settings, home_directory
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.tables import ParquetTables
from resources.training.trainer import Trainer
from synpo_assets import algorithm as stages
from synpo_assets.cli import automation
from synpo_assets.cli.terminal import terminal_logger
from synpo_assets.graph import checks

# Progress bars fill the logs of the UI; assets log count, rate and time left instead.
os.environ["TQDM_DISABLE"] = "1"
# SimPO lives in trl.experimental, which is why trl is pinned exactly.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
# Data versions and pools are marked beta; the pinned Dagster minor version is the one they were tested with.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
end_with_parent()

settings, home = active_settings(), home_directory()
root = settings.storage.root(home)
shards, cache = f"{root}/shards", str(home / "cache" / "checkpoints") if settings.storage.artifacts else None
common: dict[str, Any] = {"engine": settings.engine, "random_seed": settings.random_seed}
compared = settings.scorer.model_dump(include={"kind", "max_length", "pair_convention"})

# The forkserver imports the heavy libraries once; each step is then forked from it in an instant, in a process of its
# own, so that the memory of one phase is free again before the next one starts.
executor = dg.multiprocess_executor.configured(
    {"start_method": {"forkserver": {"preload_modules": ["definitions", "transformers", "trl", "peft"]}}}
)

defs = dg.Definitions(
    assets=dg.load_assets_from_modules(stages.STAGES),
    asset_checks=dg.load_asset_checks_from_modules([checks]),
    resources={
        "settings": dg.ResourceDefinition.hardcoded_resource(settings),
        "language_model": LanguageModel(shards=shards, **common),
        "trainer": Trainer(states=f"{home}/training", processes=settings.training_processes, **common),
        "scorer": RewardScorer(shards=shards, engine=settings.engine, **compared),
        "embedder": SentenceEmbedder(engine=settings.engine),
        "likelihood": AnswerLikelihood(engine=settings.engine),
        "harness": EvaluationHarness(scores=f"{root}/benchmarks/scores", engine=settings.engine),
        "tables": ParquetTables(f"{root}/tables"),
        "checkpoints": CheckpointStore(f"{root}/checkpoints", cache),
    },
    jobs=automation.JOBS,
    sensors=[automation.next_iteration],
    executor=executor,
    loggers={"console": terminal_logger},
)
