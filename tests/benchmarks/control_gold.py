"""How likely M_t and its control of equal steps find gold: of the held-out prompts, and of the verifiable instructions.

    python -m tests.benchmarks.control_gold HOME ITERATION

Neither rules nor a judge take part. All differences are per token, with 95 % intervals over prompts, by split.
"""

import os
import sys
from pathlib import Path

import polars as pl

from tests.benchmarks.preference_tries import stated_gold

DIFFERENCES = [("M_t", "M_0"), ("control", "M_0"), ("M_t", "M_{t-1}"), ("M_t", "control")]


def run(home: Path, iteration: int) -> None:
    """Reads gold by M_0, M_{t-1}, M_t and the control, and writes a line for each difference."""
    os.environ["SYNPO_HOME"] = str(home.absolute())
    from definitions import build
    from resources.settings.files import home_settings
    from synpo_assets.graph.partitions import partition_key
    from synpo_assets.method.evaluation import mean_gain
    from synpo_assets.stages.seed import verifiable_table

    settings = home_settings(home.absolute())
    services = build(settings, home.absolute())[1]
    current, key = services.checkpoints.current, partition_key(iteration)
    models = {
        "M_0": current("initial_policy", None),
        "M_{t-1}": current("policy", key),
        "M_t": current("model_checkpoint", key),
        "control": current("equal_steps_checkpoint", key),
    }
    stated = stated_gold(settings)
    instructions = verifiable_table(settings)[0]
    answers = [stated[prompt] for prompt in instructions["prompt"]]
    gold = {
        "held-out prompts": services.tables.read("evaluation", key).filter(sample=1),
        "instructions": instructions.with_columns(answer=pl.Series(answers)),
    }
    for what, texts in gold.items():
        for (split,), of_split in texts.group_by("split", maintain_order=True):
            pairs = of_split.select("prompt", "answer").rows()
            found = {
                name: pl.Series(services.likelihood.measure(each, pairs).per_token) for name, each in models.items()
            }
            for one, other in DIFFERENCES:
                gain, low, high = mean_gain(found[one] - found[other])
                shown = f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
                sys.stdout.write(f"{what}, {split}, n = {len(pairs)}: {one} less {other} {shown}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
