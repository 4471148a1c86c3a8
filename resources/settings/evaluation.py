"""How prompts and models are measured, and what M_t must reach."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from resources.settings.data import EmbeddingModel
from resources.settings.machine import ServerAccess, refuse_secrets
from resources.settings.method import PretrainedScorer, Sampling, TrainedScorer
from resources.settings.sections import Section
from resources.settings.training import Training


class Diversity(Section):
    """How varied the synthetic prompts are, beside the seed and a Self-Instruct baseline (paper, section on diversity)."""

    sample_size: int = Field(
        1000, ge=2, description="Prompts compared at most, of each source; the smallest source decides. Paper: 1,000."
    )
    clusters: int = Field(
        30,
        ge=1,
        description="Clusters that all prompts are sorted into. The paper has a judge name 30 topics instead, as the model of "
        "judge.server does here where it is stated.",
    )
    embedding_model: EmbeddingModel = Field(default_factory=EmbeddingModel)
    self_instruct_shots: int = Field(
        8, ge=1, description="Seed prompts shown to M_0 when it writes one of the baseline. Self-Instruct: 8."
    )
    self_instruct_max_words: int = Field(
        150, ge=1, description="Longer seed prompts are not shown. Self-Instruct drops instructions above 150 words."
    )
    self_instruct_sampling: Sampling | None = Field(
        None, description="Decoding of the baseline. None: as prompt_generator.sampling."
    )


class Evaluation(Section):
    """How models answer the held-out prompts and the verifiable instructions."""

    sampling: Sampling = Field(
        description="Decoding of these answers. What is left out is as in `responses`. Paper: T = 0.7 and 2,048 new tokens."
    )
    samples: int = Field(
        1,
        ge=1,
        description="Answers of each model to a held-out prompt; the intervals are then over prompts, each with all its answers. "
        "Paper: 1.",
    )
    instruction_samples: int = Field(
        3,
        ge=1,
        description="Answers of each model to a verifiable instruction. With one, the share that M_0 follows moves by ten points "
        "with the random seed. Not in the paper.",
    )


class JudgeServer(ServerAccess):
    """A model behind OpenAI's chat API that judges and labels: on this machine, in the house or at a provider."""

    model: str = Field(description="The name under which the server has the model.")
    template: str | None = Field(
        None,
        description="A jinja file (relative to the settings file) that makes the request from `prompt`, `answer_a` and "
        '`answer_b`; the reply must be JSON, {"better": "A"}, "B" or "tie". None: resources/judging/comparison.jinja.',
    )
    extra_body: Annotated[dict[str, Any], AfterValidator(refuse_secrets)] = Field(
        default_factory=dict,
        description="Further fields of each request, or others in place of ours: temperature (0), max_tokens (256), "
        "response_format; null leaves one out. A model of OpenAI that reasons wants {temperature: null, max_tokens: null, "
        "max_completion_tokens: 4000}.",
    )

    @field_validator("extra_body")
    @classmethod
    def _ours_alone(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if ours := sorted(fields.keys() & {"model", "messages", "n", "stream"}):
            raise ValueError(f"`{ours[0]}` is set by the judge itself: remove it.")
        return fields


class JudgingSection(Section):
    """What all independent judges have in common."""

    kind: str
    max_length: int = Field(
        ge=8, description="Longest prompt and answer that it reads, in tokens. Left out: that of the scorer."
    )
    server: JudgeServer | None = Field(
        None,
        description="One more judge, asked in both orders; prompt_diversity also has it name topic and intention of each prompt "
        "compared. None: there is none.",
    )


class TrainedJudge(JudgingSection):
    """A reward model as independent judge, trained here on rows of the seed that no other training reads."""

    kind: Literal["trained"] = "trained"
    training: Training = Field(
        description="The training of the independent judge, from M_0 on the pairs of seed_data.judge_limit with another random "
        "seed. Left out: that of the scorer. Not in the paper."
    )

    @property
    def scorer(self) -> TrainedScorer:
        """How its scores are read."""
        return TrainedScorer(training=self.training, max_length=self.max_length)


class PretrainedJudge(JudgingSection):
    """A published reward model as independent judge, which no part of the seed is set aside for."""

    kind: Literal["pretrained"] = "pretrained"
    name: str = Field(
        description="Id or directory of the published reward model, a sequence classifier with one output. Paper: GPT-4 Turbo."
    )
    revision: str | None = Field(None, description="Revision of the hub model named here. None: main.")

    @property
    def scorer(self) -> PretrainedScorer:
        """How its scores are read."""
        return PretrainedScorer(name=self.name, revision=self.revision, max_length=self.max_length)


Judge = Annotated[TrainedJudge | PretrainedJudge, Field(discriminator="kind")]


class Checks(Section):
    """Thresholds of the asset checks. A blocking check ends the iteration; the others warn. None are in the paper."""

    min_pairs_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Blocking: at least this share of preferences.pairs_per_iteration must be left to train on.",
    )
    min_mean_margin: float = Field(0.0, description="Warn if the mean score margin of the pairs is lower.")
    max_length_ratio: float = Field(
        2.0, gt=1, description="Warn if one side is this many times as long as the other, on average (length bias)."
    )
    max_mean_repetition: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Warn if chosen answers, or M_t's, repeat a larger share of their runs of three words, on average.",
    )
    max_cut_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Warn, of any asset, if a larger share of its answers was cut at the token limit.",
    )
    max_near_duplicate_rate: float = Field(
        0.3, gt=0, le=1, description="Warn if more of the written prompts were near-duplicates and dropped."
    )
    max_similarity_growth: float = Field(
        1.25,
        gt=0,
        description="Warn if two prompts share this many times as many of their words as in iteration 1, on average.",
    )
    min_reward_accuracy: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Warn if, over the last quarter of M_t's training, a smaller share of the pairs has the higher reward on its "
        "chosen side.",
    )
    min_sigmoid_argument: float = Field(
        -4.0,
        description="Warn if, over the last quarter of M_t's training, the mean argument of the loss's sigmoid is lower (SimPO: "
        "reward margin - gamma). All pairs then pull with nearly full weight, whatever beta is.",
    )
    min_win_rate: float = Field(0.5, ge=0, le=1, description="Warn if the win rate over M_0 is lower.")


