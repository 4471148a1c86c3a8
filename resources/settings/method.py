"""The method itself: prompts, answers, the improver, the scorer, pairs and the optimisation on them."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from resources.settings.search import MOST_COMBINATIONS, Search
from resources.settings.sections import Section, flattened, merge, nearest
from resources.settings.training import Loss, PreferenceTraining, Training


class Sampling(Section):
    """How completions are sampled. Paper: T = 0.7 everywhere; top-p, top-k and length are not given."""

    temperature: float = Field(0.7, ge=0, description="Softmax temperature; 0 is greedy. Paper: 0.7.")
    top_k: int = Field(
        0, ge=0, description="Sample among the k likeliest tokens; 0 is all. Cheaper than top_p on a CPU."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample within this probability mass; 1 is all.")
    max_new_tokens: int = Field(ge=1, description="Longest completion, in tokens. Not given in the paper.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Texts that end a completion; they stay in the text."
    )


class PromptGenerator(Section):
    """The prompt generator G: learns (keywords -> prompt and answer), writes the synthetic prompts."""

    noise_keywords: int = Field(
        1,
        ge=0,
        description="Keywords taken from another seed prompt; the others of the keyword_pool.keywords_per_set come from "
        "the seed prompt itself. Paper: 1 of 3; 0 switches noise off.",
    )
    prompts_per_iteration: int = Field(ge=1, le=10**8, description="Valid prompts wanted. Paper: 36,000-72,000 sets.")
    max_overdraw: float = Field(
        2.0, ge=1, le=1e4, description="Keyword sets drawn at most, per prompt wanted. The paper draws as needed."
    )
    min_words: int = Field(3, ge=1, description="Shorter prompts are dropped. Not in the paper.")
    max_words: int = Field(200, ge=1, description="Longer prompts are dropped. Not in the paper.")
    language: str | None = Field(
        "en",
        pattern="^[a-z]{2}$",
        description="Prompts in other languages are dropped; None keeps all. Not in the paper.",
    )
    near_duplicate_similarity: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Prompts this similar (Jaccard of word pairs) to an earlier one are dropped. Not in the paper.",
    )
    decontamination_ngram: int = Field(
        8,
        ge=2,
        description="Prompts that share this many consecutive words with a prompt of an evaluation are dropped; one with fewer "
        "words is compared as a whole. Not in the paper.",
    )
    training: Training = Field(
        description="SFT from M_0. Paper: lr 1e-6, batch 32, warm-up 0.1, 3 epochs, length 8000."
    )
    sampling: Sampling = Field(description="Decoding of the prompts. Paper: T = 0.7.")


class Responses(Section):
    """Answers of M_{t-1} and M_0."""

    sampling: Sampling = Field(description="Decoding of the answers. Paper: T = 0.7.")


class ResponseImprover(Section):
    """The response improver R_t: learns (prompt, own answer -> gold answer), rewrites the answers.

    Read only where preferences.chosen_from is `improver`.
    """

    margin_threshold: float = Field(
        description="Train only where score(gold) - score(own answer) exceeds this. Paper: the threshold of the pair filter."
    )
    keep_right_answers: bool = Field(
        False,
        description="Where a prompt has rules: also train on rows whose own answer follows them as gold does, so that an R_t "
        "from M_0 learns to keep what is right. Paper: no rules.",
    )
    init_from: Literal["initial", "previous"] = Field(
        "initial",
        description="Train R_t from M_0 (paper), or from M_{t-1}, whose answers it is to rewrite. Both are M_0 at t = 1.",
    )
    training: Training = Field(description="SFT, anew in every iteration. Paper: as the generator, length 6000.")
    sampling: Sampling = Field(description="Decoding of the rewrites. Paper: T = 0.7.")
    damaged_copies: int = Field(
        0,
        ge=0,
        description="Also train R_t to turn damaged gold into gold: so many copies of each gold answer, each with another damage, "
        "such as a lost item. What it makes of such held-out answers is measured. training.max_examples draws from both. Paper: 0.",
    )
    samples: int = Field(1, ge=1, description="Rewrites of each answer; see max_length_ratio. Paper: 1.")
    own_answers: bool = Field(
        False,
        description="Where samples is more than 1: M_{t-1}'s own answer is chosen where it is above every rewrite, by the prompt's "
        "rules, or by the scorer and no less alike in length. Never at t = 1: it is the rejected one. Not in the paper.",
    )
    max_length_ratio: float = Field(
        1.25,
        gt=1,
        description="Where samples is more than 1, the scorer takes the best of the rewrites about as long as the rejected answer: "
        "the longer of the two has at most this many times the characters of the other. If no rewrite is, the nearest in length is "
        "chosen. Not in the paper.",
    )

    @model_validator(mode="after")
    def _differing(self) -> Self:
        if self.samples > 1 and (self.sampling.temperature == 0 or self.sampling.top_k == 1):
            raise ValueError(
                f"samples is {self.samples} and sampling is greedy (temperature 0 or top_k 1), so all rewrites of an answer would "
                "be equal: raise sampling.temperature (paper: 0.7) or top_k, or set samples to 1."
            )
        if self.own_answers and self.samples == 1:
            raise ValueError(
                "own_answers is true and samples is 1, so nothing is chosen from: raise samples, or remove own_answers."
            )
        return self


class ScoringSection(Section):
    """What all scorers have in common."""

    kind: str
    max_length: int = Field(
        2048,
        ge=8,
        description="Longest prompt and answer in tokens, for a pair ranker prompt and both answers (PairRM was trained with "
        "2048); the end of longer ones is unseen.",
    )

    @property
    def convention(self) -> str:
        """What a margin is, by a name that is stored with the pairs; a reward model's is a difference of two rewards."""
        return "reward_difference"

    @property
    def judging_convention(self) -> str:
        """The same where answers are judged: no answer may gain by the place in which it is read."""
        return self.convention


