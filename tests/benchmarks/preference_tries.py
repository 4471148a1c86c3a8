"""What settings of preference optimization teach, and what they cost: instructions followed, likelihood of gold, and length.

    python -m tests.benchmarks.preference_tries HOME ITERATIONS FILE.csv

M_0 is trained on the pairs of iterations 1 to ITERATIONS of a finished home by each of the tries below, and once on the chosen
answers alone, which shows what the rejected ones add. Everything is measured on dev, beside M_0. Test is not read.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from resources.settings.method import PreferenceOptimization
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from tests.benchmarks.controls import trained_in

# What is changed from the settings of the home, and trained for two passes.
TRIES: dict[str, dict[str, Any]] = {
    "as in the home": {},
    "learning rate 2e-4": {"learning_rate": 2e-4},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "beta 0.5, gamma 0.25": {"loss.beta": 0.5, "loss.gamma": 0.25},
    "alpha 4": {"loss.alpha": 4.0},
    "alpha 16": {"loss.alpha": 16.0},
    "alpha 4, beta 0.5, gamma 0.25": {"loss.alpha": 4.0, "loss.beta": 0.5, "loss.gamma": 0.25},
}
EPOCHS = 2.0
CHOSEN_ALONE = "SFT on the chosen answers"
SAMPLES = 2


def stated_gold(settings: Settings) -> dict[str, str]:
    """The gold answer to each verifiable instruction, which the table of instructions leaves out."""
    from resources.storage.seed_source import read_rows

    assert settings.seed_data.verifiable is not None, "The settings name no verifiable instructions."
    rows = read_rows(settings.seed_data.verifiable, "instructions", ("prompt", "answer"))
    return {row["prompt"]: row["answer"] for _, row in rows}


def run(home: Path, iterations: int, file: Path) -> None:
    """Trains and measures every try, and writes a row for each model."""
    os.environ["SYNPO_HOME"] = str(home.absolute())
    from definitions import build
    from resources.settings.files import home_settings
    from synpo_assets.evaluation.instruction_following import instruction_answers
    from synpo_assets.graph.partitions import partition_key
    from synpo_assets.method.cut import whole_answers
    from synpo_assets.method.evaluation import mean_gain
    from synpo_assets.method.templates import prompt_requests
    from synpo_assets.method.verifiable import shares_followed
    from synpo_assets.stages.optimization import USED_COLUMNS
    from synpo_assets.stages.seed import verifiable_table

    settings = home_settings(home.absolute())
    settings = settings.model_copy(
        update={"evaluation": settings.evaluation.model_copy(update={"instruction_samples": SAMPLES})}
    )
    services = build(settings, home.absolute())[1]
    initial, options = services.checkpoints.current("initial_policy", None), settings.preference_optimization
    keys = map(partition_key, range(1, iterations + 1))
    pairs = pl.concat([services.tables.read("preference_pairs", key) for key in keys]).select(*USED_COLUMNS).to_dicts()
    instructions = verifiable_table(settings)[0].filter(split="dev")
    held_out = services.tables.read("evaluation", "0001").filter(sample=1, split="dev")
    stated = stated_gold(settings)
    gold = {
        "held-out prompts": held_out.select("prompt", "answer").rows(),
        "instructions": [(prompt, stated[prompt]) for prompt in instructions["prompt"]],
    }
    rows, first, templates = list[dict[str, Any]](), dict[str, pl.Series](), instructions["template"]

    def measure(name: str, model: Checkpoint, steps: int) -> None:
        asked, _ = instruction_answers(services, {"candidate": model}, instructions)
        answers, _ = services.language_model.answer(model, prompt_requests(held_out), settings.evaluation.sampling)
        measured = {"instructions": shares_followed(asked, ("candidate",))["candidate"]}
        for what, texts in gold.items():
            measured[f"gold of {what}"] = pl.Series(services.likelihood.measure(model, texts).per_token)
        row: dict[str, Any] = {"model": name, "steps": steps}
        for what, values in measured.items():
            gained, groups = values - first.setdefault(what, values), templates if "instructions" in what else None
            gain, low, high = mean_gain(gained, groups)
            row |= {what: values.mean(), f"{what}, gain": gain, f"{what}, low": low, f"{what}, high": high}
        words = {"instructions": asked["candidate_response"], "held-out prompts": whole_answers(answers)}
        row |= {f"words, {what}": written.str.split(" ").list.len().mean() for what, written in words.items()}
        rows.append(row)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
        pl.DataFrame(rows).write_csv(file, float_precision=6)

    def trained(name: str, train: Callable[[Path], Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            made = train(Path(folder))
            measure(name, trained_in(Path(folder)), made.steps)

    def preferring(tried: PreferenceOptimization) -> Callable[[Path], Any]:
        return lambda folder: services.trainer.train("preference", initial, pairs, tried.training, folder, tried.loss)

    measure("M_0", initial, 0)
    base = options.with_values({"epochs": EPOCHS})
    for name, values in TRIES.items():
        trained(name, preferring(base.with_values(values)))
    chosen = [(pair["prompt"], pair["chosen"][0]["content"]) for pair in pairs]
    trained(CHOSEN_ALONE, lambda folder: services.trainer.train("supervised", initial, chosen, base.training, folder))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
