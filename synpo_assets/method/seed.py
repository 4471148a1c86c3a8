"""Checking the seed: which rows are bad, and why (the paper takes its seed as given)."""

import collections
import dataclasses
import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import polars as pl

from synpo_assets.method.chat_rows import PARTS_OF_QUESTIONS, UnusableCellError, messages_in, row_text, turns_of
from synpo_assets.method.ids import content_id
from synpo_assets.method.prompts import Contamination
from synpo_assets.method.rules import constraints_problem, followed, read_constraints
from synpo_assets.method.words import words_of

Value = TypeVar("Value")
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
    train: Iterable[tuple[int, Mapping[str, Any]]],
    held_out: Iterable[tuple[int, Mapping[str, Any]]],
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
    seen: dict[bytes, tuple[str, int]] = {}
    for split, rows in (("held_out", held_out), ("train", train)):
        for line, row in rows:
            try:
                stated = _question_and_answer(row, prompt_column, answer_column)
            except UnusableCellError as error:
                bad.append(BadRow(split, line, str(error)))
                continue
            constraints = (row.get("constraints") or []) if with_rules else []
            reason = constraints_problem(constraints) or _broken_rule(constraints, stated["answer"])
            # As a hash, because the prompts would be held twice.
            key = hashlib.sha256(" ".join(stated["prompt"].lower().split()).encode()).digest()
            if reason is None and key in seen:
                other_split, other_line = seen[key]
                reason = f"the same prompt stands in line {other_line} of {other_split}"
            if reason is not None:
                bad.append(BadRow(split, line, reason))
                continue
            seen[key] = (split, line)
            ids = {"prompt_id": content_id("prompt", stated["prompt"]), "template": row.get("template")}
            good.append(ids | stated | {"constraints": read_constraints(constraints), "split": split, "line": line})
    return good, bad


def overlapping_rows(
    good: Sequence[Mapping[str, Any]], later_prompts: Sequence[str], ngram: int, kind: str
) -> list[BadRow]:
    """The training rows whose prompt repeats a prompt that evaluations ask, or shares a run of words with one.

    Prompts with fewer words than `ngram` are compared as a whole.

    Examples:
        >>> rows = [{"split": "train", "line": 7, "prompt": "Quick: name four red fruits!"}]
        >>> overlapping_rows(rows, ["Name four red fruits."], 4, "test prompt")[0].reason
        "it shares 4 words in a row (prompt_generator.decontamination_ngram) with the test prompt 'Name four red fruits.'"
    """
    contamination, bad = Contamination(later_prompts, ngram), list[BadRow]()
    for row in good:
        if (found := contamination.find(row["prompt"])) is None:
            continue
        equal = words_of(row["prompt"]) == words_of(found)
        shared = (
            "has the words of"
            if equal
            else f"shares {ngram} words in a row (prompt_generator.decontamination_ngram) with"
        )
        bad.append(BadRow(row["split"], row["line"], f"it {shared} the {kind} {found[:80]!r}"))
    return bad


def template_of(row: Mapping[str, Any]) -> str:
    """What a row was made of, by its spelling, for whatever JSON holds may name it; a row that states none is its own.

    Examples:
        >>> template_of({"prompt_id": "prompt-1", "template": None}), template_of({"prompt_id": "prompt-1", "template": 7})
        ('prompt-1', '7')
    """
    return row["prompt_id"] if row["template"] is None else repr(row["template"])


def rows_of_templates(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], kind: str
) -> list[BadRow]:
    """The rows that state a template of which one of the others was made too: whoever learned the one knows the other.

    Examples:
        >>> rows_of_templates([{"split": "train", "line": 7, "template": "list/1"}], [{"template": "list/1"}], "test prompt")
        [BadRow(split='train', line=7, reason="its template 'list/1' is also that of a test prompt")]
    """
    # By its spelling: whatever JSON holds may stand there.
    known = {repr(row["template"]) for row in others} - {"None"}
    return [
        BadRow(row["split"], row["line"], f"its template {row['template']!r} is also that of a {kind}")
        for row in rows
        if repr(row["template"]) in known
    ]


def sample(rows: list[Value], limit: int | None, random_seed: str) -> list[Value]:
    """A random subset in the original order; all rows without a limit."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place] for place in sorted(random.Random(random_seed).sample(range(len(rows)), limit))]


def most_frequent(bad: Sequence[BadRow]) -> str:
    """Why most rows were dropped, by one of them; nothing if none was.

    Examples:
        >>> equals = [BadRow("train", line, f"the same prompt stands in line {line - 1} of train") for line in (2, 5, 9)]
        >>> most_frequent([BadRow("train", 1, "the prompt is empty"), *equals])
        ' 4 were dropped, 3 of them like train line 2: the same prompt stands in line 1 of train.'
    """
    # Numbers and what is quoted differ from row to row.
    kinds = [re.sub(r"'.*|\d", "", row.reason) for row in bad]
    if not kinds:
        return ""
    kind, count = collections.Counter(kinds).most_common(1)[0]
    example = bad[kinds.index(kind)]
    return f" {len(bad)} were dropped, {count} of them like {example.split} line {example.line}: {example.reason}."


def _question_and_answer(row: Mapping[str, Any], prompt_column: str, answer_column: str) -> dict[str, str]:
    """The texts of a row.

    Raises:
        UnusableCellError: One of them is none, or the answer's messages answer another question.
    """
    cells = (("prompt", prompt_column, "user"), ("answer", answer_column, "assistant"))
    texts = {name: row_text(row, column, name, role) for name, column, role in cells}
    for column, role, name in ((prompt_column, "assistant", "answer"), (answer_column, "user", "prompt")):
        messages = messages_in(row.get(column))
        other = None if messages is None else turns_of(messages).get(role)
        if other is not None and str(other).strip() != texts[name]:
            raise UnusableCellError(
                f"the messages in `{column}` have another {name} than `{prompt_column}` and `{answer_column}`"
            )
    if prompt_column == answer_column and messages_in(row.get(prompt_column)) is None:
        raise UnusableCellError(f"`{prompt_column}` holds one text, which is no question and its answer")
    for column in PARTS_OF_QUESTIONS:
        beside = row.get(column) if column not in (prompt_column, answer_column) else None
        if isinstance(beside, str | Sequence | Mapping) and str(beside or "").strip():
            raise UnusableCellError(
                f"its column `{column}` is part of what was asked and would be left out: join it with `{prompt_column}`"
            )
    return texts


def _broken_rule(stated: Sequence[Mapping[str, Any]], answer: str) -> str | None:
    constraints = read_constraints(stated)
    broken = [each for each, met in zip(constraints, followed(constraints, answer), strict=True) if not met]
    rule = " ".join(broken[0].values()).strip() if broken else ""
    return f"the answer does not follow its own rule `{rule}`" if broken else None