class PublishedScorer(ScoringSection):
    """A published model as scorer."""

    name: str = Field(
        description="Id or directory of the published model: a sequence classifier with one output for `pretrained`, "
        "`llm-blender/PairRM-hf` or one of its shape for `pair_ranker`."
    )
    revision: str | None = Field(None, description="Revision of the hub model named here. None: main.")


class RewardTraining(ScoringSection):
    """What a reward model that is trained here needs."""

    training: Training = Field(description="The training of the reward model. Not in the paper.")


class TrainedScorer(RewardTraining):
    """A Bradley-Terry reward model, trained here on gold over M_0's answers, gold of other prompts and damaged gold."""

    kind: Literal["trained"] = "trained"


class VerifierScorer(RewardTraining):
    """A program where a prompt has rules that it can check (`constraints` of seed rows), elsewhere a model as of kind `trained`.

    Of two answers to such a prompt, chosen follows all rules and rejected does not; no margin_threshold is read there.
    """

    kind: Literal["verifier"] = "verifier"


class PretrainedScorer(PublishedScorer):
    """A published reward model, such as ArmoRM."""

    kind: Literal["pretrained"] = "pretrained"


class PairRankerScorer(PublishedScorer):
    """PairRM, which reads two answers at a time."""

    kind: Literal["pair_ranker"] = "pair_ranker"
    pair_convention: Literal["mean_of_both_orders", "sum_of_both_orders", "one_order"] = Field(
        "mean_of_both_orders",
        description="What a margin is. A pair ranker reads (a, b) and (b, a) and gives a logit for each; their mean is in the "
        "units of one reading, their sum about twice that, and `one_order` reads the pair once. The paper does not say which "
        "one its threshold of 0.20 is in. Stored with the pairs. Held-out answers are always judged in both orders: "
        "`one_order` then is their mean.",
    )

    @property
    def convention(self) -> str:
        """The one that is stated."""
        return self.pair_convention

    @property
    def judging_convention(self) -> str:
        """One order becomes the mean of both, which is in the same units."""
        return "mean_of_both_orders" if self.pair_convention == "one_order" else self.pair_convention


Scorer = Annotated[TrainedScorer | VerifierScorer | PretrainedScorer | PairRankerScorer, Field(discriminator="kind")]


