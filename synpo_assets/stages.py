"""The stages of the method in order, and what follows them: the modules whose assets make up the graph."""

from resources.settings import active_settings
from synpo_assets import (
    benchmarks,
    diversity,
    evaluation,
    improver,
    loop,
    measurements,
    preferences,
    promotion,
    prompts,
    publishing,
    ranked_samples,
    report,
    responses,
    seed,
    training,
)

# Both define refined_responses and initial_responses, so that what follows need not know which of them is at work.
SIDES = improver if active_settings().trains_improver else ranked_samples
STAGES = (
    seed, prompts, diversity, preferences, loop, responses, SIDES, training, evaluation, measurements, promotion, report,
    publishing, benchmarks,
)  # fmt: skip
