"""The instruction templates: to the prompt generator, to the response improver, and to M_0 for the Self-Instruct baseline.

The paper prints its templates in the appendix; ours have the same parts in the same order, in our own words,
in the files of the folder `templates`.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jinja2
import polars as pl

from synpo_assets.method.rules import constraints_problem, read_constraints, rules_text

Message = dict[str, str]

FOLDER = Path(__file__).parent / "templates"
QUESTION_START, QUESTION_END = "<question>", "</question>"
SOLUTION_START = "<solution>"
RULES_START, RULES_END = "<rules>", "</rules>"


def user_message(text: str) -> list[Message]:
    """A conversation that consists of one user turn."""
    return [{"role": "user", "content": text}]


def prompt_requests(prompts: pl.DataFrame, ids: str = "prompt_id") -> Iterator[tuple[str, list[Message]]]:
    """The prompts of a table as they are asked, each with its id."""
    return ((row_id, user_message(prompt)) for row_id, prompt in prompts.select(ids, "prompt").iter_rows())


def rewrite_requests(answers: pl.DataFrame, ids: str) -> Iterator[tuple[str, list[Message]]]:
    """What the improver is asked of each answer (`response`) of a table, with the answer's id."""
    rows = answers.select(ids, "prompt", "response").iter_rows()
    return ((row_id, improver_instruction(prompt, response)) for row_id, prompt, response in rows)


def generator_instruction(keywords: Sequence[str], with_rules: bool = False) -> list[Message]:
    """What the prompt generator is asked: background, requirements, the keywords, the output format.

    With rules, the format has a place for the rules of a question, as some questions of the seed have them.
    """
    template = _environment().get_template("prompt_generator.jinja")
    return user_message(template.render(keywords=list(keywords), with_rules=with_rules))


def generator_target(prompt: str, answer: str, constraints: Sequence[Mapping[str, str]] = ()) -> str:
    """What the prompt generator learns to write: the question, the rules that it states if it does, its solution.

    Rules follow the question, because it is easier to say what rules a question states than to ask what states given rules.
    """
    template = _environment().get_template("prompt_generator_target.jinja")
    return template.render(prompt=prompt, answer=answer, rules=rules_text(constraints))


def improver_instruction(prompt: str, response: str) -> list[Message]:
    """What the response improver is asked: role line, question, original answer, place of the rewrite."""
    template = _environment().get_template("response_improver.jinja")
    return user_message(template.render(prompt=prompt, response=response))


def self_instruct_instruction(examples: Sequence[str]) -> list[Message]:
    """What M_0 is asked for the Self-Instruct baseline: to add a task to a list of some seed prompts."""
    return user_message(_environment().get_template("self_instruct.jinja").render(examples=list(examples)))


def verbose_message(prompt: str) -> list[Message]:
    """What M_0 is asked where a long answer is wanted, as AlpacaEval 2's verbose baseline is."""
    return user_message(f"{prompt}\n\nAnswer in as much detail as possible.")


def parse_question(text: str) -> str | None:
    r"""The question in what the generator wrote, or None if the format is not met.

    Examples:
        >>> parse_question("OUTPUT\n<question>Why is the sky blue?</question>")
        'Why is the sky blue?'
        >>> parse_question("Why is the sky blue?") is None
        True
    """
    _, start, rest = text.partition(QUESTION_START)
    question, end, _ = rest.partition(QUESTION_END)
    question = question.strip()
    nested = QUESTION_START in question or SOLUTION_START in question
    return question if start and end and question and not nested else None


def parse_rules(text: str) -> list[dict[str, str]] | None:
    r"""The rules that the generator wrote after the question; none if it wrote no such tag, None if they do not parse.

    Examples:
        >>> parse_rules('<question>Why? In 9 words.</question>\n<rules>[{"rule": "words_at_most", "value": 9}]</rules>')
        [{'rule': 'words_at_most', 'value': '9'}]
        >>> parse_rules("<question>Why?</question>")
        []
        >>> parse_rules("<question>Why?</question><rules>be brief</rules>") is None
        True
    """
    question, _, after = text.partition(QUESTION_END)
    _, start, rest = after.partition(SOLUTION_START)[0].partition(RULES_START)
    written, end, _ = rest.partition(RULES_END)
    if not start and not any(tag in text for tag in (RULES_START, RULES_END)):
        return []
    try:
        stated = json.loads(written)
    except (ValueError, RecursionError):
        return None
    if not end or RULES_START in question or RULES_START in written or constraints_problem(stated):
        return None
    return read_constraints(stated)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True
    )
