"""The settings of one experiment: one YAML file, checked before anything is loaded.

A settings file may name a `preset` and state only what differs from it. Every number that the paper
(arXiv 2410.06961) leaves open is a field here, and its description says so.
"""

from typing import Any, Self

from pydantic import Field, model_validator

from resources.settings.cost import Cost
from resources.settings.data import InitialPolicy, KeywordPool, SeedData
from resources.settings.evaluation import (
    RULE_GAIN,
    Benchmarks,
    Checks,
    Diversity,
    Evaluation,
    Gate,
    Judge,
    TrainedJudge,
)
from resources.settings.machine import Engine, Storage
from resources.settings.method import (
    PreferenceOptimization,
    Preferences,
    PromptGenerator,
    ResponseImprover,
    Responses,
    RewardTraining,
    Sampling,
    Scorer,
    ScoringSection,
)
from resources.settings.publishing import Automation, Publishing
from resources.settings.sections import Section, merge, section_of
from resources.settings.training import Training, TrainingProcesses


class Settings(Section):
    """All settings of one experiment."""

    preset: str = Field("none", description="The preset this file builds on.")
    # PyTorch takes 32 bits, and the judge's is one more.
    random_seed: int = Field(42, ge=0, le=2**32 - 2, description="Every random draw derives from this number.")
    max_iterations: int = Field(4, ge=1, le=9999, description="Number of iteration partitions. Paper: T = 4.")
    initial_policy: InitialPolicy
    seed_data: SeedData
    keyword_pool: KeywordPool
    prompt_generator: PromptGenerator
    diversity: Diversity = Field(default_factory=Diversity)
    responses: Responses
    response_improver: ResponseImprover
    scorer: Scorer = Field(
        description="`kind` is trained, verifier, pretrained or pair_ranker; each has fields of its own."
    )
    preferences: Preferences
    preference_optimization: PreferenceOptimization
    evaluation: Evaluation
    judge: Judge = Field(description="`kind` is trained or pretrained; each has fields of its own.")
    engine: Engine = Field(default_factory=lambda: Engine.model_validate({}))
    training_processes: TrainingProcesses = Field(default_factory=lambda: TrainingProcesses.model_validate({}))
    storage: Storage = Field(default_factory=lambda: Storage.model_validate({}))
    checks: Checks = Field(default_factory=Checks)
    gate: Gate = Field(default_factory=Gate)
    automation: Automation = Field(default_factory=Automation)
    cost: Cost = Field(default_factory=Cost)
    publishing: Publishing = Field(default_factory=Publishing)
    benchmarks: Benchmarks = Field(default_factory=Benchmarks)

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "policy" in values:
            raise ValueError(
                "`policy` is now `preference_optimization`: rename the section. beta and gamma stand under "
                "`preference_optimization.loss`, with `kind: simpo`, all else as before."
            )
        return values

    @model_validator(mode="before")
    @classmethod
    def _judge_like_the_scorer(cls, values: Any) -> Any:
        """What the section `judge` leaves out is as in the section `scorer`."""
        if not isinstance(values, dict) or not isinstance(values.get("judge", {}), dict):
            return values
        scorer, judge = section_of(values, "scorer"), {"kind": "trained"} | section_of(values, "judge")
        names = ("training", "max_length") if judge["kind"] == "trained" else ("max_length",)
        shared = {name: scorer[name] for name in names if scorer.get(name) is not None}
        defaults = {"max_length": ScoringSection.model_fields["max_length"].default}
        return values | {"judge": merge(defaults | shared, judge, [TrainedJudge])}

    @model_validator(mode="before")
    @classmethod
    def _evaluated_like_the_responses(cls, values: Any) -> Any:
        """What the sampling of `evaluation` leaves out is as in the section `responses`."""
        if not isinstance(values, dict) or not isinstance(values.get("evaluation", {}), dict):
            return values
        shared = {name: value for name, value in section_of(values, "responses").items() if name == "sampling"}
        return values | {"evaluation": merge(shared, section_of(values, "evaluation"), [Evaluation])}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        wanted, kept = self.prompt_generator.prompts_per_iteration, self.preferences.pairs_per_iteration
        if kept > wanted:
            raise ValueError(
                f"preferences.pairs_per_iteration ({kept}) is more than prompt_generator.prompts_per_iteration ({wanted}): "
                "each prompt gives at most one pair. Lower the first or raise the second."
            )
        if self.keywords_from_seed_prompt < 1:
            raise ValueError(
                f"prompt_generator.noise_keywords ({self.prompt_generator.noise_keywords}) leaves no keyword of the seed "
                f"prompt itself: it must be less than keyword_pool.keywords_per_set ({self.keyword_pool.keywords_per_set})."
            )
        if self.prompt_generator.min_words > self.prompt_generator.max_words:
            raise ValueError("prompt_generator.min_words is larger than max_words: no prompt could pass.")
        if self.keyword_sets_per_iteration > self.keyword_pool.max_sets:
            raise ValueError(
                f"keyword_pool.max_sets ({self.keyword_pool.max_sets}) is less than the {self.keyword_sets_per_iteration} "
                "keyword sets that one iteration may draw (prompts_per_iteration x max_overdraw)."
            )
        sampling = self.responses.sampling
        if not self.trains_improver and (sampling.temperature == 0 or sampling.top_k == 1):
            raise ValueError(
                "preferences.chosen_from is `ranked_samples` and responses.sampling is greedy (temperature 0 or top_k 1), so all "
                "samples of a prompt would be equal: raise responses.sampling.temperature (paper: 0.7) or top_k."
            )
        if self.response_improver.own_answers and self.preferences.rejected_from == "previous":
            raise ValueError(
                "response_improver.own_answers is true and preferences.rejected_from is `previous`: M_{t-1}'s own answer is then "
                "the rejected one and never chosen. Remove one of the two."
            )
        if self.response_improver.keep_right_answers and self.scorer.kind != "verifier":
            raise ValueError(
                f"response_improver.keep_right_answers is true and scorer.kind is `{self.scorer.kind}`, so no prompt has "
                "rules: set scorer.kind to `verifier`, or remove keep_right_answers."
            )
        limited = self.gate.minimum.keys() | self.gate.maximum.keys()
        of_instructions = [name for name in limited if name == "verifiable_rate_gain" or name.startswith(RULE_GAIN)]
        if of_instructions and self.seed_data.verifiable is None:
            raise ValueError(
                f"gate limits {min(of_instructions)} and seed_data.verifiable is not stated, so no M_t could be measured: name a "
                "file of instructions there, or remove the limit."
            )
        if self.preference_optimization.equal_steps_control and self.preference_optimization.policy_init == "previous":
            raise ValueError(
                "preference_optimization.equal_steps_control is true and policy_init is `previous`: a control that begins with "
                "M_{t-1} has learned from later pairs too. Set policy_init to `initial`, or the control to false."
            )
        if self.preference_optimization.equal_steps_control and self.max_iterations == 1:
            raise ValueError(
                "preference_optimization.equal_steps_control is true and max_iterations is 1: in iteration 1 the control of equal "
                "steps is M_1 itself. Raise max_iterations, or switch the control off."
            )
        search = self.preference_optimization.search
        if search is not None and search.metric == "instructions" and self.seed_data.verifiable is None:
            raise ValueError(
                "preference_optimization.search.metric is `instructions` and seed_data.verifiable is not stated, so no candidate "
                "could be measured: name a file of instructions there, or choose another metric."
            )
        if search is not None and (search.parallel or 1) > 1 and self.training_processes.spreads:
            raise ValueError(
                f"preference_optimization.search.parallel is {search.parallel}, and training_processes spreads each training over "
                "several processes: set parallel to 1, or leave out training_processes.processes and accelerate_config."
            )
        if self.seed_data.train == self.seed_data.held_out:
            raise ValueError(
                "seed_data.train and seed_data.held_out are the same data: held-out pairs must never be trained on."
            )
        return self

    @property
    def trainings(self) -> list[tuple[str, Training]]:
        """All training runs that the settings ask for, each with the section that it stands in."""
        optimization = self.preference_optimization
        tried = optimization.search.possible if optimization.search else [{}]
        trainings = [("prompt_generator", self.prompt_generator.training)]
        trainings += [("response_improver", self.response_improver.training)] if self.trains_improver else []
        trainings += [("preference_optimization", optimization.with_values(each).training) for each in tried]
        trainings += [("scorer", self.scorer.training)] if isinstance(self.scorer, RewardTraining) else []
        return trainings + ([("judge", self.judge.training)] if isinstance(self.judge, TrainedJudge) else [])

    @property
    def trains_improver(self) -> bool:
        """Whether there is a response improver; ranked samples do without it."""
        return self.preferences.chosen_from == "improver"

    @property
    def keywords_from_seed_prompt(self) -> int:
        """Keywords of the seed prompt itself that the generator is trained on, besides the noise."""
        return self.keyword_pool.keywords_per_set - self.prompt_generator.noise_keywords

    @property
    def keyword_sets_per_iteration(self) -> int:
        """Keyword sets that one iteration draws: the prompts wanted times the stated cap."""
        return round(self.prompt_generator.prompts_per_iteration * self.prompt_generator.max_overdraw)

    @property
    def compared_prompts(self) -> int:
        """Prompts of each source that prompt_diversity compares at most."""
        return min(self.diversity.sample_size, self.prompt_generator.prompts_per_iteration)

    @property
    def self_instruct_sampling(self) -> Sampling:
        """How the Self-Instruct baseline is decoded."""
        return self.diversity.self_instruct_sampling or self.prompt_generator.sampling
