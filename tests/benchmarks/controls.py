"""Controls of the yardstick: what the judge says of models and answers that are known to be no better, and of gold.

    python -m tests.benchmarks.controls HOME FILE.csv

HOME is a home with a finished iteration 1. Every control is judged by its independent judge over M_0's answers to all held-out
prompts, dev and test: nothing is chosen here.

- `M_0 trimmed`, `M_0 verbose`: the rows of `evaluation` that show what form alone wins.
- `sham`, and `sham longer`, four times the steps: M_0 trained on its own answers to seed and synthetic prompts, cut at a low
  limit: chosen is what is left of an answer after trimming, closed, and rejected is the answer as it was cut. No pair has new
  content.
- `M_1`, and `D_1`, four times the steps: the pairs of iteration 1, as M_1 and as long as M_4 would be trained.
- `gold`, `gold over damaged gold`, `gold over gold of another prompt`: gold over M_0, and over what is known to be worse.
"""

import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from resources.settings.method import Sampling
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import file_sha256

SHAM_TOKENS = 24
LONGER = 4
COLUMNS = (
    "control", "n", "win_rate", "low", "high", "length_controlled", "length_controlled_low", "length_controlled_high",
    "characters", "cut",
)  # fmt: skip


def trained_in(folder: Path) -> Checkpoint:
    """The model that a training left in a folder, to be asked; it is in no store."""
    sha = file_sha256(next((folder / "merged").glob("*.safetensors")))
    return Checkpoint("benchmark", None, sha, str(folder / "merged"), str(folder))


class Controls:
    """The models, answers and judge of a finished home."""

    def __init__(self, services: Any) -> None:
        from resources.judging.judge_choice import judge_scorer

        self.services, self.options = services, services.settings.evaluation
        self.initial = services.checkpoints.current("initial_policy", None)
        self.scorer = judge_scorer(services.settings.judge, services.scorer)
        self.judge = services.checkpoints.current("judge_model", None)
        self.held_out = services.tables.read("evaluation", "0001").filter(sample=1)
        self.rows = list[dict[str, Any]]()

    def compare(self, name: str, better: pl.Series, worse: pl.Series | None = None, cut: float | None = None) -> None:
        """Judges answers over M_0's, or over others."""
        from synpo_assets.method.length_control import length_controlled_interval, length_controlled_win_rate
        from synpo_assets.method.outcomes import outcomes, win_rate, win_rate_interval

        worse = self.held_out["initial_response"] if worse is None else worse
        kept = pl.DataFrame({"prompt": self.held_out["prompt"], "better": better, "worse": worse}).filter(
            pl.col("better") != "", pl.col("worse") != ""
        )
        judged = outcomes(self.scorer.compare(self.judge, kept.rows(), judging=True).margins)
        lengths, others = (kept[side].str.len_chars().cast(pl.Int64) for side in ("better", "worse"))
        low, high = win_rate_interval(judged) or (None, None)
        controlled = length_controlled_win_rate(judged, lengths, others)
        ends = length_controlled_interval(judged, lengths, others, 0) or (None, None)
        values = (name, kept.height, win_rate(judged), low, high, controlled, *ends, lengths.mean(), cut)
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        sys.stdout.write(f"{self.rows[-1]}\n")

    def trained(self, name: str, pairs: list[dict[str, Any]], steps: int | None, folder: Path) -> None:
        """Trains M_0 on pairs as M_t is trained, and judges the answers of the result."""
        from synpo_assets.method.cut import whole_answers
        from synpo_assets.method.templates import prompt_requests

        options, place = self.services.settings.preference_optimization, folder / name.replace(" ", "_")
        place.mkdir()
        made = self.services.trainer.train(
            "preference", self.initial, pairs, options.training, place, options.loss, steps
        )
        model = trained_in(place)
        answers, _ = self.services.language_model.answer(model, prompt_requests(self.held_out), self.options.sampling)
        cut = (answers["finish_reason"] == "length").mean()
        self.compare(f"{name}, {made.steps} steps", whole_answers(answers), cut=float(cut or 0))

    def sham_pairs(self) -> list[dict[str, Any]]:
        """M_0's cut answers, trimmed and closed, over the same as they were."""
        from synpo_assets.method.cut import whole_answers
        from synpo_assets.method.templates import prompt_requests, user_message

        seed = self.services.tables.scan("seed_pairs").collect().filter(split="train").select("prompt_id", "prompt")
        written = self.services.tables.read("synthetic_prompts", "0001").select("prompt_id", "prompt")
        prompts, sampling = pl.concat([seed, written]), self.services.settings.responses.sampling
        limited = Sampling(**sampling.model_dump() | {"max_new_tokens": SHAM_TOKENS})
        answers, _ = self.services.language_model.answer(self.initial, prompt_requests(prompts), limited)
        whole = whole_answers(answers)
        rows = zip(prompts["prompt"], whole, answers["text"].str.strip_chars(), answers["finish_reason"], strict=True)
        pairs = [
            {
                "prompt": user_message(prompt), "iteration": 1,
                "chosen": [{"role": "assistant", "content": trimmed}], "chosen_finish_reason": "stop",
                "rejected": [{"role": "assistant", "content": raw}], "rejected_finish_reason": "length",
            }
            for prompt, trimmed, raw, reason in rows
            if reason == "length" and trimmed
        ]  # fmt: skip
        return random.Random(0).sample(pairs, len(pairs))


def run(home: Path, file: Path) -> None:
    """Runs all controls and writes their table."""
    os.environ["SYNPO_HOME"] = str(home.absolute())
    from definitions import build
    from resources.settings.files import home_settings
    from synpo_assets.method.damage import all_damages
    from synpo_assets.method.judging import other_answers
    from synpo_assets.stages.optimization import USED_COLUMNS

    services = build(home_settings(home.absolute()), home.absolute())[1]
    controls = Controls(services)
    held_out, texts = controls.held_out, controls.held_out["answer"].to_list()
    others = other_answers(texts)
    controls.compare("M_0 trimmed", held_out["trimmed_response"])
    controls.compare("M_0 verbose", held_out["verbose_response"])
    controls.compare("M_1", held_out["candidate_response"], cut=float(held_out["candidate_cut"].mean() or 0))
    controls.compare("gold", held_out["answer"], cut=0.0)
    controls.compare("gold over gold of another prompt", held_out["answer"], pl.Series(others))
    draw = random.Random(0)
    found = [list(all_damages(gold, other, 0).values()) for gold, other in zip(texts, others, strict=True)]
    damages = [draw.choice(each) if each else "" for each in found]
    controls.compare("gold over damaged gold", held_out["answer"], pl.Series(damages))
    with tempfile.TemporaryDirectory() as folder:
        pairs = services.tables.read("preference_pairs", "0001").select(*USED_COLUMNS).to_dicts()
        size = services.settings.preference_optimization.training.batch_size
        controls.trained("D_1", pairs, LONGER * -(-len(pairs) // size), Path(folder))
        controls.trained("sham", controls.sham_pairs()[: len(pairs)], -(-len(pairs) // size), Path(folder))
        controls.trained("sham longer", controls.sham_pairs(), LONGER * -(-len(pairs) // size), Path(folder))
    pl.DataFrame(controls.rows, schema_overrides={"cut": pl.Float64}).write_csv(file, float_precision=4)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
