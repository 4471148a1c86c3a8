"""What a run will cost: tokens by counting, time from rates measured on this machine or from a small table of rates."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import polars as pl

from resources.settings.settings import Settings
from synpo_assets.method.templates import generator_instruction, generator_target, improver_instruction
from synpo_assets.method.verifiable import SAMPLES

TOKENS_PER_WORD = 1.4
CHAT_TOKENS = 30
Kind = Literal["generate", "train", "score"]

# Tokens per second of SmolLM2-135M (134.5 million parameters) in float32 on two cores of an AMD EPYC without AVX-512,
# as the assets of the laptop preset recorded them. Other model sizes are scaled by their number of parameters.
CPU_RATES: dict[Kind, float] = {"generate": 95.0, "train": 240.0, "score": 300.0}
CPU_RATES_PARAMETERS = 134.5e6


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast one kind of work goes.

    Attributes:
        tokens_per_second: Once it is under way.
        start_seconds: What it takes beforehand and afterwards, such as loading and saving the model.
    """

    tokens_per_second: float
    start_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What one asset has to do in one iteration.

    Attributes:
        asset: Its name.
        kind: Whether the tokens are written, trained on or scored.
        tokens: How many.
        later_only: Whether iteration 1 does without it, because its rows are found in finished shards.
        once: Whether it is made once, before iteration 1.
        accumulates: Whether iteration t has t times as much of it: the pairs of all iterations so far.
        most_tokens: What it never exceeds.
    """

    asset: str
    kind: Kind
    tokens: float
    later_only: bool = False
    once: bool = False
    accumulates: bool = False
    most_tokens: float = float("inf")

    def in_iteration(self, iteration: int) -> float:
        """The tokens of an iteration, counted from 1."""
        if self.later_only and iteration == 1:
            return 0.0
        return min(self.tokens * (iteration if self.accumulates else 1), self.most_tokens)


def expected_work(settings: Settings, seed: pl.DataFrame, instructions: int) -> list[Work]:
    """Upper bounds per asset: every completion is taken to be as long as allowed.

    Args:
        settings: The experiment.
        seed: The table of the asset `seed_pairs`.
        instructions: How many verifiable instructions there are.
    """
    train, judge, held_out = (seed.filter(split=split) for split in ("train", "judge", "held_out"))
    prompt, answer = (_tokens(" ".join(train[column])) / train.height for column in ("prompt", "answer"))
    written = settings.responses.sampling.max_new_tokens
    generator = settings.prompt_generator
    instruction = CHAT_TOKENS + _tokens(
        generator_instruction(["keyword"] * settings.keyword_pool.keywords_per_set)[0]["content"]
    )
    improving = CHAT_TOKENS + _tokens(improver_instruction("", "")[0]["content"]) + prompt + written
    wanted = generator.prompts_per_iteration
    asked = CHAT_TOKENS + prompt
    trained = {
        "prompt_generator": (generator.training, instruction + _tokens(generator_target("", "")) + prompt + answer),
        "reward_model": (settings.scorer.training, 2 * asked + answer + written),
        "judge_model": (settings.judge.training, 2 * asked + answer + written),
        "response_improver": (
            settings.response_improver.training if settings.trains_improver else None,
            improving + answer,
        ),
        "model_checkpoint": (settings.policy.training, 2 * (asked + written)),
    }
    pair_ranker = settings.scorer.kind == "pair_ranker"
    orders = 1 if settings.scorer.pair_convention == "one_order" else 2

    def compared(first: float, second: float) -> float:
        """Tokens read to compare two answers to a prompt."""
        return orders * (asked + first + second) if pair_ranker else 2 * asked + first + second

    # A reward model has M_0's answers to the held-out prompts scored already.
    gold = compared(answer, written) if pair_ranker else asked + answer
    work, examples = [], {"model_checkpoint": settings.preferences.pairs_per_iteration, "judge_model": judge.height}
    for asset, (training, length) in trained.items():
        if training is not None:
            rows = examples.get(asset, train.height)
            work.append(
                Work(
                    asset,
                    "train",
                    rows * training.epochs * length,
                    once=asset in ("prompt_generator", "reward_model", "judge_model"),
                    accumulates=asset == "model_checkpoint" and settings.policy.accumulate,
                    most_tokens=(training.max_examples or float("inf")) * training.epochs * length,
                )
            )
    judging = Work("preference_pairs", "score", wanted * compared(written, written))
    if settings.trains_improver:
        sides = [
            Work("initial_responses", "generate", wanted * written, later_only=True),
            Work("seed_responses", "generate", train.height * written, later_only=True),
            Work("seed_responses", "score", train.height * compared(answer, written)),
            Work("refined_responses", "generate", wanted * settings.response_improver.sampling.max_new_tokens),
            judging,
        ]
    else:
        # The first sample is the base response. A reward model reads each sample once, and has then read both sides.
        further = settings.preferences.ranked_samples - 1
        reading = further * compared(written, written) if pair_ranker else (further + 1) * (asked + written)
        sides = [
            Work("refined_responses", "generate", wanted * further * written),
            Work("refined_responses", "score", wanted * reading),
            *([judging] if pair_ranker else []),
        ]
    if pair_ranker:
        # M_t beside M_{t-1}, which a reward model has scored already.
        work.append(Work("evaluation", "score", held_out.height * compared(written, written), later_only=True))
    return [
        *work,
        Work("reward_model", "generate", (train.height + held_out.height) * written, once=True),
        Work("reward_model", "score", held_out.height * compared(answer, written), once=True),
        Work("judge_model", "generate", judge.height * written, once=True),
        Work("judge_model", "score", held_out.height * (2 * asked + answer + written), once=True),
        Work("self_instruct_prompts", "generate", wanted * settings.self_instruct_sampling.max_new_tokens, once=True),
        Work("synthetic_prompts", "generate", settings.keyword_sets_per_iteration * generator.sampling.max_new_tokens),
        Work("base_responses", "generate", wanted * written),
        *sides,
        Work("evaluation", "generate", held_out.height * written),
        # M_0's answers are found in the shards from the second iteration on.
        Work("instruction_following", "generate", 2 * SAMPLES * instructions * written),
        Work("gold_comparison", "score", 2 * held_out.height * (asked + answer)),
        Work("evaluation", "score", held_out.height * (compared(written, written) + gold)),
        # By the judge, which has scored M_0's and M_{t-1}'s answers already.
        Work("evaluation", "score", held_out.height * (asked + written)),
    ]


def rates_on_cpu(parameters: int) -> dict[Kind, Rate]:
    """Rates of a model with so many parameters on a CPU, from the table of known ones."""
    return {kind: Rate(rate * CPU_RATES_PARAMETERS / parameters) for kind, rate in CPU_RATES.items()}


def seconds(work: Work, rates: Mapping[Kind, Rate], iteration: int = 1) -> float:
    """Seconds that the work of an iteration takes at these rates."""
    rate, tokens = rates[work.kind], work.in_iteration(iteration)
    return rate.start_seconds + tokens / rate.tokens_per_second if tokens else 0.0


def parameter_count(weights: Path) -> int:
    """Parameters of a model directory, read from the headers of its safetensors files."""
    from safetensors import safe_open

    total = 0
    for file in weights.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                total += size
    return total


def _tokens(text: str) -> float:
    return len(text.split()) * TOKENS_PER_WORD
