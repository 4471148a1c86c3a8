"""Whether a judge can judge: the pairs that it is trained on, and how often it is right about held-out pairs of each kind.

The better answer is always gold. If the worse ones were M_0's samples alone, a judge could go by what M_0 writes like or by
where it was cut, so they are of several kinds, and none of those that it is trained on is cut. What a judge would reach that
sees nothing but length, or nothing but the cut, stands beside each accuracy.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from synpo_assets.method.cut import whole_sentences
from synpo_assets.method.damage import DAMAGES, all_damages
from synpo_assets.method.outcomes import outcomes, win_rate, win_rate_interval

ANOTHER_GOLD = "another_gold"
BOTH_ENDED = "both_ended"
# Of one row, at most.
TRAINED_PAIRS = 3
# The worse answers of held-out pairs. The second holds the third, and those that ended by themselves.
KINDS: Mapping[str, str] = {
    "initial": "M_0's answer, as it was sampled",
    BOTH_ENDED: "M_0's answer, both sides ended",
    "initial_trimmed": "M_0's cut answer, trimmed to whole sentences",
    ANOTHER_GOLD: "gold of another prompt",
    "damaged": "gold with a damage, over prompts",
} | {name: f"gold: {name.replace('_', ' ')}" for name in DAMAGES}
COLUMNS = {"kind": pl.String, "prompt": pl.String, "better": pl.String, "worse": pl.String, "cut": pl.Boolean}


def other_answers(answers: Sequence[str]) -> list[str]:
    """Another row's answer for each row, from half the table away: neighbours may share a topic.

    Where that is the same text, as labels are, it is the next one that is not, if there is any.

    Examples:
        >>> other_answers(["a", "b", "c", "d"]), other_answers(["yes", "no", "yes", "yes"])
        (['c', 'd', 'a', 'b'], ['no', 'yes', 'no', 'no'])
    """
    rows, half, texts = len(answers), (len(answers) + 1) // 2, [answer.strip() for answer in answers]
    # The next row with another text; twice around, because the rows are taken as a circle.
    differing = list(range(rows))
    for place in range(2 * rows - 1, -1, -1):
        row, after = place % rows, (place + 1) % rows
        differing[row] = after if texts[after] != texts[row] else differing[after]
    away = [(row + half) % rows for row in range(rows)]
    return [answers[there if texts[there] != texts[row] else differing[there]] for row, there in enumerate(away)]


def training_pairs(rows: pl.DataFrame, seed: int) -> list[tuple[str, str, str]]:
    """Prompts with a better and a worse answer, up to three a row: over M_0's, gold of another prompt, and gold with a damage.

    What was cut is trimmed to whole sentences, so that how an answer ends never says that it is the worse one.

    Args:
        rows: prompt, answer, response (M_0's answer) and cut.
        seed: Draws the damage.
    """
    pairs = []
    for prompt, gold, worse in _worse_answers(rows, seed):
        kinds = [BOTH_ENDED, ANOTHER_GOLD]
        if damages := [name for name in worse if name in DAMAGES]:
            kinds.append(random.Random(f"{seed}:{prompt}").choice(damages))
        pairs += [(prompt, gold, worse[kind]) for kind in kinds if kind in worse]
    return pairs


def held_out_pairs(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """All kinds of pairs of each row: kind, prompt, the better and the worse answer, and whether the worse one is cut."""
    cut = {prompt for prompt, was_cut in rows.select("prompt", "cut").iter_rows() if was_cut}
    found = [
        (kind, prompt, gold, text, kind == "initial" and prompt in cut)
        for prompt, gold, worse in _worse_answers(rows, seed)
        for kind, text in worse.items()
    ]
    return pl.DataFrame(found, schema=COLUMNS, orient="row")


def accuracy_by_kind(pairs: pl.DataFrame, margins: pl.Series) -> pl.DataFrame:
    """How often a judge is right about pairs of each kind, a tie counting half, and what would be reached without reading.

    `length_alone` is a judge that prefers the longer answer, or the shorter one, whichever is right more often about gold over
    M_0's answers where both ended. `ending_alone` prefers the answer that was not cut, and knows nothing else. `damaged` is
    taken over prompts.

    Args:
        pairs: As `held_out_pairs` gives them.
        margins: How much better the judge finds the better answer of each pair.
    """
    longer = pairs["better"].str.len_chars().cast(pl.Int64) - pairs["worse"].str.len_chars().cast(pl.Int64)
    # By what length says of them: damages are made so that it says what their maker chose.
    of_gold = longer.filter(pairs["kind"] == BOTH_ENDED)
    direction = 1 if (win_rate(outcomes(longer if of_gold.is_empty() else of_gold)) or 0) >= 0.5 else -1
    judged = pairs.with_columns(
        judge=outcomes(margins), length=outcomes(direction * longer), ending=outcomes(pairs["cut"].cast(pl.Int64))
    )
    held = {kind: list(DAMAGES) if kind == "damaged" else [kind] for kind in KINDS}
    rows = [_kind_row(kind, judged.filter(pl.col("kind").is_in(kinds))) for kind, kinds in held.items()]
    numbers = dict.fromkeys(("accuracy", "low", "high", "length_alone", "ending_alone"), pl.Float64)
    return pl.DataFrame(rows, schema_overrides=numbers)


def doubt(accuracy: float | None, low: float | None, high: float | None, pairs: int | None) -> str | None:
    """Why the win rates of a judge say nothing; None if it tells gold from M_0's answers better than chance.

    Args:
        accuracy: Its accuracy on held-out pairs whose both sides ended.

    Examples:
        >>> doubt(0.5625, 0.3933, 0.7183, 32)
        'The judge is right about 56.2% (39.3 to 71.8) of 32 held-out pairs whose both sides ended, gold over M_0: that ...'
        >>> doubt(0.84, 0.68, 0.93, 32) is None
        True
    """
    if not pairs or accuracy is None or low is None or high is None:
        return "There is no held-out pair whose both sides ended, gold over M_0, to try the judge on: its win rates say nothing."
    if low > 0.5:
        return None
    return (
        f"The judge is right about {accuracy:.1%} ({100 * low:.1f} to {100 * high:.1f}) of {pairs} held-out pairs whose both sides "
        "ended, gold over M_0: that is not above chance, so its win rates say nothing."
    )


def _kind_row(kind: str, judged: pl.DataFrame) -> dict[str, str | float | None]:
    """What was right about the pairs of a kind; several of one prompt are not independent, so the interval is over prompts."""
    low, high = win_rate_interval(judged["judge"], judged["prompt"]) or (None, None)
    rates = {"accuracy": win_rate(judged["judge"]), "low": low, "high": high}
    nulls = {f"{name}_alone": win_rate(judged[name]) for name in ("length", "ending")}
    return {"kind": kind, "pairs": judged["prompt"].n_unique(), **rates, **nulls}


def _worse_answers(rows: pl.DataFrame, seed: int) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Each row's prompt and gold answer, and by kind the answers that are worse; those that are empty or gold itself left out."""
    others = other_answers(rows["answer"].to_list())
    texts = rows.select("prompt", "answer", "response", "cut").iter_rows()
    for (prompt, gold, response, cut), other in zip(texts, others, strict=True):
        ended = whole_sentences(response) if cut else response
        worse = {"initial": response, BOTH_ENDED: ended, ANOTHER_GOLD: other} | all_damages(gold, other, seed)
        if cut:
            worse["initial_trimmed"] = ended
        yield (
            prompt,
            gold,
            {kind: text for kind, text in worse.items() if text and text.strip() not in ("", gold.strip())},
        )
