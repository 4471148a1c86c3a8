"""Instructions whose answers a program can check: no judge, no opinion, so a regression shows as what it is.

The idea is IFEval's (https://arxiv.org/abs/2311.07911); rules, names and prompts are our own. An answer counts as
followed when it meets all constraints of its prompt; an empty answer meets none. Evaluations ask such instructions, and with
`scorer.kind: verifier` the same rules decide between two answers to a prompt of the seed, or of the generator, that has some.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
import regex

from synpo_assets.method.chat_rows import UnusableCellError, row_text
from synpo_assets.method.ids import content_id
from synpo_assets.method.words import UNSPACED_CHARACTER

CONSTRAINTS = pl.List(pl.Struct({"rule": pl.String, "value": pl.String}))
# What a margin is where rules decide: 1 if the first answer alone follows all of them, -1 if the second one alone does, else 0.
RULES_HOLD = "rules_hold"
BY_RULES = pl.col("score_convention") == RULES_HOLD
# A number with more digits is no count of words or lines.
MOST_DIGITS = 6
NUMBERED = re.compile(r"\s*(\d+)[.)]\s")
DASHED = re.compile(r"\s*[-\u2013\u2014]\s*[^\s\-\u2013\u2014]")
# A full stop after these, or between their letters, ends no sentence.
ABBREVIATION = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|e\.g|i\.e)\.", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?]+[\"'”\u2019)\]]*(?=\s|$)")
WORD = regex.compile(rf"{UNSPACED_CHARACTER.pattern}|(?:(?!{UNSPACED_CHARACTER.pattern})\S)+", regex.VERSION1)


def meets(rule: str, value: str, answer: str) -> bool:
    """Whether an answer meets one constraint: a rule of `RULES`, and the value it compares with where it compares.

    Examples:
        >>> meets("words_at_most", "3", "Only three words"), meets("dashes_exactly", "2", "- one")
        (True, False)
        >>> meets("avoids", "sand", "A sandy beach"), meets("ends_with", "the end", "So it was. The End.")
        (True, True)
    """
    return bool(answer.strip()) and RULES[rule](answer.strip(), value)


def followed(constraints: Sequence[Mapping[str, str]], answer: str) -> list[bool]:
    """Whether an answer meets each constraint of its prompt."""
    return [meets(constraint["rule"], constraint["value"], answer) for constraint in constraints]


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


def rules_text(constraints: Sequence[Mapping[str, str]]) -> str:
    """Constraints as the prompt generator writes them, JSON in one line; nothing if there are none.

    Examples:
        >>> rules_text([{"rule": "words_at_most", "value": "20"}, {"rule": "all_lowercase", "value": ""}])
        '[{"rule": "words_at_most", "value": "20"}, {"rule": "all_lowercase"}]'
    """
    stated = [{name: text for name, text in constraint.items() if text} for constraint in constraints]
    return json.dumps(stated, ensure_ascii=False) if stated else ""


def shares_followed(answered: pl.DataFrame, sides: Sequence[str] = ("candidate", "initial")) -> pl.DataFrame:
    """The share of samples that meet all constraints of an instruction, for each side: the candidate and M_0, if not told.

    Examples:
        >>> met = {"candidate_met": [[True, True], [True]], "initial_met": [[True, False], [True]]}
        >>> shares_followed(pl.DataFrame({"prompt_id": ["a", "b"], **met})).rows()
        [('a', 1.0, 0.0), ('b', 1.0, 1.0)]
    """
    return answered.group_by("prompt_id", maintain_order=True).agg(
        pl.col(f"{side}_met").list.all().mean().alias(side) for side in sides
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
        "as_brief": [as_brief(text, len(_words(other))) for text, other in zip(initial, candidate, strict=True)],
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
    ends = (mark.end() for mark in SENTENCE_END.finditer(masked))
    return answer[: next((end for end in ends if any(map(str.isalpha, answer[:end]))), len(answer))]


def as_brief(answer: str, words: int) -> str:
    r"""An answer cut after so many words, or the whole of it if it has no more.

    Examples:
        >>> as_brief("- pears, ripe\n- plums", 2), as_brief("今天天气", 2)
        ('- pears, ripe', '今天')
    """
    found = [word.end() for word in WORD.finditer(answer) if any(map(str.isalnum, word[0]))]
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


def constraints_problem(stated: Any) -> str | None:
    """What is wrong with constraints as written, if anything is.

    Examples:
        >>> constraints_problem([{"rule": "words_at_most", "value": "a few"}])
        "the rule `words_at_most` needs a whole number as value, not 'a few'"
    """
    if not isinstance(stated, list):
        return "`constraints` is no list"
    return next(filter(None, map(_problem, stated)), None)


def read_constraints(stated: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Constraints in which nothing is wrong, in the form of the tables."""
    return [{"rule": each["rule"], "value": "" if each["rule"] in ALONE else str(each["value"])} for each in stated]


