"""What a run will cost: tokens by counting, time from rates measured on this machine or from a small table of rates."""

import dataclasses
from collections.abc import Mapping

import polars as pl

from resources.settings.settings import Settings
from synpo_assets.algorithm import stages_of
from synpo_assets.graph.cost import Kind, Sizes, Work
from synpo_assets.graph.stage import Stage
from synpo_assets.method.seed import IS_HELD_OUT
from synpo_assets.method.templates import generator_instruction, generator_target, improver_instruction

TOKENS_PER_WORD = 1.4
CHAT_TOKENS = 30

# Tokens per second of SmolLM2-135M (134.5 million parameters) on two cores of an AMD EPYC, as assets recorded them: float32
# without AVX-512, and bfloat16 with instructions for it. Other model sizes are scaled by their number of parameters.
CPU_RATES: dict[str, dict[Kind, float]] = {
    "float32": {"generate": 95.0, "train": 240.0, "score": 300.0},
    "bfloat16": {"generate": 390.0, "train": 480.0, "score": 2100.0},
}
CPU_RATES_PARAMETERS = 134.5e6


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast one kind of work goes once it is under way, and what loading and saving the model take besides."""

    tokens_per_second: float
    start_seconds: float = 0.0


def sizes_of(settings: Settings, seed: pl.DataFrame, instructions: int) -> Sizes:
    """How much there is to do, in rows and tokens; `instructions` is the number of verifiable instructions."""
    train, judge, scorer = (seed.filter(split=split) for split in ("train", "judge", "scorer"))
    prompt, answer = (_tokens(" ".join(train[column])) / train.height for column in ("prompt", "answer"))
    keywords = generator_instruction(["keyword"] * settings.keyword_pool.keywords_per_set)[0]["content"]
    return Sizes(
        settings=settings,
        train=train.height,
        judge=judge.height,
        scorer=scorer.height,
        held_out=seed.filter(IS_HELD_OUT).height,
        instructions=instructions,
        asked=CHAT_TOKENS + prompt,
        gold=answer,
        generator_instruction=_tokens(keywords) + _tokens(generator_target("", "")),
        improver_instruction=_tokens(improver_instruction("", "")[0]["content"]),
    )


def expected_work(sizes: Sizes) -> list[tuple[Stage, Work]]:
    """What each stage has to do, as it states it."""
    return [(stage, work) for stage in stages_of(sizes.settings) if stage.cost for work in stage.cost(sizes)]


def rates_on_cpu(parameters: int, dtype: str) -> dict[Kind, Rate]:
    """Rates of a model with so many parameters on a CPU, from the table of known ones."""
    return {kind: Rate(rate * CPU_RATES_PARAMETERS / parameters) for kind, rate in CPU_RATES[dtype].items()}


def seconds(work: Work, rates: Mapping[Kind, Rate], iteration: int = 1) -> float:
    """Seconds that the work of an iteration takes at these rates."""
    rate, tokens = rates[work.kind], work.in_iteration(iteration)
    return rate.start_seconds + tokens / rate.tokens_per_second if tokens else 0.0


def _tokens(text: str) -> float:
    return len(text.split()) * TOKENS_PER_WORD
