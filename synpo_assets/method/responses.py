"""Turning completions into response tables with ids, and what the rules of their prompts say of them."""

import operator

import polars as pl

from synpo_assets.method.cut import whole_answers
from synpo_assets.method.ids import content_id
from synpo_assets.method.rules import followed
from synpo_assets.method.verifiable import has_rules


def response_table(
    prompts: pl.DataFrame, completions: pl.DataFrame, checkpoint_sha: str, iteration: int
) -> pl.DataFrame:
    """Joins prompts with their completions, in the same order; further columns of the prompts come last.

    What was cut is trimmed (see cut.py). The response_id hashes prompt, model and text: the same answer found again keeps its id.
    """
    answers = whole_answers(completions)
    ids = [
        content_id("response", prompt, checkpoint_sha, text)
        for prompt, text in zip(prompts["prompt_id"], answers, strict=True)
    ]
    return pl.DataFrame(
        {
            "response_id": pl.Series(ids, dtype=pl.String),
            "prompt_id": prompts["prompt_id"],
            "prompt": prompts["prompt"],
            "response": answers,
            "iteration": pl.Series([iteration] * prompts.height, dtype=pl.Int64),
            "checkpoint_sha": pl.Series([checkpoint_sha] * prompts.height, dtype=pl.String),
            "input_tokens": completions["input_tokens"],
            "output_tokens": completions["output_tokens"],
            "finish_reason": completions["finish_reason"],
        }
    ).hstack(prompts.drop("prompt_id", "prompt"))


def answers_that_follow(prompts: pl.DataFrame, answers: pl.DataFrame) -> pl.Series:
    """Of the prompts that have rules and an answer, whether the answer follows all of them; one that was cut follows none.

    Examples:
        >>> rules = [[{"rule": "words_at_most", "value": "1"}], []]
        >>> prompts = pl.DataFrame({"prompt_id": ["a", "b"], "constraints": rules})
        >>> answers = {"prompt_id": ["a", "b", "a"], "response": ["Yes.", "Yes.", "Yes."]}
        >>> answers_that_follow(prompts, pl.DataFrame(answers | {"finish_reason": ["stop", "stop", "length"]})).to_list()
        [True, False]
    """
    asked = prompts.filter(has_rules(prompts)).select("prompt_id", "constraints")
    ruled = asked.join(answers.select("prompt_id", "response", "finish_reason"), on="prompt_id")
    ended = (ruled["finish_reason"] == "stop").to_list()
    held = [all(followed(*row)) for row in ruled.select("constraints", "response").rows()]
    return pl.Series([*map(operator.and_, held, ended)], dtype=pl.Boolean)