def _problem(constraint: Any) -> str | None:
    """What is wrong with a constraint as written, if anything is."""
    if not isinstance(constraint, Mapping) or not isinstance(constraint.get("rule"), str):
        return "a constraint is no object with a `rule`"
    rule, value = constraint["rule"], constraint.get("value")
    if rule not in RULES:
        return f"there is no rule `{rule}`"
    digits = str(value)
    if rule in COUNTING and not (digits.isascii() and digits.isdecimal() and len(digits) <= MOST_DIGITS):
        return f"the rule `{rule}` needs a whole number as value, not {value!r}"
    # A text with half of a surrogate pair, which JSON can spell, fits in no table.
    if rule in COMPARING and not (isinstance(value, str | int) and str(value) and str(value).isprintable()):
        return f"the rule `{rule}` needs a text as value, in one line"
    return None


def _words(answer: str) -> list[str]:
    spaced = UNSPACED_CHARACTER.sub(r" \g<0> ", answer)
    return [word for word in spaced.split() if any(letter.isalnum() for letter in word)]


def _sentences(answer: str) -> int:
    """How many sentences there are; a last one without an end mark counts."""
    parts = SENTENCE_END.split(ABBREVIATION.sub("abbreviation", answer))
    return len([part for part in parts if any(letter.isalnum() for letter in part)])


def _find_word(answer: str, text: str, start: int = 0) -> re.Match[str] | None:
    """Where a text first stands in an answer with no letter or digit beside it."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE).search(answer, start)


def _has_word(answer: str, text: str) -> bool:
    return _find_word(answer, text) is not None


def _lines(answer: str) -> list[str]:
    return [line for line in answer.splitlines() if line.strip()]


def _json(answer: str) -> Any:
    """The value of an answer that is JSON and nothing else, if only in a fence; None of any other."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return None


def _is_list_of(answer: str, count: str) -> bool:
    listed = _json(answer)
    return isinstance(listed, list) and len(listed) == int(count)


def _has_key(answer: str, key: str) -> bool:
    stated = _json(answer)
    return isinstance(stated, dict) and key in stated


def _is_numbered(answer: str, count: str) -> bool:
    """Whether the lines that start with a number are numbered from 1 to a count, and nothing else."""
    return [line[1] for line in map(NUMBERED.match, _lines(answer)) if line] == [
        str(number) for number in range(1, int(count) + 1)
    ]


def _in_order(answer: str, texts: str) -> bool:
    """Whether texts, written with bars between them, all stand in an answer, each after the one before."""
    place = 0
    for text in texts.split("|"):
        found = _find_word(answer, text, place)
        if found is None:
            return False
        place = found.end()
    return True


def _bare(text: str) -> str:
    """In lowercase, without quotes and marks around it."""
    return text.lower().strip(".!?\"'“”\u2018\u2019* \n")


def _starts_with(answer: str, text: str) -> bool:
    return re.match(rf"{re.escape(_bare(text))}(?!\w)", _bare(answer)) is not None


def _ends_with(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_bare(text))}$", _bare(answer)) is not None


COUNTING: dict[str, Callable[[str, str], bool]] = {
    "words_at_most": lambda answer, value: len(_words(answer)) <= int(value),
    "words_at_least": lambda answer, value: len(_words(answer)) >= int(value),
    "sentences_at_most": lambda answer, value: _sentences(answer) <= int(value),
    "lines_exactly": lambda answer, value: len(_lines(answer)) == int(value),
    "dashes_exactly": lambda answer, value: len([x for x in _lines(answer) if DASHED.match(x)]) == int(value),
    "numbered_exactly": _is_numbered,
    "comma_items_exactly": lambda answer, value: len(_lines(answer)) == 1 and answer.count(",") == int(value) - 1,
    "json_list_of": _is_list_of,
    "question_marks_exactly": lambda answer, value: answer.count("?") == int(value),
}
COMPARING: dict[str, Callable[[str, str], bool]] = {
    "contains": _has_word,
    "avoids": lambda answer, value: not _has_word(answer, value),
    "avoids_text": lambda answer, value: value not in answer,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "in_order": _in_order,
    "is_one_of": lambda answer, value: _bare(answer) in value.lower().split("|"),
    "json_object_with": _has_key,
}
ALONE: dict[str, Callable[[str, str], bool]] = {
    "all_lowercase": lambda answer, _: answer == answer.lower(),
    "all_uppercase": lambda answer, _: answer == answer.upper() and any(letter.isalpha() for letter in answer),
    "in_quotes": lambda answer, _: len(answer) > 2 and answer[0] in '"“' and answer[-1] in '"”',
}
# By name: whether an answer meets it, given the value that it is compared with.
RULES = COUNTING | COMPARING | ALONE
