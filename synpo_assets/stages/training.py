"""How prompt generator, improver and reward models are trained: from M_0, on rows of one table (paper, section 2)."""

from collections.abc import Sequence
from typing import Any

import dagster as dg
import polars as pl

from resources.settings.training import Training
from resources.storage.checkpoint_store import Checkpoint
from resources.training.job import Kind, TrainingSummary
from synpo_assets.graph.presentation import table_version
from synpo_assets.graph.services import Services


def train_from_initial(
    context: dg.AssetExecutionContext,
    services: Services,
    kind: Kind,
    initial_policy: Checkpoint,
    examples: Sequence[Any],
    training: Training,
    random_seed: int,
    **table: pl.DataFrame,
) -> tuple[Checkpoint, TrainingSummary]:
    """Trains M_0 and stores the result.

    Args:
        kind: How, with examples as `Trainer.train` takes them.
        random_seed: Draws the order of the examples and new weights.
        **table: What the examples were taken from, under the name of its asset.
    """
    trainer = services.trainer.model_copy(update={"random_seed": random_seed})
    return services.checkpoints.create(
        context,
        lambda directory: trainer.train(kind, initial_policy, examples, training, directory),
        parents={"start": initial_policy},
        trained_on={name: table_version(frame) for name, frame in table.items()},
        settings=training.model_dump(),
        random_seed=random_seed,
    )
