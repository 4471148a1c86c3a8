"""The columns of every table: what they mean and what is allowed in them."""

import pandera.polars as pa
import polars as pl

from synpo_assets.graph.tables import Table, id_column, text_column
from synpo_assets.method.pairs import MESSAGES
from synpo_assets.method.reviews import OUTCOMES, WORDS
from synpo_assets.method.rules import CONSTRAINTS
from synpo_assets.method.seed import HELD_OUT


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
    """The chosen side: rewrites by the response improver, or own answers of the policy that were chosen among others."""

    base_response_id: str = id_column(
        "The policy's answer that was rewritten, the answer itself if it was chosen, or the first of the samples that were ranked."
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

    pair_id: str = id_column(
        "Content hash of the two responses; that of before, if people exchanged them.", unique=True
    )
    prompt_id: str = id_column("The prompt.", unique=True)
    prompt: MESSAGES = pa.Field(description="The prompt as one user message.")  # type: ignore[valid-type]
    chosen: MESSAGES = pa.Field(  # type: ignore[valid-type]
        description="The chosen answer as one assistant message: the refined response, or the best of the ranked samples, or "
        "an own answer above all rewrites."
    )
    rejected: MESSAGES = pa.Field(description="The rejected answer as one assistant message.")  # type: ignore[valid-type]
    chosen_score: float = pa.Field(description="The scorer's value of the chosen answer.")
    rejected_score: float = pa.Field(description="The scorer's value of the rejected answer.")
    margin: float = pa.Field(description="chosen_score - rejected_score.")
    score_convention: str = text_column(
        "What a margin is: `reward_difference` of a reward model, a pair ranker's scorer.pair_convention, or `rules_hold`: 1, "
        "because chosen follows all rules of the prompt and rejected does not, or -1 where people exchanged them."
    )
    rules: str = pa.Field(
        description="Rules of the prompt as JSON, a list of `rule` and `value`; empty if it has none."
    )
    scorer_sha: str = id_column("sha of the scorer.")
    chosen_finish_reason: str = pa.Field(isin=["stop", "length"], description="`length`: the chosen answer was cut.")
    rejected_finish_reason: str = pa.Field(
        isin=["stop", "length"], description="`length`: the rejected answer was cut."
    )
    chosen_response_id: str = id_column(
        "The refined response, or the best of the ranked samples, or an own answer above all rewrites."
    )
    rejected_response_id: str = id_column("The rejected answer.")
    chosen_checkpoint_sha: str = id_column("sha of the model that wrote the chosen side.")
    rejected_checkpoint_sha: str = id_column("sha of the model that wrote the rejected side.")
    iteration: int = pa.Field(ge=1, description="The iteration that made the pair.")


class PairVerdicts(Table):
    """What people say of pairs, as they were before anybody read them."""

    pair_id: str = id_column("The pair: content hash of its two responses.", unique=True)
    prompt_id: str = id_column("The prompt.", unique=True)
    prompt: str = text_column("The instruction.")
    chosen: str = pa.Field(description="The answer that is chosen unless people prefer the other one.")
    rejected: str = pa.Field(description="The other answer.")
    verdict: str = pa.Field(
        isin=WORDS, description="Their word: `1` or `2`, as the answers stood in the file, or that neither is better."
    )
    outcome: str = pa.Field(
        isin=OUTCOMES,
        description="What becomes of the pair: it stays, its sides change places, or it is dropped.",
    )
    reviewer: str = pa.Field(description="Who said so; empty if the file does not say.")
    reviewed_at: str = pa.Field(description="When, as the file has it; empty if it does not say.")
    chosen_response_id: str = id_column("The answer that is chosen unless people prefer the other one.")
    rejected_response_id: str = id_column("The other answer.")
    iteration: int = pa.Field(ge=1, description="The iteration that made the pair.")


class PreferenceHistory(PreferencePairs):
    """Preference pairs of several iterations, in which a prompt may come back."""

    prompt_id: str = id_column("The prompt.")


class SearchCandidates(Table):
    """The candidates of a search: what each was trained with, what came of it on dev, and which one became M_t."""

    candidate: str = id_column("Its name in the checkpoint store.", unique=True)
    settings: str = text_column("The values of the settings that are searched, as JSON.")
    metric: str = text_column("What it was measured by, on the dev split.")
    value: float = pa.Field(nullable=True, description="The value of the metric; empty: it was not measured.")
    low: float = pa.Field(nullable=True, description="Lower end of its 95 % interval.")
    high: float = pa.Field(nullable=True, description="Upper end of its 95 % interval.")
    n: int = pa.Field(
        ge=0, nullable=True, description="The dev prompts, or templates of instructions, that it is taken over."
    )
    loss: float = pa.Field(nullable=True, description="The loss, mean over the last quarter of the training.")
    reward_accuracy: float = pa.Field(
        nullable=True, description="Pairs whose chosen side had the higher reward, mean over the last quarter."
    )
    minutes: float = pa.Field(nullable=True, ge=0, description="Minutes of its training.")
    chosen: bool = pa.Field(description="Whether it became M_t: the best value, of equal ones the first.")
    left_out: str = pa.Field(nullable=True, description="Why it was not trained or not measured; empty: it was.")
    checkpoint_sha: str = pa.Field(nullable=True, description="sha of the candidate.")
    iteration: int = pa.Field(ge=1, description="The iteration in which it was trained.")