# The newest metrics of an iteration, those of held-out prompts and instructions over the dev split. A `gain` is M_t's value less
# that of M_0; `low` is the lower end of the interval whose error rate is gate.error_rate.
GateMetric = Literal[
    "win_rate_over_initial", "win_rate_over_initial_low", "win_rate_over_previous", "win_rate_over_previous_low",
    "length_controlled_win_rate_over_initial", "length_controlled_win_rate_over_initial_low",
    "win_rate_over_initial_by_scorer", "held_out_reward_gain", "verifiable_rate_gain", "gold_log_likelihood_gain",
    "gold_similarity_gain", "mean_repetition", "cut_share", "length_ratio", "reward_accuracy", "prompt_similarity",
    "prompt_similarity_to_seed", "mean_margin", "chosen_to_rejected_length", "pairs_kept",
]  # fmt: skip
# The same for the constraints of one rule alone: `rule_rate_gain.words_at_most`.
RULE_GAIN = "rule_rate_gain."
RuleGain = Annotated[str, Field(pattern=rf"^{re.escape(RULE_GAIN)}\w+$")]

# What a metric can be at all; the others have no such bounds.
SHARE = (0, 1, "a share between 0 and 1")
GAIN = (-1, 1, "a difference of two shares, between -1 and 1")
GATE_BOUNDS: dict[str, tuple[float, float, str]] = {
    "win_rate_over_initial": SHARE, "win_rate_over_initial_low": SHARE, "win_rate_over_previous": SHARE,
    "win_rate_over_previous_low": SHARE, "length_controlled_win_rate_over_initial": SHARE,
    "length_controlled_win_rate_over_initial_low": SHARE, "win_rate_over_initial_by_scorer": SHARE,
    "mean_repetition": SHARE, "cut_share": SHARE, "reward_accuracy": SHARE, "verifiable_rate_gain": GAIN,
    "gold_similarity_gain": (-2, 2, "a difference of two cosine similarities, between -2 and 2"),
    "prompt_similarity": (-1, 1, "a cosine similarity between -1 and 1"),
}  # fmt: skip


