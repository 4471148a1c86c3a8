"""How much likelier M_t finds held-out gold than M_0 does, beside the same of gold of another prompt.

    python -m tests.benchmarks.other_gold HOME ITERATION

A model that learns only how gold is written finds both likelier alike. Differences are per token, with 95 % intervals over prompts,
by split; the other prompt is the next one by its id.
"""

import os
import sys
from pathlib import Path

import polars as pl


def run(home: Path, iteration: int) -> None:
    """Reads gold by M_0 and M_t, and writes a line for each gain and one for their difference."""
    os.environ["SYNPO_HOME"] = str(home.absolute())
    from definitions import build
    from resources.settings.files import home_settings
    from synpo_assets.graph.partitions import partition_key
    from synpo_assets.method.evaluation import mean_gain

    settings = home_settings(home.absolute())
    services = build(settings, home.absolute())[1]
    key = partition_key(iteration)
    models = [
        services.checkpoints.current("model_checkpoint", key),
        services.checkpoints.current("initial_policy", None),
    ]
    held_out = services.tables.read("evaluation", key).filter(sample=1).sort("prompt_id")
    for (split,), of_split in held_out.group_by("split", maintain_order=True):
        prompts, gold = of_split["prompt"].to_list(), of_split["answer"].to_list()
        gains = dict[str, pl.Series]()
        for name, answers in {"gold": gold, "gold of another prompt": [*gold[1:], *gold[:1]]}.items():
            pairs = list(zip(prompts, answers, strict=True))
            candidate, initial = (pl.Series(services.likelihood.measure(model, pairs).per_token) for model in models)
            gains[name] = candidate - initial
        gains["the difference of both"] = gains["gold"] - gains["gold of another prompt"]
        for name, gain in gains.items():
            mean, low, high = mean_gain(gain, settings.random_seed)
            sys.stdout.write(f"{split}, n = {len(gain)}: {name} {mean:+.3f} ({low:+.3f} to {high:+.3f})\n")
            sys.stdout.flush()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
