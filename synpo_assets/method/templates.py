"""The instruction templates: to the prompt generator, to the response improver, and to M_0 for the Self-Instruct baseline.

The paper prints its templates in the appendix; ours have the same parts in the same order, in our own words,
in the files of the folder `templates`.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jinja2
import polars as pl

Message = dict[str, str]

FOLDER = Path(__file__).parent / "templates"
QUESTION_START, QUESTION_END = "<question>", "</question>"
SOLUTION_START = "<solution>"


def user_message(text: str) -> list[Message]:
    """A conversation that consists of one user turn."""
    return [{"role": "user", "content": text}]


def prompt_requests(prompts: pl.DataFrame, ids: str = "prompt_id") -> list[tuple[str, list[Message]]]:
    """The prompts of a table as they are asked, each with its id."""
    return [(row_id, user_message(prompt)) for row_id, prompt in prompts.select(ids, "prompt").iter_rows()]


def generator_instruction(keywords: Sequence[str]) -> list[Message]:
    """What the prompt generator is asked: background, requirements, the keywords, the output format."""
    return user_message(_environment().get_template("prompt_generator.jinja").render(keywords=list(keywords)))


def generator_target(prompt: str, answer: str) -> str:
    """What the prompt generator learns to write: the question with its solution."""
    return _environment().get_template("prompt_generator_target.jinja").render(prompt=prompt, answer=answer)


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


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True
    )
