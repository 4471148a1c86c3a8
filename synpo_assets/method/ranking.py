"""Ranking several answers of one model to the same prompt, in place of an improved answer."""

import polars as pl


def repeated_prompts(prompts: pl.DataFrame, samples: int) -> pl.DataFrame:
    """Each prompt as often as it is answered, with sample (1, 2, ...) and sample_id.

    The id of the first sample is the prompt_id itself, under which the prompt was answered before.

    Examples:
        >>> repeated_prompts(pl.DataFrame({"prompt_id": ["prompt-1f"]}), 3)["sample_id"].to_list()
        ['prompt-1f', 'prompt-1f sample 2', 'prompt-1f sample 3']
    """
    numbers = pl.DataFrame({"sample": range(1, samples + 1)}, schema={"sample": pl.Int64})
    sample_id = pl.format("{} sample {}", "prompt_id", "sample")
    return prompts.join(numbers, how="cross", maintain_order="left_right").with_columns(
        sample_id=pl.when(pl.col("sample") == 1).then("prompt_id").otherwise(sample_id)
    )


def beside_first(answered: pl.DataFrame) -> pl.DataFrame:
    """What the scorer compares: each further answer to a prompt with the first one, which stands before the others."""
    beside = answered.with_columns(first_response=pl.col("response").first().over("prompt_id"))
    return beside.filter(pl.col("sample") > 1).select("prompt", "response", "first_response")


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
    further = (
        answered.select("prompt_id", "sample").filter(pl.col("sample") > 1).with_columns(margin_over_first=margins)
    )
    ranked = answered.join(further, on=["prompt_id", "sample"], how="left", maintain_order="left")
    ranked = ranked.with_columns(pl.col("margin_over_first").fill_null(0.0))
    cut = pl.col("finish_reason") == "length"
    by_margin = pl.struct(cut, -pl.col("margin_over_first"), "sample").rank("ordinal").over("prompt_id")
    ended = (~cut).sum().over("prompt_id").clip(2)
    return ranked.with_columns(rank=by_margin.cast(pl.Int64), worst=ended.cast(pl.Int64))
