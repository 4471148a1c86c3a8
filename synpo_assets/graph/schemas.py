"""The columns of every table: what they mean and what is allowed in them."""

import pandera.polars as pa
import polars as pl

from synpo_assets.graph.tables import Table, id_column, outcome_column, split_column, text_column
from synpo_assets.method.pairs import MESSAGES
from synpo_assets.method.seed import HELD_OUT
from synpo_assets.method.verifiable import CONSTRAINTS


class SeedPairs(Table):
    """Validated seed prompts and gold answers."""

    prompt_id: str = id_column("Content hash of the prompt.", unique=True)
    prompt: str = text_column("The instruction.")
    answer: str = text_column("The gold answer.")
    constraints: CONSTRAINTS = pa.Field(  # type: ignore[valid-type]
        description="With scorer.kind `verifier`: rules that the prompt states and gold follows; empty if there are none."
    )
    split: str = pa.Field(
        isin=["train", "judge", "scorer", *HELD_OUT],
        description="`judge` rows are read by the independent judge alone, `scorer` rows by the scorer alone; `dev` and `test` "
        "rows are never trained on.",
    )
    line: int = pa.Field(ge=1, description="Line of the source file.")


class KeywordPool(Table):
    """Keyword sets from corpus paragraphs."""

    keyword_set_id: str = id_column("Content hash of the keywords.", unique=True)
    keywords: pl.List(pl.String) = pa.Field(description="Keywords of one paragraph, in random order.")  # type: ignore[valid-type]
    paragraph: str = text_column("The paragraph that they come from.")


class KeywordSets(KeywordPool):
    """The keyword sets that one iteration draws."""

    iteration: int = pa.Field(ge=1, description="The iteration.")


class SyntheticPrompts(Table):
    """Valid prompts that the prompt generator wrote."""

    prompt_id: str = id_column("Content hash of the prompt.", unique=True)
    keyword_set_id: str = id_column("The keyword set that it was written from.", unique=True)
    prompt: str = text_column("The instruction.")
    constraints: CONSTRAINTS = pa.Field(  # type: ignore[valid-type]
        description="Rules that the generator wrote with the prompt, which an answer must follow; empty if there are none."
    )
    iteration: int = pa.Field(ge=1, description="The iteration.")
    checkpoint_sha: str = id_column("sha of the prompt generator.")
    input_tokens: int = pa.Field(ge=1, description="Tokens of the rendered keywords template.")
    output_tokens: int = pa.Field(ge=1, description="Tokens written.")


class SelfInstructPrompts(Table):
    """Prompts that M_0 wrote after seeing some of the seed: the baseline of prompt_diversity."""

    prompt: str = pa.Field(str_length={"min_value": 1}, unique=True, description="The instruction.")
    example_ids: pl.List(pl.String) = pa.Field(description="prompt_id of the seed prompts that were shown.")  # type: ignore[valid-type]
    checkpoint_sha: str = id_column("sha of M_0.")
    input_tokens: int = pa.Field(ge=1, description="Tokens of the rendered instruction.")
    output_tokens: int = pa.Field(ge=1, description="Tokens written.")
    finish_reason: str = pa.Field(isin=["stop", "length"], description="`stop`: ended by itself; `length`: cut.")


class Responses(Table):
    """Answers to prompts."""

    response_id: str = id_column("Content hash of prompt, model and answer.", unique=True)
    prompt_id: str = id_column("The prompt that is answered.", unique=True)
    prompt: str = text_column("The instruction.")
    response: str = pa.Field(
        description="The answer, up to its last whole sentence where it was cut; may be empty, and its pair is then dropped."
    )
    iteration: int = pa.Field(ge=1, description="The iteration.")
    checkpoint_sha: str = id_column("sha of the model that answered.")
    input_tokens: int = pa.Field(ge=1, description="Tokens of the rendered prompt.")
    output_tokens: int = pa.Field(ge=1, description="Tokens written.")
    finish_reason: str = pa.Field(isin=["stop", "length"], description="`stop`: ended by itself; `length`: cut.")


class RefinedResponses(Responses):
    """The chosen side: answers rewritten by the response improver, or the best of the policy's ranked samples."""

    base_response_id: str = id_column(
        "The policy's answer that was rewritten, or the first of the samples that were ranked."
    )


class SeedResponses(Responses):
    """The policy's answers to seed prompts, scored beside the gold answers."""

    answer: str = text_column("The gold answer.")
    answer_score: float = pa.Field(description="The scorer's value of the gold answer.")
    response_score: float = pa.Field(description="The scorer's value of the policy's answer.")
    margin: float = pa.Field(description="answer_score - response_score.")
    other_margin: float = pa.Field(
        description="What the margin would be with the gold answer of another prompt in the place of this one's."
    )
    score_convention: str = text_column("What the margins are, as of preference pairs.")
    scorer_sha: str = id_column("sha of the scorer.")


