"""How many dev instructions M_0 and M_t follow under other system prompts: was M_0 only held back by that of the preset?

    python -m tests.benchmarks.system_prompts HOME ITERATION FILE.csv

The home's own system prompt is in the chat template of its checkpoints; a system message takes its place. One answer each.
"""

import os
import sys
from pathlib import Path

import polars as pl

SYSTEM_PROMPTS = (
    None,
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",  # What SmolLM2's own template says.
    "Follow the instruction exactly.",
)


def run(home: Path, iteration: int) -> pl.DataFrame:
    """One row for each system prompt and model."""
    os.environ["SYNPO_HOME"] = str(home)
    from definitions import build
    from resources.settings.files import home_settings
    from synpo_assets.graph.partitions import partition_key
    from synpo_assets.method.rules import followed
    from synpo_assets.method.templates import prompt_requests

    settings = home_settings(home)
    services = build(settings, home)[1]
    models = {
        "M_0": services.checkpoints.current("initial_policy", None),
        f"M_{iteration}": services.checkpoints.current("model_checkpoint", partition_key(iteration)),
    }
    asked = pl.read_parquet(home / "tables" / "verifiable_instructions.parquet").filter(split="dev")
    rows = []
    for system in SYSTEM_PROMPTS:
        said = [] if system is None else [{"role": "system", "content": system}]
        requests = [(row_id, [*said, *messages]) for row_id, messages in prompt_requests(asked)]
        for name, model in models.items():
            answers, usage = services.language_model.answer(model, requests, settings.evaluation.sampling)
            rows.append({
                "system_prompt": "that of the home" if system is None else system,
                "model": name,
                "n": usage.rows,
                "followed": sum(map(all, map(followed, asked["constraints"], answers["text"]))),
                "mean_words": answers["text"].str.split(" ").list.len().mean(),
                "cut": usage.cut / usage.rows,
            })  # fmt: skip
    return pl.DataFrame(rows)


if __name__ == "__main__":
    run(Path(sys.argv[1]).absolute(), int(sys.argv[2])).write_csv(sys.argv[3], float_precision=3)
