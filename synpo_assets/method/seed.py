"""Checking the seed: which rows are bad, and why (the paper takes its seed as given)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from synpo_assets.method.ids import content_id
from synpo_assets.method.prompts import Contamination, words_of
from synpo_assets.method.verifiable import constraints_problem, followed, read_constraints

# The splits of the held-out pairs: searches and the gate read dev, tables report test.
HELD_OUT = ("dev", "test")
IS_HELD_OUT = pl.col("split").is_in(HELD_OUT)


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its split, its place in the file, counted from 1, and what is wrong with it."""

    split: str
    line: int
    reason: str


def seed_rows(
    train: Sequence[tuple[int, Mapping[str, Any]]],
    held_out: Sequence[tuple[int, Mapping[str, Any]]],
    prompt_column: str,
    answer_column: str,
    with_rules: bool = False,
) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """Splits seed rows, whose cells hold text or chat messages, into good ones, with ids, and bad ones, with reasons.

    A held-out prompt that also stands in train is bad in train, so that the held-out split never shrinks silently and no
    training reads it. With rules, the column `constraints` is read of the rows that have it, and gold must follow its own.

    Examples:
        >>> good, bad = seed_rows([(1, {"q": "Why?", "a": "Because."}), (2, {"q": " ", "a": "x"})], [], "q", "a")
        >>> [row["prompt"] for row in good], bad
        (['Why?'], [BadRow(split='train', line=2, reason='the prompt is empty')])
    """
    good: list[dict[str, Any]] = []
    bad: list[BadRow] = []
    seen: dict[str, tuple[str, int]] = {}
    for split, rows in (("held_out", held_out), ("train", train)):
        for line, row in rows:
            prompt, answer = _text(row.get(prompt_column), "user"), _text(row.get(answer_column), "assistant")
            reason = None if row else "the line is no JSON object, or an empty one"
            reason = reason or _reason("prompt", prompt) or _reason("answer", answer)
            constraints = (row.get("constraints") or []) if with_rules else []
            reason = reason or constraints_problem(constraints) or _broken_rule(constraints, str(answer))
            key = " ".join(prompt.lower().split()) if prompt else ""
            if reason is None and key in seen:
                other_split, other_line = seen[key]
                reason = f"the same prompt stands in line {other_line} of {other_split}"
            if reason is not None:
                bad.append(BadRow(split, line, reason))
                continue
            seen[key] = (split, line)
            prompt_id = content_id("prompt", prompt)
            stated = {"prompt": prompt, "answer": answer, "constraints": read_constraints(constraints)}
            good.append({"prompt_id": prompt_id, **stated, "split": split, "line": line})
    return good, bad


def overlapping_rows(
    good: Sequence[Mapping[str, Any]], later_prompts: Sequence[str], ngram: int, kind: str
) -> list[BadRow]:
    """The training rows whose prompt repeats a prompt that evaluations ask, or shares a run of words with one.

    Prompts with fewer words than `ngram` are compared as a whole.

    Examples:
        >>> rows = [{"split": "train", "line": 7, "prompt": "Quick: name four red fruits!"}]
        >>> overlapping_rows(rows, ["Name four red fruits, please."], 4, "held-out prompt")[0].reason
        "it shares 4 words in a row with the held-out prompt 'Name four red fruits, please.'"
    """
    contamination, bad = Contamination(later_prompts, ngram), list[BadRow]()
    for row in good:
        if row["split"] == "held_out" or (found := contamination.find(row["prompt"])) is None:
            continue
        equal = words_of(row["prompt"]) == words_of(found)
        shared = "has the words of" if equal else f"shares {ngram} words in a row with"
        bad.append(BadRow(row["split"], row["line"], f"it {shared} the {kind} {found[:80]!r}"))
    return bad


def _text(value: Any, role: str) -> str | None:
    """The text of a cell: itself, or the turn of `role` in chat messages (the first of that role)."""
    if isinstance(value, list):
        turns = [turn.get("content") for turn in value if isinstance(turn, dict) and turn.get("role") == role]
        value = turns[0] if turns else None
    return value.strip() if isinstance(value, str) else None


def _reason(name: str, text: str | None) -> str | None:
    if text is None:
        return f"the {name} is missing or not text"
    return None if text else f"the {name} is empty"


def _broken_rule(stated: Sequence[Mapping[str, Any]], answer: str) -> str | None:
    constraints = read_constraints(stated)
    broken = [each for each, met in zip(constraints, followed(constraints, answer), strict=True) if not met]
    rule = " ".join(broken[0].values()).strip() if broken else ""
    return f"the answer does not follow its own rule `{rule}`" if broken else None
