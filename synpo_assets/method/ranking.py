"""Ranking several answers of one model to the same prompt, in place of one answer."""

import polars as pl

from synpo_assets.method.pairs import length_factor


def repeated_prompts(prompts: pl.DataFrame, samples: int, asked_by: str = "prompt_id") -> pl.DataFrame:
    """Each prompt as often as it is answered, with sample (1, 2, ...) and sample_id.

    The id of the first sample is the one in the column `asked_by` itself, under which the prompt was answered before.

    Examples:
        >>> repeated_prompts(pl.DataFrame({"prompt_id": ["prompt-1f"]}), 3)["sample_id"].to_list()
        ['prompt-1f', 'prompt-1f sample 2', 'prompt-1f sample 3']
    """
    numbers = pl.DataFrame({"sample": range(1, samples + 1)}, schema={"sample": pl.Int64})
    sample_id = pl.format("{} sample {}", asked_by, "sample")
    return prompts.join(numbers, how="cross", maintain_order="left_right").with_columns(
        sample_id=pl.when(pl.col("sample") == 1).then(asked_by).otherwise(sample_id)
    )


def beside_first(answered: pl.DataFrame) -> pl.DataFrame:
    """What is compared: each further answer to a prompt (`first`) with the first one (`second`), which stands before the others."""
    beside = answered.with_columns(second=pl.col("response").first().over("prompt_id"))
    return beside.filter(pl.col("sample") > 1).select("prompt", "second", "constraints", first="response")


def with_ranks(answered: pl.DataFrame, margins: pl.Series) -> pl.DataFrame:
    """Ranks the answers to each prompt by their margin over the first one, whose own is 0; rank 1 is the best.

    The margins are those of the rows of `beside_first`. Of equal margins the earlier sample ranks better, so that each prompt
    has one best and, among two answers or more, another that is worst. Answers that were cut rank behind all others, and
    `worst` is the last rank before them; where less than two ended it is 2.

    Examples:
        >>> answered = pl.DataFrame({"prompt_id": ["a"] * 3, "sample": [1, 2, 3], "finish_reason": ["stop"] * 3})
        >>> with_ranks(answered, pl.Series([-0.5, 0.0]))["rank"].to_list()
        [1, 3, 2]
        >>> answered = answered.with_columns(finish_reason=pl.Series(["length", "stop", "stop"]))
        >>> with_ranks(answered, pl.Series([-0.5, 0.0])).select("rank", "worst").rows()
        [(3, 2), (2, 2), (1, 2)]
    """
    cut = pl.col("finish_reason") == "length"
    by_margin = pl.struct(cut, -pl.col("margin_over_first"), "sample").rank("ordinal").over("prompt_id")
    ended = (~cut).sum().over("prompt_id").clip(2)
    ranked = _with_margins(answered, margins)
    return ranked.with_columns(rank=by_margin.cast(pl.Int64), worst=ended.cast(pl.Int64))


def is_rejected() -> pl.Expr:
    """Whether an answer is the rejected one, but for white space around it."""
    return pl.col("response").str.strip_chars() == pl.col("rejected").str.strip_chars()


def best_of_like_length(answered: pl.DataFrame, margins: pl.Series, max_ratio: float) -> pl.DataFrame:
    """Of the answers to each prompt, the best among those about as long as `rejected`, or else the nearest in length.

    An answer is about as long if the longer of the two has at most `max_ratio` times the characters of the other; `is_alike`
    says whether it is. The margins are those of the rows of `beside_first`. Of equal answers the earlier sample is taken, one
    that was cut only where all were, and the rejected answer itself only where no other ended. Where a prompt has rules, an
    answer that follows them goes before length. One that `is_own`, by the model whose answer the others rewrite, takes part only
    where it ended and has a higher margin than each of the others that ended. The prompts keep the order of their first samples.

    Examples:
        >>> answered = pl.DataFrame({"prompt_id": ["a"] * 3, "sample": [1, 2, 3], "rejected": ["four"] * 3,
        ...                          "response": ["five!", "much longer", "for"], "finish_reason": ["stop"] * 3,
        ...                          "constraints": [[]] * 3, "is_own": [False] * 3})
        >>> best_of_like_length(answered, pl.Series([9.0, -1.0]), 1.25)["response"].to_list()
        ['five!']
        >>> best_of_like_length(answered, pl.Series([9.0, -1.0]), 1.1)["response"].to_list()
        ['five!']
        >>> best_of_like_length(answered, pl.Series([9.0, 1.0]), 1.5)["response"].to_list()
        ['for']
    """
    ratio = length_factor(pl.col("response"), pl.col("rejected"))
    compared = _with_margins(answered, margins).with_columns(ratio=ratio, is_alike=ratio <= max_ratio)
    distance = pl.when("is_alike").then(1.0).otherwise("ratio")
    cut = pl.col("finish_reason") == "length"
    highest = pl.col("margin_over_first").filter(~cut & ~pl.col("is_own")).max().over("prompt_id")
    is_above = (pl.col("margin_over_first") > highest).fill_null(True)
    compared = compared.filter(~pl.col("is_own") | (~cut & is_above))
    by_rules = pl.when(pl.col("constraints").list.len() > 0).then(-pl.col("margin_over_first")).otherwise(0.0)
    order = pl.struct(
        cut,
        is_rejected().alias("is_rejected"),
        by_rules.alias("by_rules"),
        distance.alias("distance"),
        -pl.col("margin_over_first"),
        "sample",
    )
    best = compared.filter(order.rank("ordinal").over("prompt_id") == 1)
    return answered.select(pl.col("prompt_id").unique(maintain_order=True)).join(
        best, on="prompt_id", maintain_order="left"
    )


def _with_margins(answered: pl.DataFrame, margins: pl.Series) -> pl.DataFrame:
    """The answers with the margin of each over the first one to its prompt, whose own is 0."""
    further = (
        answered.select("prompt_id", "sample").filter(pl.col("sample") > 1).with_columns(margin_over_first=margins)
    )
    ranked = answered.join(further, on=["prompt_id", "sample"], how="left", maintain_order="left")
    return ranked.with_columns(pl.col("margin_over_first").fill_null(0.0))