class PreferencePairs(Table):
    """Preference pairs in TRL's conversational format."""

    pair_id: str = id_column("Content hash of the two responses.", unique=True)
    prompt_id: str = id_column("The prompt.", unique=True)
    prompt: MESSAGES = pa.Field(description="The prompt as one user message.")  # type: ignore[valid-type]
    chosen: MESSAGES = pa.Field(  # type: ignore[valid-type]
        description="The chosen answer as one assistant message: the refined response, or the best of the ranked samples."
    )
    rejected: MESSAGES = pa.Field(description="The rejected answer as one assistant message.")  # type: ignore[valid-type]
    chosen_score: float = pa.Field(description="The scorer's value of the chosen answer.")
    rejected_score: float = pa.Field(description="The scorer's value of the rejected answer.")
    margin: float = pa.Field(description="chosen_score - rejected_score.")
    score_convention: str = text_column(
        "What a margin is: `reward_difference` of a reward model, a pair ranker's scorer.pair_convention, or `rules_hold`: 1, "
        "because chosen follows all rules of the prompt and rejected does not."
    )
    rules: str = pa.Field(
        description="Rules of the prompt as JSON, a list of `rule` and `value`; empty if it has none."
    )
    scorer_sha: str = id_column("sha of the scorer.")
    chosen_finish_reason: str = pa.Field(isin=["stop", "length"], description="`length`: the chosen answer was cut.")
    rejected_finish_reason: str = pa.Field(
        isin=["stop", "length"], description="`length`: the rejected answer was cut."
    )
    chosen_response_id: str = id_column("The refined response, or the best of the ranked samples.")
    rejected_response_id: str = id_column("The rejected answer.")
    chosen_checkpoint_sha: str = id_column("sha of the model that wrote the chosen side.")
    rejected_checkpoint_sha: str = id_column("sha of the model that wrote the rejected side.")
    iteration: int = pa.Field(ge=1, description="The iteration that made the pair.")


class PreferenceHistory(PreferencePairs):
    """Preference pairs of several iterations, in which a prompt may come back."""

    prompt_id: str = id_column("The prompt.")


class Evaluation(Table):
    """Answers of M_t, M_{t-1} and M_0 to held-out prompts, with scores and what each judge says of them."""

    class Config(Table.Config):
        """Checked of the whole table."""

        unique = ("prompt_id", "sample")

    prompt_id: str = id_column("The held-out prompt.")
    split: str = split_column()
    sample: int = pa.Field(ge=1, description="Which of the answers to this prompt, counted from 1.")
    prompt: str = text_column("The instruction.")
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
    judge_over_initial: str = outcome_column("the independent judge", "M_0")
    judge_over_previous: str = outcome_column("the independent judge", "M_{t-1}")
    judge_trimmed_over_initial: str = outcome_column("the independent judge", "M_0", of="M_0's trimmed")
    judge_verbose_over_initial: str = outcome_column("the independent judge", "M_0", of="M_0's verbose")
    scorer_over_initial: str = outcome_column("the scorer, which took part in training,", "M_0")
    scorer_over_previous: str = outcome_column("the scorer, which took part in training,", "M_{t-1}")
    scorer_trimmed_over_initial: str = outcome_column("the scorer", "M_0", of="M_0's trimmed")
    scorer_verbose_over_initial: str = outcome_column("the scorer", "M_0", of="M_0's verbose")
    server_over_initial: str = outcome_column("the model of judge.server, if there is one,", "M_0", nullable=True)
    server_over_previous: str = outcome_column("the model of judge.server, if there is one,", "M_{t-1}", nullable=True)
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
        description="What an answer must meet: a rule of method/verifiable.py, and the value it compares with."
    )


class InstructionFollowing(Table):
    """Answers of M_t and M_0 to the verifiable instructions, several to each, and the constraints that they meet."""

    class Config(Table.Config):
        """Checked of the whole table."""

        unique = ("prompt_id", "sample")

    prompt_id: str = id_column("The instruction.")
    split: str = split_column()
    prompt: str = text_column("The instruction's text.")
    constraints: CONSTRAINTS = pa.Field(  # type: ignore[valid-type]
        description="What an answer must meet."
    )
    sample: int = pa.Field(ge=1, description="Which of the answers to this instruction, counted from 1.")
    candidate_response: str = pa.Field(description="M_t's answer.")
    candidate_met: pl.List(pl.Boolean) = pa.Field(description="Whether M_t's answer meets each constraint, in order.")  # type: ignore[valid-type]
    initial_response: str = pa.Field(description="M_0's answer.")
    initial_met: pl.List(pl.Boolean) = pa.Field(description="Whether M_0's answer meets each constraint, in order.")  # type: ignore[valid-type]
    candidate_checkpoint_sha: str = id_column("sha of M_t.")
    initial_checkpoint_sha: str = id_column("sha of M_0.")
    iteration: int = pa.Field(ge=1, description="The iteration t.")


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
