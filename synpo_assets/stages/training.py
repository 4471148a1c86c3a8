"""How prompt generator, improver and reward models are trained: from one policy, on rows of one table (paper, section 2)."""

from collections.abc import Sequence
from typing import Any

import dagster as dg
import polars as pl

from resources.settings.training import Training
from resources.storage.checkpoint_store import Checkpoint
from resources.training.job import Kind, TrainingSummary
from synpo_assets.graph.presentation import table_version
from synpo_assets.graph.services import Services


def train_on_table(
    context: dg.AssetExecutionContext,
    services: Services,
    kind: Kind,
    start: Checkpoint,
    examples: Sequence[Any],
    training: Training,
    random_seed: int,
    **table: pl.DataFrame,
) -> tuple[Checkpoint, TrainingSummary]:
    """Trains `start` and stores the result.

    Args:
        kind: How, with examples as `Trainer.train` takes them.
        random_seed: Draws the order of the examples and new weights.
        **table: What the examples were taken from, under the name of its asset.
    """
    trainer = services.trainer.model_copy(update={"random_seed": random_seed})
    return services.checkpoints.create(
        context,
        lambda directory: trainer.train(kind, start, examples, training, directory),
        parents={"start": start},
        trained_on={name: table_version(frame) for name, frame in table.items()},
        settings=training.model_dump(),
        random_seed=random_seed,
    )
