"""The columns of the tables that measure prompts and models; those of the method itself are in schemas.py."""

import pandera.polars as pa
import polars as pl

from synpo_assets.graph.metrics import MetricName
from synpo_assets.graph.tables import Table, id_column, outcome_column, share_column, split_column, text_column
from synpo_assets.method.damage import DAMAGES
from synpo_assets.method.diversity import SOURCES
from synpo_assets.method.edits import EDIT_OUTCOMES
from synpo_assets.method.outcomes import NO_VERDICT, POINTS
from synpo_assets.method.rules import CONSTRAINTS

JUDGE, SCORER = "the independent judge", "the scorer, which took part in training,"
SERVER = "the model of judge.server, if there is one,"
MET = pl.List(pl.Boolean)


class HeldOutAnswers(Table):
    """Answers to held-out prompts, several to each."""

    class Config(Table.Config):
        """Checked of the whole table."""

        unique = ("prompt_id", "sample")

    prompt_id: str = id_column("The held-out prompt.")
    split: str = split_column()
    sample: int = pa.Field(ge=1, description="Which of the answers to this prompt, counted from 1.")
    prompt: str = text_column("The instruction.")


class Evaluation(HeldOutAnswers):
    """Answers of M_t, M_{t-1} and M_0 to held-out prompts, with scores and what each judge says of them."""

    answer: str = text_column("The gold answer.")
    candidate_response: str = pa.Field(description="M_t's answer.")
    previous_response: str = pa.Field(description="M_{t-1}'s answer; at t = 1 this is M_0's.")
    initial_response: str = pa.Field(description="M_0's answer.")
    trimmed_response: str = pa.Field(description="The first half of M_0's sentences: what a shorter form alone wins.")
    verbose_response: str = pa.Field(
        description="M_0's answer when it is asked for a long one: what length alone wins."
    )
    candidate_cut: bool = pa.Field(description="Whether M_t's answer was cut at the token limit.")
    initial_cut: bool = pa.Field(
        description="Whether M_0's answer was cut at the token limit; answers that were stand here without their unfinished end."
    )
    answer_score: float = pa.Field(description="initial_score plus the margin of the gold answer over M_0's.")
    candidate_score: float = pa.Field(description="The scorer's value of M_t's answer, beside M_0's.")
    initial_score: float = pa.Field(description="The scorer's value of M_0's answer, beside M_t's.")
    judge_over_initial: str = outcome_column(JUDGE, "M_0")
    judge_over_previous: str = outcome_column(JUDGE, "M_{t-1}")
    judge_trimmed_over_initial: str = outcome_column(JUDGE, "M_0", of="M_0's trimmed")
    judge_verbose_over_initial: str = outcome_column(JUDGE, "M_0", of="M_0's verbose")
    scorer_over_initial: str = outcome_column(SCORER, "M_0")
    scorer_over_previous: str = outcome_column(SCORER, "M_{t-1}")
    scorer_trimmed_over_initial: str = outcome_column("the scorer", "M_0", of="M_0's trimmed")
    scorer_verbose_over_initial: str = outcome_column("the scorer", "M_0", of="M_0's verbose")
    server_over_initial: str = outcome_column(SERVER, "M_0", nullable=True)
    server_over_previous: str = outcome_column(SERVER, "M_{t-1}", nullable=True)
    server_trimmed_over_initial: str = outcome_column("the same model", "M_0", of="M_0's trimmed", nullable=True)
    server_verbose_over_initial: str = outcome_column("the same model", "M_0", of="M_0's verbose", nullable=True)
    candidate_checkpoint_sha: str = id_column("sha of M_t.")
    previous_checkpoint_sha: str = id_column("sha of M_{t-1}.")
    initial_checkpoint_sha: str = id_column("sha of M_0.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


class VerifiableInstructions(Table):
    """Instructions whose answers a program can check."""

    prompt_id: str = id_column("Content hash of the prompt.", unique=True)
    split: str = split_column()
    prompt: str = text_column("The instruction.")
    constraints: CONSTRAINTS = pa.Field(  # type: ignore[valid-type]
        description="What an answer must meet: a rule of method/rules.py, and the value it compares with."
    )
    template: str = text_column("What the instruction was made of; its own prompt_id where its row states none.")


class InstructionAnswers(Table):
    """Answers to the verifiable instructions, several to each, and the constraints that they meet."""

    class Config(Table.Config):
        """Checked of the whole table."""

        unique = ("prompt_id", "sample")

    prompt_id: str = id_column("The instruction.")
    split: str = split_column()
    prompt: str = text_column("The instruction's text.")
    constraints: CONSTRAINTS = pa.Field(description="What an answer must meet.")  # type: ignore[valid-type]
    template: str = text_column("What the instruction was made of; its own prompt_id where its row states none.")
    sample: int = pa.Field(ge=1, description="Which of the answers to this instruction, counted from 1.")
    candidate_response: str = pa.Field(description="M_t's answer.")
    candidate_met: MET = pa.Field(description="Whether M_t's answer meets each constraint, in order.")  # type: ignore[valid-type]
    candidate_checkpoint_sha: str = id_column("sha of M_t.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


class InstructionFollowing(InstructionAnswers):
    """Answers of M_t and M_0 to the verifiable instructions."""

    initial_response: str = pa.Field(description="M_0's answer.")
    initial_met: MET = pa.Field(description="Whether M_0's answer meets each constraint, in order.")  # type: ignore[valid-type]
    initial_checkpoint_sha: str = id_column("sha of M_0.")


class Promotion(Table):
    """What the gate says of M_t, one row per limited figure; no row where the gate has no limits."""

    metric: str = pa.Field(unique=True, description="The figure, by its name in the section `gate` of the settings.")
    value: float = pa.Field(nullable=True, description="What was measured of this iteration; empty: nothing was.")
    minimum: float = pa.Field(nullable=True, description="gate.minimum; empty: there is none.")
    maximum: float = pa.Field(nullable=True, description="gate.maximum; empty: there is none.")
    passed: bool = pa.Field(description="Whether it was measured and keeps to its limits.")
    reason: str = pa.Field(nullable=True, description="Why it did not pass; empty if it did.")
    checkpoint_sha: str = id_column("sha of M_t, which was judged.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


class SelfInstructPrompts(Table):
    """Prompts that M_0 wrote after seeing some of the seed: the baseline of prompt_diversity."""

    prompt: str = pa.Field(str_length={"min_value": 1}, unique=True, description="The instruction.")
    example_ids: pl.List(pl.String) = pa.Field(description="prompt_id of the seed prompts that were shown.")  # type: ignore[valid-type]
    checkpoint_sha: str = id_column("sha of M_0.")
    input_tokens: int = pa.Field(ge=1, description="Tokens of the rendered instruction.")
    output_tokens: int = pa.Field(ge=1, description="Tokens written.")
    finish_reason: str = pa.Field(isin=["stop", "length"], description="`stop`: ended by itself; `length`: cut.")


class PromptDiversity(Table):
    """How much the prompts of each source resemble each other, over samples of equal size."""

    source: str = pa.Field(
        isin=SOURCES,
        unique=True,
        description="`synthetic`: of this iteration; `seed`: of the train split; `self_instruct`: the baseline by M_0.",
    )
    available: int = pa.Field(ge=2, description="Prompts that the source has and that the filter keeps.")
    prompts: int = pa.Field(ge=2, description="Prompts sampled and compared, as many of each source.")
    mean: float = pa.Field(description="Mean over the prompts of their mean cosine similarity to all others.")
    mean_low: float = pa.Field(description="Lower end of its 95 % interval, by a bootstrap over prompts.")
    mean_high: float = pa.Field(description="Upper end of its 95 % interval.")
    standard_deviation: float = pa.Field(ge=0, description="Of the prompts' mean similarities.")
    percentile_5: float = pa.Field(description="5 % of the prompts have a lower mean similarity.")
    median: float = pa.Field(description="Half of the prompts have a lower mean similarity.")
    percentile_95: float = pa.Field(description="95 % of the prompts have a lower mean similarity.")
    clusters_touched: int = pa.Field(
        ge=1, description="Clusters, of all sources together, that hold a prompt of this one."
    )
    cluster_entropy: float = pa.Field(ge=0, description="Entropy of the source's shares in the clusters, in nats.")
    effective_clusters: float = pa.Field(ge=1, description="Equally large clusters that would have this entropy.")
    ordered_share: float = share_column("Share of the prompts that M_0 finds likelier than their own words shuffled.")
    ordered_low: float = share_column("Lower end of its 95 % interval over prompts.")
    ordered_high: float = share_column("Upper end of its 95 % interval over prompts.")
    shuffled_ordered_share: float = share_column(
        "The same share of the shuffled prompts: what nonsense of these words would reach."
    )
    answerable_share: float = share_column(
        "Share of the prompts that the model of judge.server calls answerable; empty: it was not asked.", nullable=True
    )
    answerable_low: float = share_column("Lower end of its 95 % interval over prompts.", nullable=True)
    answerable_high: float = share_column("Upper end of its 95 % interval over prompts.", nullable=True)
    embedding_model: str = text_column("The model that the figures belong to; those of two models cannot be compared.")
    iteration: int = pa.Field(ge=1, description="The iteration.")


class GoldComparison(Table):
    """The held-out gold answers as M_t and M_0 see them, and how close their own answers are."""

    prompt_id: str = id_column("The held-out prompt.", unique=True)
    split: str = split_column()
    prompt: str = text_column("The instruction.")
    answer: str = text_column("The gold answer.")
    candidate_log_likelihood: float = pa.Field(
        le=0, description="Mean log-probability per token of gold's text under M_t, without the end of turn, in nats."
    )
    initial_log_likelihood: float = pa.Field(le=0, description="The same under M_0.")
    candidate_other_log_likelihood: float = pa.Field(
        le=0,
        description="Mean log-probability per token, under M_t, of the gold of another prompt of the split, in nats.",
    )
    initial_other_log_likelihood: float = pa.Field(le=0, description="The same under M_0.")
    candidate_end_log_likelihood: float = pa.Field(
        le=0, description="Log-probability under M_t that the turn ends where gold ends, in nats."
    )
    initial_end_log_likelihood: float = pa.Field(le=0, description="The same under M_0.")
    candidate_similarity: float = pa.Field(description="Cosine of the embeddings of M_t's answer and the gold answer.")
    initial_similarity: float = pa.Field(description="The same for M_0's answer.")
    candidate_length_ratio: float = pa.Field(ge=0, description="Characters of M_t's answer over those of gold.")
    initial_length_ratio: float = pa.Field(ge=0, description="The same for M_0's answer.")
    candidate_checkpoint_sha: str = id_column("sha of M_t.")
    initial_checkpoint_sha: str = id_column("sha of M_0.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


class BenchmarkScores(Table):
    """What lm-eval measured of M_t, with the same of M_0 beside it."""

    task: str = text_column("The task or group of lm-eval.")
    shots: int = pa.Field(ge=0, description="Solved examples that were shown before each question.")
    metric: str = text_column("The metric, by lm-eval's name.")
    filter: str = text_column("What lm-eval did to the answers before it compared them; `none`: nothing.")
    questions: int = pa.Field(ge=1, description="Questions asked.")
    value: float = pa.Field(description="The figure of M_t.")
    stderr: float = pa.Field(nullable=True, description="Its standard error, where lm-eval states one.")
    value_initial: float = pa.Field(description="The figure of M_0.")
    stderr_initial: float = pa.Field(nullable=True, description="Its standard error, where lm-eval states one.")
    checkpoint_sha: str = id_column("sha of M_t.")
    initial_checkpoint_sha: str = id_column("sha of M_0.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


class EqualSteps(HeldOutAnswers):
    """Held-out answers of the control of equal steps, and what each judge says of them beside those of M_0 and M_t."""

    control_response: str = pa.Field(description="The control's answer; at t = 1 this is M_1's.")
    initial_response: str = pa.Field(description="M_0's answer.")
    candidate_response: str = pa.Field(description="M_t's answer.")
    control_cut: bool = pa.Field(description="Whether the control's answer was cut at the token limit.")
    judge_control_over_initial: str = outcome_column(JUDGE, "M_0", of="the control's")
    judge_control_over_candidate: str = outcome_column(JUDGE, "M_t", of="the control's")
    scorer_control_over_initial: str = outcome_column(SCORER, "M_0", of="the control's")
    scorer_control_over_candidate: str = outcome_column(SCORER, "M_t", of="the control's")
    server_control_over_initial: str = outcome_column(SERVER, "M_0", of="the control's", nullable=True)
    server_control_over_candidate: str = outcome_column(SERVER, "M_t", of="the control's", nullable=True)
    control_checkpoint_sha: str = id_column("sha of the control.")
    candidate_checkpoint_sha: str = id_column("sha of M_t.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


class EqualStepsInstructions(InstructionAnswers):
    """Answers of the control of equal steps to the verifiable instructions, beside those of M_t."""

    control_response: str = pa.Field(description="The control's answer; at t = 1 this is M_1's.")
    control_met: MET = pa.Field(description="Whether the control's answer meets each constraint, in order.")  # type: ignore[valid-type]
    control_checkpoint_sha: str = id_column("sha of the control.")


class EqualStepsGold(Table):
    """The held-out gold answers as the control of equal steps and M_t see them."""

    prompt_id: str = id_column("The held-out prompt.", unique=True)
    split: str = split_column()
    prompt: str = text_column("The instruction.")
    answer: str = text_column("The gold answer.")
    control_log_likelihood: float = pa.Field(
        le=0,
        description="Mean log-probability per token of gold's text under the control, in nats; at t = 1 it is M_1.",
    )
    candidate_log_likelihood: float = pa.Field(le=0, description="The same under M_t.")
    control_other_log_likelihood: float = pa.Field(
        le=0,
        description="The same under the control, of the gold of another prompt of the split.",
    )
    candidate_other_log_likelihood: float = pa.Field(le=0, description="The same under M_t.")
    control_checkpoint_sha: str = id_column("sha of the control.")
    candidate_checkpoint_sha: str = id_column("sha of M_t.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


# What a rewrite makes of a damaged answer: the share, and R_t's less M_0's.
EDIT_SHARES: dict[str, tuple[MetricName, MetricName]] = {
    "right": ("edits_right", "edits_right_gain"),
    "nearer": ("edits_nearer", "edits_nearer_gain"),
    "left": ("edits_left", "edits_left_gain"),
    "worse": ("edits_worse", "edits_worse_gain"),
}


class ImproverEdits(Table):
    """Damaged held-out gold answers, and what R_t and M_0, asked the same, made of them."""

    class Config(Table.Config):
        """Checked of the whole table."""

        unique = ("prompt_id", "damage")

    prompt_id: str = id_column("The held-out prompt.")
    split: str = split_column()
    prompt: str = text_column("The instruction.")
    answer: str = text_column("The gold answer.")
    damage: str = pa.Field(isin=list(DAMAGES), description="What was done to it, by its name in method/damage.py.")
    damaged: str = text_column("The damaged answer, which both models were shown.")
    improver_response: str = pa.Field(description="R_t's rewrite.")
    initial_response: str = pa.Field(description="M_0's rewrite, with R_t's template.")
    improver_outcome: str = pa.Field(
        isin=EDIT_OUTCOMES,
        description="What R_t's rewrite is: `right`: gold; `nearer`: nearer to gold than the damaged answer; `left`: the "
        "damaged answer; `worse`: anything else.",
    )
    initial_outcome: str = pa.Field(isin=EDIT_OUTCOMES, description="The same of M_0's rewrite.")
    improver_checkpoint_sha: str = id_column("sha of R_t.")
    initial_checkpoint_sha: str = id_column("sha of M_0.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


class VerdictAgreement(Table):
    """What each judge says of the pairs in which people prefer one answer."""

    class Config(Table.Config):
        """Checked of the whole table."""

        unique = ("pair_id", "judge")

    pair_id: str = id_column("The pair.")
    judge: str = text_column("The judge.")
    margin: float = pa.Field(
        nullable=True, description="Its score of the answer that people prefer, less that of the other."
    )
    outcome: str = pa.Field(
        isin=[*POINTS, NO_VERDICT],
        description="`win`: it prefers the answer that people prefer; `loss`: the other one.",
    )
    iteration: int = pa.Field(ge=1, description="The iteration that made the pair.")
