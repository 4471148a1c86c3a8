"""The stages of the method in order, and what follows them: the modules whose assets make up the graph."""

from synpo_assets import (
    diversity,
    evaluation,
    loop,
    measurements,
    preferences,
    promotion,
    prompts,
    publishing,
    report,
    responses,
    seed,
    training,
)

STAGES = (
    seed, prompts, diversity, preferences, loop, responses, training, evaluation, measurements, promotion, report,
    publishing,
)  # fmt: skip