class Preferences(Section):
    """Where the two sides of a pair come from, and which pairs are kept (section 2.3 of the paper)."""

    chosen_from: Literal["improver", "ranked_samples"] = Field(
        "improver",
        description="What makes the two sides of a pair. `improver` (paper): R_t's rewrite is chosen, and rejected_from says whose "
        "answer is rejected. `ranked_samples`: M_{t-1} answers each prompt several times, the scorer ranks these samples, the "
        "best is chosen and the worst rejected; no improver is trained.",
    )
    ranked_samples: int = Field(
        5,
        ge=2,
        description="Answers of M_{t-1} to each prompt, where chosen_from is `ranked_samples`. They are ranked by their margin "
        "over the first of them, so that a pair ranker, which reads two answers at a time, needs no reading of every pair.",
    )
    rejected_from: Literal["initial", "previous"] = Field(
        "initial",
        description="Whose answer is rejected: M_0's (paper) or M_{t-1}'s. Has no meaning with ranked samples, both sides of which "
        "are M_{t-1}'s: `previous` is refused there.",
    )
    margin_threshold: float = Field(
        description="Kept if score(chosen) - score(rejected) exceeds this. Paper: 0.20 (PairRM), 0.02 (ArmoRM)."
    )
    max_repetition: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Drop pairs whose chosen side repeats more than this share. Paper: 50 %, metric undefined.",
    )
    repetition_ngram: int = Field(
        3,
        ge=1,
        description="For max_repetition: the share of word n-grams of this size that occurred before in the same text.",
    )
    max_length_ratio: float | None = Field(
        None,
        gt=1,
        description="Drop pairs in which one side has more than this many times the characters of the other, such as 1.25: what is "
        "left differs less by length. None: none are dropped (paper).",
    )
    pairs_per_iteration: int = Field(ge=1, description="Pairs kept per iteration, a random sample. Paper: 10,000.")
    reviewed: str | None = Field(
        None,
        pattern=r"(?i)\.(csv|jsonl|parquet)$",
        description="A .csv, .jsonl or .parquet file (relative to the settings file) of what people say of pairs, as `synpo export "
        "--format review` writes it and they fill it in: a verdict for the chosen answer confirms a pair, one for the other answer "
        "exchanges the two, and tie, neither or both drops it. None: nobody reads pairs (paper).",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.chosen_from == "ranked_samples" and self.rejected_from == "previous":
            raise ValueError(
                "rejected_from is `previous` and chosen_from is `ranked_samples`: with ranked samples the rejected answer is the "
                "worst of M_{t-1}'s own. Remove rejected_from, or set chosen_from to `improver`."
            )
        return self


class PreferenceOptimization(Section):
    """How M_t is made of the pairs."""

    policy_init: Literal["initial", "previous"] = Field(
        "initial", description="Start M_t from M_0 (paper, Algorithm 1) or from M_{t-1} (as the printed loss suggests)."
    )
    accumulate: bool = Field(
        True, description="Train M_t on the pairs of iterations 1 to t (paper). False: on those of iteration t alone."
    )
    loss: Loss = Field(description="`kind` is simpo (paper), dpo, orpo or cpo_simpo; each has fields of its own.")
    training: PreferenceTraining = Field(description="The training on these pairs.")
    equal_steps_control: bool = Field(
        False,
        description="From iteration 2 on, also train a control from the start of M_t on the pairs of iteration 1 alone, for as "
        "many optimizer steps as M_t took, and measure it on the held-out prompts and the verifiable instructions. It doubles this "
        "training. Not in the paper, where M_4 takes four times the steps of M_1.",
    )
    search: Search | None = Field(
        None,
        description="Train several candidates with these values on the same pairs; the best on dev becomes M_t. Paper: beta in "
        "{2, 4, 6, 8, 10, 12}. None: M_t is trained once, with the values above.",
    )

    @model_validator(mode="after")
    def _possible_search(self) -> Self:
        if self.search is None:
            return self
        known, space = list(self.searchable), self.search.space
        if not space:
            raise ValueError(
                f"search names no setting: add one with its values, such as `loss.beta: [2, 4]`. There are {', '.join(known)}."
            )
        for name, values in space.items():
            if name not in known:
                close = nearest(name, [*known, *Search.model_fields])
                raise ValueError(
                    f"search: `{name}` is not a setting that can be searched{close} There are {', '.join(known)}."
                )
            if not isinstance(values, list):
                raise ValueError(f"search: `{name}` is {values!r}: give a list of its values, such as [{values}].")
            if not values:
                raise ValueError(f"search: the list of `{name}` is empty: name its values, or leave it out.")
        if self.search.planned > MOST_COMBINATIONS:
            raise ValueError(
                f"search has {self.search.planned:,} candidates, and {MOST_COMBINATIONS:,} are the most: shorten its lists, or "
                "search with `how: in_turn`."
            )
        for tried in self.search.possible:
            try:
                self.with_values(tried)
            except ValidationError as error:
                raise _of_search(error, tried) from None
        return self

    @property
    def searchable(self) -> dict[str, Any]:
        """The values of the settings that a search can name, by the names that it has for them."""
        training = flattened(self.training.model_dump())
        return {**dict(training), **dict(flattened(self.loss.model_dump(exclude={"kind"}), "loss."))}

    def with_values(self, tried: Mapping[str, Any]) -> "PreferenceOptimization":
        """The same without a search and with other values of some settings, by the names that a search has for them."""
        values = self.model_dump(exclude={"search"})
        for name, value in tried.items():
            place = name if name.startswith("loss.") else f"training.{name}"
            change = functools.reduce(lambda inner, part: {part: inner}, reversed(place.split(".")), value)
            values = merge(values, change, [PreferenceOptimization])
        return PreferenceOptimization.model_validate(values)


def _of_search(error: ValidationError, tried: Mapping[str, Any]) -> ValidationError:
    """What is wrong with values that were tried, at the place where they stand."""
    problems = []
    for problem in error.errors():
        named = [name for name in tried if problem["loc"] and name.split(".")[-1] == problem["loc"][-1]]
        location = ("search", *named[:1])
        problems.append(
            {name: problem[name] for name in ("type", "input", "ctx") if name in problem} | {"loc": location}
        )
    return ValidationError.from_exception_data(error.title, problems)  # type: ignore[arg-type]