class Gate(Section):
    """What M_t must reach, on the dev split, to be promoted to the policy of the next iteration.

    Paper: four iterations, "until performance no longer improves". One metric is not enough: in the paper's own runs one benchmark
    falls while another rises.
    """

    minimum: dict[GateMetric | RuleGain, Annotated[float, Field(strict=True)]] = Field(
        {"length_controlled_win_rate_over_initial_low": 0.5, "win_rate_over_previous_low": 0.5},
        description="M_t is promoted only if each of these metrics is at least this. By default it must be better than M_0 at "
        "equal length and better than M_{t-1}, both for certain. `verifiable_rate_gain: -0.05`: of the instructions whose keeping "
        "can be verified, M_t keeps at most 5 points fewer than M_0; `rule_rate_gain.words_at_most: -0.1`: the same of one rule "
        "alone. {}: no such limit.",
    )
    maximum: dict[GateMetric | RuleGain, Annotated[float, Field(strict=True)]] = Field(
        default_factory=dict,
        description="M_t is promoted only if each of these metrics is at most this. `length_ratio` is M_t's characters over "
        "M_0's, and `reward_accuracy` that of the last quarter of M_t's training.",
    )
    error_rate: float = Field(
        0.05,
        ge=1e-6,
        lt=0.5,
        description="How often a model that is no better may reach a `low` of 0.5, unless a search chose it. With 100 dev prompts, "
        "one that truly wins 65 % reaches it in nine of ten cases.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for end, limits in (("minimum", self.minimum), ("maximum", self.maximum)):
            for name, limit in limits.items():
                bounds = GAIN if name.startswith(RULE_GAIN) else GATE_BOUNDS.get(name, (limit, limit, ""))
                least, most, what = bounds
                if not least <= limit <= most:
                    meant = f" Was {limit / 100:g} meant?" if most < abs(limit) <= 100 else ""
                    raise ValueError(f"{end}.{name} ({limit:g}) is out of range: it is {what}.{meant}")
        for name, least in self.minimum.items():
            if least > (most := self.maximum.get(name, least)):
                raise ValueError(
                    f"minimum.{name} ({least:g}) is more than maximum.{name} ({most:g}): no model could pass."
                )
        return self


# The tasks of the paper's two tables by lm-eval's names, with the number of examples shown.
TASK_PRESETS: dict[str, dict[str, int]] = {
    "open_llm_leaderboard": {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5,
    },
    # Inferred: the text at hand says "six more lm-eval tasks, 5-shot" without their names, so these are six common ones.
    "six_more": {"boolq": 5, "commonsense_qa": 5, "logiqa": 5, "openbookqa": 5, "piqa": 5, "sciq": 5},
}  # fmt: skip


class BenchmarkTask(Section):
    """A task of lm-eval."""

    name: str = Field(description="Name of a task or group that lm-eval knows or that lies in benchmarks.task_folder.")
    shots: int = Field(ge=0, description="Solved examples shown before each question.")


class Benchmarks(Section):
    """What `benchmark_scores` and `benchmark_answers` measure; neither is made unless it is asked for by name."""

    tasks: list[BenchmarkTask] = Field(
        default_factory=list,
        description="What benchmark_scores runs with lm-eval (extra `benchmarks`): tasks with `name` and `shots`, or the presets "
        "`open_llm_leaderboard` (paper: ARC 25 shots, HellaSwag 10, TruthfulQA 0, MMLU 5, Winogrande 5, GSM8k 5) and `six_more` "
        "(5 shots; their names are inferred). Data of tasks that lm-eval brings comes from the hub.",
    )
    task_folder: str | None = Field(
        None,
        description="A folder of task files of your own (relative to the settings file): lm-eval's YAML, whose `data_files` are "
        "relative to this folder. None: only lm-eval's own tasks.",
    )
    limit: int | None = Field(
        None, ge=1, description="Questions of each task at most, the first ones. None: all, as the paper."
    )
    batch_size: int = Field(8, ge=1, description="Questions that lm-eval puts to the model at a time.")
    alpaca_eval: str | None = Field(
        None,
        description="AlpacaEval 2's question file (.json, relative to the settings file) for benchmark_answers. None: left out.",
    )
    alpaca_eval_sampling: Sampling = Field(
        Sampling(max_new_tokens=2048), description="Decoding for AlpacaEval 2. Paper: T = 0.7, 2048 new tokens."
    )
    arena_hard: str | None = Field(
        None, description="Arena-Hard's question.jsonl, of v0.1 or v2.0, as alpaca_eval. None: left out."
    )
    arena_hard_sampling: Sampling = Field(
        Sampling(temperature=0, max_new_tokens=4096),
        description="Decoding for Arena-Hard. Not in the paper; Arena-Hard: greedy, 4096 new tokens.",
    )
    mt_bench: str | None = Field(None, description="MT-Bench's question.jsonl, as alpaca_eval. None: left out.")
    mt_bench_max_new_tokens: int = Field(
        1024,
        ge=1,
        description="Longest answer of a turn of MT-Bench. Not in the paper; FastChat: 1024, and a temperature for each category.",
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _presets(cls, tasks: Any) -> Any:
        """Puts the tasks of a preset in the place of its name."""
        tasks = [tasks] if isinstance(tasks, str) else tasks
        if not isinstance(tasks, list):
            return tasks
        expanded: list[Any] = []
        for task in tasks:
            if not isinstance(task, str):
                expanded.append(task)
            elif task in TASK_PRESETS:
                expanded += [{"name": name, "shots": shots} for name, shots in TASK_PRESETS[task].items()]
            else:
                raise ValueError(
                    f"{task!r} is neither a preset ({', '.join(TASK_PRESETS)}) nor a task: write a task as `name` and `shots`."
                )
        return expanded
