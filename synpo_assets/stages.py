"""The stages of the method in order, and what follows them: the modules whose assets make up the graph."""

from synpo_assets import (
    benchmarks,
    diversity,
    evaluation,
    loop,
    preferences,
    prompts,
    publishing,
    report,
    responses,
    seed,
    training,
)

STAGES = (
    seed, prompts, diversity, preferences, loop, responses, training, evaluation, report, publishing, benchmarks,
)  # fmt: skip
