"""The columns of the tables that measure prompts and models; those of the method itself are in schemas.py."""

import pandera.polars as pa

from synpo_assets.graph.tables import Table, id_column, outcome_column, split_column, text_column
from synpo_assets.method.damage import DAMAGES
from synpo_assets.method.edits import EDIT_OUTCOMES


class PromptDiversity(Table):
    """How much the prompts of each source resemble each other, over samples of equal size."""

    source: str = pa.Field(
        isin=["synthetic", "seed", "self_instruct"],
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
    ordered_share: float = pa.Field(
        ge=0, le=1, description="Share of the prompts that M_0 finds likelier than their own words shuffled."
    )
    ordered_low: float = pa.Field(ge=0, le=1, description="Lower end of its 95 % interval over prompts.")
    ordered_high: float = pa.Field(ge=0, le=1, description="Upper end of its 95 % interval over prompts.")
    shuffled_ordered_share: float = pa.Field(
        ge=0, le=1, description="The same share of the shuffled prompts: what nonsense of these words would reach."
    )
    answerable_share: float = pa.Field(
        nullable=True,
        ge=0,
        le=1,
        description="Share of the prompts that the model of judge.server calls answerable; empty: it was not asked.",
    )
    answerable_low: float = pa.Field(
        nullable=True, ge=0, le=1, description="Lower end of its 95 % interval over prompts."
    )
    answerable_high: float = pa.Field(
        nullable=True, ge=0, le=1, description="Upper end of its 95 % interval over prompts."
    )
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


class EqualSteps(Table):
    """Held-out answers of the control of equal steps, and what each judge says of them beside those of M_0 and M_t."""

    class Config(Table.Config):
        """Checked of the whole table."""

        unique = ("prompt_id", "sample")

    prompt_id: str = id_column("The held-out prompt.")
    split: str = split_column()
    sample: int = pa.Field(ge=1, description="Which of the answers to this prompt, counted from 1.")
    prompt: str = text_column("The instruction.")
    control_response: str = pa.Field(description="The control's answer; at t = 1 this is M_1's.")
    initial_response: str = pa.Field(description="M_0's answer.")
    candidate_response: str = pa.Field(description="M_t's answer.")
    control_cut: bool = pa.Field(description="Whether the control's answer was cut at the token limit.")
    judge_control_over_initial: str = outcome_column("the independent judge", "M_0", of="the control's")
    judge_control_over_candidate: str = outcome_column("the independent judge", "M_t", of="the control's")
    scorer_control_over_initial: str = outcome_column(
        "the scorer, which took part in training,", "M_0", of="the control's"
    )
    scorer_control_over_candidate: str = outcome_column(
        "the scorer, which took part in training,", "M_t", of="the control's"
    )
    server_control_over_initial: str = outcome_column(
        "the model of judge.server, if there is one,", "M_0", nullable=True, of="the control's"
    )
    server_control_over_candidate: str = outcome_column(
        "the model of judge.server, if there is one,", "M_t", nullable=True, of="the control's"
    )
    control_checkpoint_sha: str = id_column("sha of the control.")
    candidate_checkpoint_sha: str = id_column("sha of M_t.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


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
