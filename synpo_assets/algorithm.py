"""Algorithm 1 of the paper, line by line, each with the module that does it. The first file to read.

Input: M_0 (an SFT model), seed pairs (x*, y*), a corpus for the keyword pool K, a scorer F. D = {}.

    line  the paper                                                    here
       0  train the prompt generator G from M_0; build K               seed.py, prompts.py
       1  draw keywords from K; write prompts x_i with G               prompts.py
       2  answer the seed with M_{t-1}; train the improver R_t         improver.py
       3  answer x_i with M_{t-1}; rewrite the answers with R_t        responses.py, improver.py
       4  answer x_i with M_0; keep the pairs that F calls valid       improver.py, preferences.py
          D <- D + kept                                                loop.py (preference_history)
       5  train M_t on D from M_0, with SimPO                          optimization.py
          search beta (where a setting asks for it)                    evaluation/search.py
          M_t enters iteration t + 1                                   loop.py (policy)

What is measured of M_t, and whether it enters the next iteration, is in evaluation/.
"""

from resources.settings.settings import Settings
from synpo_assets.evaluation import (
    agreement,
    benchmarks,
    diversity,
    equal_steps,
    gold_comparison,
    improver_edits,
    instruction_following,
    promotion,
    search,
    win_rates,
)
from synpo_assets.graph.stage import Stage, stages_in
from synpo_assets.publishing import published
from synpo_assets.reports import boosting_report
from synpo_assets.stages import (
    best_rewrites,
    improver,
    loop,
    optimization,
    preferences,
    prompts,
    ranked_samples,
    responses,
    reviews,
    scorers,
    seed,
)

ALGORITHM = (seed, scorers, prompts, loop, responses, preferences, optimization)
# Both make the two sides of a pair, so that what follows need not know which of them is in use.
CHOSEN_FROM = {"improver": improver, "ranked_samples": ranked_samples}
MEASURES = (
    win_rates,
    instruction_following,
    gold_comparison,
    diversity,
    promotion,
    benchmarks,
    boosting_report,
    published,
)


def stages_of(settings: Settings) -> list[Stage]:
    """The stages of an experiment, and what measures, reports and publishes what they made."""
    # M_t is trained once, or is the best of several candidates.
    searched = settings.preference_optimization.search is not None
    algorithm = [search if searched and each is optimization else each for each in ALGORITHM]
    sides = [CHOSEN_FROM[settings.preferences.chosen_from]]
    if settings.trains_improver and settings.response_improver.samples > 1:
        # After the improver, whose chosen side it takes the place of.
        sides.append(best_rewrites)
    controls = [equal_steps] if settings.preference_optimization.equal_steps_control else []
    if settings.trains_improver and settings.response_improver.damaged_copies:
        controls.append(improver_edits)
    if settings.preferences.reviewed:
        controls += [reviews, agreement]
    return stages_in([*sides, *algorithm, *MEASURES, *controls])


def sides_of(settings: Settings) -> dict[str, str]:
    """The assets that make the two sides of a pair, by the names that other stages have for them."""
    return {stage.side: stage.name for stage in stages_of(settings) if stage.side}
