"""How much of a seed M_0 can learn at all: fine-tuned on gold, how many of the dev instructions does it follow?

    python -m tests.benchmarks.ceiling HOME FILE.csv

HOME holds M_0 (`dg launch --assets initial_policy`), and its settings name a seed whose rows have constraints. M_0 is trained for
one pass on the gold of these rows, with adapters on all layers, by each number of rows and learning rate below; then it answers
the dev instructions once each. What the loop reaches is to be read as a share of this. Test is not read.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from resources.settings.method import Sampling
from resources.settings.training import Lora, Training
from resources.storage.checkpoint_store import Checkpoint
from tests.benchmarks.controls import trained_in

# Rows, and peak learning rates of adapters of rank 16.
VARIANTS = ((480, 1e-3), (None, 1e-3))
MAX_NEW_TOKENS = 192


def run(home: Path, file: Path) -> None:
    """Trains and measures every variant, and writes a row for each model and kind of task."""
    os.environ["SYNPO_HOME"] = str(home.absolute())
    from definitions import build
    from resources.settings.files import home_settings
    from resources.storage.seed_source import read_rows
    from synpo_assets.method.outcomes import share_interval
    from synpo_assets.method.rules import followed, read_constraints
    from synpo_assets.method.templates import prompt_requests, user_message
    from synpo_assets.stages.seed import verifiable_table

    settings = home_settings(home.absolute())
    services = build(settings, home.absolute())[1]
    initial = services.checkpoints.current("initial_policy", None)
    instructions = verifiable_table(settings)[0].filter(split="dev")
    stated = {
        row["prompt"]: row for _, row in read_rows(settings.seed_data.verifiable, "instructions", ("prompt", "kind"))
    }
    seed = [row for _, row in read_rows(settings.seed_data.train, "seed", ("prompt", "answer", "constraints"))]
    taught = [(user_message(row["prompt"]), row["answer"]) for row in seed if row["constraints"]]
    sampling = Sampling(temperature=0.7, top_k=50, max_new_tokens=MAX_NEW_TOKENS)
    rows = list[dict[str, Any]]()

    def measure(name: str, model: Checkpoint) -> None:
        answers, _ = services.language_model.answer(model, prompt_requests(instructions), sampling)
        held = [
            all(followed(read_constraints(constraints), answer))
            for constraints, answer in zip(instructions["constraints"], answers["text"], strict=True)
        ]
        kinds = [stated[prompt]["kind"] for prompt in instructions["prompt"]]
        found = pl.DataFrame({"kind": kinds, "held": held, "words": answers["text"].str.split(" ").list.len()})
        for kind in ("all", *sorted(set(kinds))):
            part = found if kind == "all" else found.filter(kind=kind)
            low, high = share_interval(part["held"].to_list()) or (None, None)
            rows.append({
                "model": name, "kind": kind, "n": part.height, "followed": part["held"].mean(), "low": low, "high": high,
                "words": part["words"].median(), "cut": float((answers["finish_reason"] == "length").mean() or 0),
            })  # fmt: skip
        sys.stdout.write(f"{rows[-len(set(kinds)) - 1]}\n")
        pl.DataFrame(rows).write_csv(file, float_precision=4)

    measure("M_0", initial)
    for count, rate in VARIANTS:
        training = Training(
            learning_rate=rate, epochs=1, batch_size=8, micro_batch_size=8, max_length=320, lora=Lora(rank=16, alpha=32),
            max_examples=count,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            made = services.trainer.train("supervised", initial, taught, training, Path(folder))
            measure(f"SFT on {made.examples} rows", trained_in(Path(folder)))


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
