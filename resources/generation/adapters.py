"""LoRA adapters that an engine applies by itself, instead of weights they are merged into."""

import dataclasses
import json
from pathlib import Path

from resources.common.errors import FinalError
from resources.storage.checkpoint_store import Checkpoint, open_checkpoint
from resources.storage.manifests import ADAPTER


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter and the model it belongs to."""

    name: str  # No other adapter ever has it: engines keep what they loaded (https://github.com/vllm-project/vllm/issues/20149).
    number: int  # Never that of another either; from 1 to 2**31.
    rank: int
    directory: str
    base_weights: str


def adapter_of(checkpoint: Checkpoint) -> Adapter | None:
    """The adapter of a checkpoint, if the model that it was trained on still lies there; None if it was not trained as one."""
    directory = Path(checkpoint.directory) / ADAPTER
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
