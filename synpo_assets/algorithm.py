"""The stages of the method in order, and what follows them: the modules whose assets make up the graph."""

from resources.settings.files import active_settings
from synpo_assets.evaluation import benchmarks, diversity, promotion
from synpo_assets.evaluation import gold_comparison as measurements
from synpo_assets.evaluation import win_rates as evaluation
from synpo_assets.publishing import published as publishing
from synpo_assets.reports import boosting_report as report
from synpo_assets.stages import improver, loop, preferences, prompts, ranked_samples, responses, seed
from synpo_assets.stages import optimization as training

# Both define refined_responses and initial_responses, so that what follows need not know which of them is at work.
SIDES = improver if active_settings().trains_improver else ranked_samples
STAGES = (
    seed, prompts, diversity, preferences, loop, responses, SIDES, training, evaluation, measurements, promotion, report,
    publishing, benchmarks,
)  # fmt: skip
