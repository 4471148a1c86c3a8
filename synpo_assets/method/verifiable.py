"""Instructions whose answers a program can check: no judge, no opinion, so a regression shows as what it is.

The idea is IFEval's (https://arxiv.org/abs/2311.07911); rules, names and prompts are our own. An answer counts as
followed when it meets all constraints of its prompt; an empty answer meets none. Evaluations ask such instructions, and with
`scorer.kind: verifier` the same rules decide between two answers to a prompt of the seed, or of the generator, that has some.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from synpo_assets.method.chat_rows import UnusableCellError, row_text
from synpo_assets.method.ids import content_id
from synpo_assets.method.rules import (
    ABBREVIATION,
    SENTENCE_END,
    constraints_problem,
    followed,
    read_constraints,
    words_in,
)
from synpo_assets.method.words import PART

# What a margin is where rules decide: 1 if the first answer alone follows all of them, -1 if the second one alone does, else 0.
RULES_HOLD = "rules_hold"
BY_RULES = pl.col("score_convention") == RULES_HOLD


def has_rules(prompts: pl.DataFrame) -> pl.Series:
    """Of each prompt, whether it has constraints."""
    return prompts["constraints"].list.len() > 0


def rule_scores(rows: pl.DataFrame) -> pl.DataFrame:
    """What the rules say of the answers `first` and `second`: 1 where one follows all constraints of its prompt, else 0.

    Examples:
        >>> rules = [{"rule": "words_at_most", "value": "1"}, {"rule": "all_lowercase", "value": ""}]
        >>> rows = pl.DataFrame({"first": ["yes"], "second": ["Yes"], "constraints": [rules]})
        >>> rule_scores(rows).row(0)
        (1.0, 0.0)
    """
    scores = {
        f"{side}_score": [float(all(followed(*row))) for row in rows.select("constraints", side).iter_rows()]
        for side in ("first", "second")
    }
    return pl.DataFrame(scores, schema=dict.fromkeys(scores, pl.Float64))


def preferred(margin: str, threshold: float) -> pl.Expr:
    """Whether F prefers the first answer: by the rules where there are some, else by more than a threshold."""
    return pl.when(BY_RULES).then(pl.col(margin) > 0).otherwise(pl.col(margin) > threshold)


def both_follow(first_score: str, second_score: str) -> pl.Expr:
    """Whether the prompt has rules and both answers follow all of them, so that F prefers neither."""
    return BY_RULES & (pl.min_horizontal(first_score, second_score) == 1)


def shares_followed(answered: pl.DataFrame, sides: Sequence[str] = ("candidate", "initial")) -> pl.DataFrame:
    """The share of samples that meet all constraints of an instruction, for each side: the candidate and M_0, if not told.

    Its template stands beside it: instructions of one template are followed, or not, for the same reasons, so an interval that
    takes them for independent says little of other templates.

    Examples:
        >>> met = {"candidate_met": [[True, True], [True]], "initial_met": [[True, False], [True]]}
        >>> shares_followed(pl.DataFrame({"prompt_id": ["a", "b"], "template": ["list", "list"], **met})).rows()
        [('a', 'list', 1.0, 0.0), ('b', 'list', 1.0, 1.0)]
    """
    return answered.group_by("prompt_id", maintain_order=True).agg(
        pl.col("template").first(), *(pl.col(f"{side}_met").list.all().mean().alias(side) for side in sides)
    )


def nulls_followed(answered: pl.DataFrame) -> dict[str, list[bool]]:
    """Whether the answers of each null follow the instructions."""
    constraints = answered["constraints"].to_list()
    return {
        null: [all(followed(*row)) for row in zip(constraints, texts, strict=True)]
        for null, texts in null_answers(answered).items()
    }


def null_answers(answered: pl.DataFrame) -> dict[str, list[str]]:
    """Nulls: answers that show no skill and yet follow some instructions, a text per row of each.

    Of a single instruction there are no answers to another.

    Examples:
        >>> texts = {"prompt": ["Say hi.", "Say so."], "initial_response": ["Hi there, you.", "No. It is not so."]}
        >>> more = {"candidate_response": ["Hi.", "It is so."], "prompt_id": ["a", "b"], "sample": [1, 1]}
        >>> found = null_answers(pl.DataFrame(texts | more))
        >>> found["first_sentence"], found["as_brief"], found["another_answer"]
        (['Hi there, you.', 'No.'], ['Hi', 'No. It is'], ['It is so.', 'Hi.'])
    """
    candidate, initial = answered["candidate_response"].to_list(), answered["initial_response"].to_list()
    found = {
        "prompt_as_answer": answered["prompt"].to_list(),
        "first_sentence": list(map(first_sentence, initial)),
        "as_brief": [as_brief(text, len(words_in(other))) for text, other in zip(initial, candidate, strict=True)],
    }
    if answered["prompt_id"].n_unique() > 1:
        # The next one's in the order of ids, which are hashes, so that neighbours need not be of one kind.
        order = answered.select(pl.arg_sort_by("sample", "prompt_id")).to_series().to_list()
        following = dict(zip(order, order[1:] + order[:1], strict=True))
        found["another_answer"] = [candidate[following[row]] for row in range(answered.height)]
    return found


def first_sentence(answer: str) -> str:
    r"""An answer up to the end of its first sentence, or the whole of it; the number of a list is no sentence.

    Examples:
        >>> first_sentence("Dr. Smith is here. He waits."), first_sentence("1. Pears\n2. Plums")
        ('Dr. Smith is here.', '1. Pears\n2.')
    """
    answer = answer.strip()
    masked = ABBREVIATION.sub(lambda found: "x" * len(found[0]), answer)
    letter = next((place for place, mark in enumerate(answer) if mark.isalpha()), len(answer))
    ends = (mark.end() for mark in SENTENCE_END.finditer(masked))
    return answer[: next((end for end in ends if end > letter), len(answer))]


def as_brief(answer: str, words: int) -> str:
    r"""An answer cut after so many words, or the whole of it if it has no more.

    Examples:
        >>> as_brief("- pears, ripe\n- plums", 2), as_brief("今天天气", 2)
        ('- pears, ripe', '今天')
    """
    found = [word.end() for word in PART.finditer(answer) if any(map(str.isalnum, word[0]))]
    return answer if len(found) <= words else answer[: found[words - 1] if words else 0]


def rates_by_rule(answered: pl.DataFrame) -> pl.DataFrame:
    """The share of constraints of each rule that M_t and M_0 meet; `answered` counts constraints times samples."""
    single = answered.select("constraints", "candidate_met", "initial_met").explode(
        "constraints", "candidate_met", "initial_met"
    )
    return (
        single.unnest("constraints")
        .group_by("rule")
        .agg(answered=pl.len(), candidate=pl.col("candidate_met").mean(), initial=pl.col("initial_met").mean())
        .sort("answered", "rule", descending=[True, False])
    )


def instruction_rows(
    rows: Sequence[tuple[int, Mapping[str, Any]]],
) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Reads numbered lines of instructions into rows with ids, and the line of each bad one with what is wrong with it.

    `constraints` is a list of objects with `rule` and, where the rule compares with something, `value`. A row may state its
    `split`, dev or test, and the `template` that it was made of.

    Examples:
        >>> good, bad = instruction_rows([(1, {"prompt": "Say hi.", "constraints": [{"rule": "words", "value": 1}]})])
        >>> good, bad
        ([], [(1, 'there is no rule `words`')])
    """
    good: dict[str, dict[str, Any]] = {}
    bad: list[tuple[int, str]] = []
    for line, row in rows:
        constraints = row.get("constraints")
        try:
            prompt = row_text(row, "prompt", "prompt", "user")
        except UnusableCellError as error:
            bad.append((line, str(error)))
            continue
        if not isinstance(constraints, list) or not constraints:
            bad.append((line, "`constraints` is no list, or empty"))
        elif reason := constraints_problem(constraints):
            bad.append((line, reason))
        elif prompt in good:
            bad.append((line, f"the same prompt stands in line {good[prompt]['line']}"))
        else:
            of_row = {"line": line, "stated_split": row.get("split"), "template": row.get("template")}
            of_row |= {"prompt_id": content_id("prompt", prompt), "prompt": prompt}
            good[prompt] = of_row | {"constraints": read_constraints(constraints)}
    return list(good.values()), bad
