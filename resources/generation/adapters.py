"""LoRA adapters that an engine applies by itself, instead of weights they are merged into."""

import dataclasses
import json
from pathlib import Path

from resources.common.errors import FinalError
from resources.storage.checkpoint_store import Checkpoint, open_checkpoint


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter and the model it belongs to.

    Attributes:
        name: A name that no other adapter ever has: engines keep what they once loaded under a name
            (https://github.com/vllm-project/vllm/issues/20149).
        number: A number with the same property, from 1 to 2**31.
        rank: Rank of its matrices.
        directory: Directory of the adapter.
        base_weights: Directory of the model that it was trained on.
    """

    name: str
    number: int
    rank: int
    directory: str
    base_weights: str


def adapter_of(checkpoint: Checkpoint) -> Adapter | None:
    """The adapter of a checkpoint; None if it was not trained as one.

    Raises:
        FinalError: The model that it was trained on is not where it was, or is another one by now.
    """
    directory = Path(checkpoint.directory) / "adapter"
    if not directory.exists():
        return None
    start = checkpoint.manifest["parents"]["start"]
    # All checkpoints lie in <root>/<asset>/<iteration>/<content>.
    place = Path(checkpoint.directory).parents[2] / start["directory"]
    if not place.exists():
        raise FinalError(
            f"The adapter of {checkpoint.label} belongs to {start['asset']}, which does not lie in {place}: set engine.adapters "
            "to `merged`, which needs the merged weights only."
        )
    base = open_checkpoint(place)
    if base.sha != start["sha"]:
        raise FinalError(
            f"The adapter of {checkpoint.label} was trained on {start['asset']} with sha {start['sha'][:16]}, and {place} now "
            f"holds {base.sha[:16]}: an adapter does not fit another model. Materialize {checkpoint.label} again."
        )
    return Adapter(
        name=checkpoint.sha,
        number=int(checkpoint.sha[:8], 16) % 2**31 + 1,
        rank=json.loads((directory / "adapter_config.json").read_text())["r"],
        directory=str(directory),
        base_weights=base.weights,
    )
