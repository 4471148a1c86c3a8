"""The held-out gold answers as M_t sees them: a measure that asks no judge.

Paper (section 3): no such measure.
Here: how likely M_t finds the held-out gold answers, and how close its own answers are to them in meaning, by the cosine of
sentence embeddings; both compared with M_0. Held-out answers are those of `evaluation`, the first where there are several.
The null is gold of another prompt of the split: a model that learned only how gold is written finds both likelier alike.
The end-of-turn token is measured by itself, because SimPO trains it on every finished answer: a rise of the mean over all tokens
may come from it alone. Likeness is also reported in bands of length, because an answer of another length than gold is less like
it whatever it says.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from resources.common.errors import FinalError
from resources.models.embeddings import Embedded
from resources.models.likelihood import Likelihoods
from resources.models.model_source import fetch_embedding_model
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Work
from synpo_assets.graph.evaluation_schemas import GoldComparison
from synpo_assets.graph.metrics import Metric, MetricName
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.graph.texts import GAIN_OF_SHARES
from synpo_assets.method.evaluation import LENGTH_BANDS, length_bands, mean_gain
from synpo_assets.method.judging import other_answers

# An empty answer has no embedding; this says as little.
NOTHING_SAID = "."
COMPARED = ("candidate", "initial")
# Gold of another prompt of the same split.
OTHER_ANSWER = pl.col("answer").map_batches(lambda gold: pl.Series(other_answers(gold.to_list()))).over("split")


@Stage(
    GoldComparison,
    group="evaluation",
    work=("scores", "embeds"),
    reads=("diversity.embedding_model",),
    cost=lambda sizes: [Work("score", 4 * sizes.held_out * (sizes.asked + sizes.gold))],
    made_from={"prompt_id": "evaluation"},
)
def gold_comparison(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    initial_policy: Checkpoint,
    evaluation: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """How likely M_t finds the held-out gold answers, and how close its own are to them, compared with M_0.

    Gains above 0 mean nearer to gold than M_0. A gain in likelihood that gold of another prompt has too is one of style. Length
    alone moves similarity, so read it by band; the end of turn is reported by itself, because every training moves it.
    """
    refuse_answers_of_another(model_checkpoint, evaluation)
    settings, models = services.settings, {"candidate": model_checkpoint, "initial": initial_policy}
    evaluation = evaluation.filter(sample=1)
    asked = gold_and_others(evaluation)
    likelihoods = {name: services.likelihood.measure(model, asked) for name, model in models.items()}
    weights, origin = fetch_embedding_model(settings.diversity.embedding_model, settings.engine.trust_remote_code)
    similarities, embedded = similarities_to_gold(services, weights, evaluation, list(models))
    frame = evaluation.with_columns(
        column.alias(f"{name}_{measure}")
        for name, likelihood in likelihoods.items()
        for measure, column in _measures_of(evaluation, name, likelihood, similarities[name]).items()
    ).with_columns(
        *(pl.lit(model.sha).alias(f"{name}_checkpoint_sha") for name, model in models.items()),
        iteration=pl.lit(iteration_of(context), pl.Int64),
    )
    frame = frame.select(*GoldComparison.to_schema().columns)
    measured = [
        *metrics.by_split(frame, lambda rows: gold_metrics(rows, model_checkpoint.sha)),
        *metrics.reading(likelihoods.values()),
        *metrics.embedding(embedded),
    ]
    return table_output(context, services, frame, measured, embedding_model=origin["name"], **made_by(model_checkpoint))


def gold_and_others(rows: pl.DataFrame) -> list[tuple[str, str]]:
    """Each prompt with its gold, then each with that of another one, so that a model is loaded once."""
    rows = rows.with_columns(other_answer=OTHER_ANSWER)
    return [row for answer in ("answer", "other_answer") for row in rows.select("prompt", answer).rows()]


def _measures_of(
    evaluation: pl.DataFrame, side: str, likelihood: Likelihoods, similarities: np.ndarray
) -> dict[str, pl.Series]:
    """What is measured of a model, a value per prompt; its likelihoods are those of gold, then of gold of other prompts."""
    rows, lengths = evaluation.height, evaluation.select(pl.col("answer", f"{side}_response").str.len_chars())
    return {
        "log_likelihood": pl.Series(likelihood.per_token[:rows]),
        "other_log_likelihood": pl.Series(likelihood.per_token[rows:]),
        "end_log_likelihood": pl.Series(likelihood.end[:rows]),
        "similarity": pl.Series(similarities, dtype=pl.Float64),
        "length_ratio": lengths[f"{side}_response"] / lengths["answer"],
    }


def similarities_to_gold(
    services: Services, weights: Path, evaluation: pl.DataFrame, sides: Sequence[str]
) -> tuple[dict[str, np.ndarray], Embedded]:
    """For each side, the cosine of each of its answers with the gold one."""
    columns = ("answer", *(f"{side}_response" for side in sides))
    texts = [text.strip() or NOTHING_SAID for column in columns for text in evaluation[column]]
    embedded = services.embedder.embed(weights, texts)
    vectors = embedded.vectors.reshape(len(columns), evaluation.height, -1)
    return dict(zip(sides, (vectors[1:] * vectors[0]).sum(axis=2), strict=True)), embedded


def gold_metrics(frame: pl.DataFrame, sha: str) -> list[Metric]:
    """Likelihood of gold and similarity to it, and M_t's gains over M_0 with intervals over prompts.

    Similarity is also given in each band of length that has answers. The gain in a band is taken over the prompts that both
    models answered in it.
    """
    names: tuple[tuple[str, MetricName, MetricName], ...] = (
        ("log_likelihood", "gold_log_likelihood", "gold_log_likelihood_gain"),
        ("end_log_likelihood", "gold_end_log_likelihood", "gold_end_log_likelihood_gain"),
        ("similarity", "gold_similarity", "gold_similarity_gain"),
    )
    measured = []
    for column, name, gain_name in names:
        measured += [_mean(name, frame, side, column) for side in COMPARED]
        measured.append(gain_metric(gain_name, _over_initial(frame, column), "initial", sha))
    measured += style_gains(frame, "initial", "initial", sha)
    bands = {side: length_bands(frame[f"{side}_length_ratio"]) for side in COMPARED}
    for band in LENGTH_BANDS:
        within = {side: frame.filter(bands[side] == band) for side in COMPARED}
        measured += [_mean("gold_similarity", within[side], side, "similarity", band) for side in COMPARED]
        both = frame.filter((bands["candidate"] == band) & (bands["initial"] == band))
        gains = _over_initial(both, "similarity")
        measured.append(gain_metric("gold_similarity_gain", gains, "initial", sha, band))
    return [metric for metric in measured if metric.by is None or metric.n]


def _mean(name: MetricName, frame: pl.DataFrame, side: str, column: str, band: str | None = None) -> Metric:
    return Metric(name, metrics.mean(frame[f"{side}_{column}"]), of=side, by=band, n=frame.height)


def _over_initial(frame: pl.DataFrame, column: str) -> pl.Series:
    return frame[f"candidate_{column}"] - frame[f"initial_{column}"]


def style_gains(frame: pl.DataFrame, side: str, over: str, sha: str) -> list[Metric]:
    """How much likelier M_t finds gold of other prompts than another model does, and gold's own gain beyond that.

    None where all gold is the same text, of which no other can be told.
    """
    if frame["answer"].str.strip_chars().n_unique() <= 1:
        return []
    gold, other = (
        frame[f"candidate_{of}log_likelihood"] - frame[f"{side}_{of}log_likelihood"] for of in ("", "other_")
    )
    gains: dict[MetricName, pl.Series] = {
        "other_gold_log_likelihood_gain": other,
        "gold_log_likelihood_gain_beyond_other": gold - other,
    }
    return [gain_metric(name, gained, over, sha) for name, gained in gains.items()]


def gain_metric(
    name: MetricName,
    gains: pl.Series,
    over: str,
    sha: str,
    by: str | None = None,
    groups: pl.Series | None = None,
) -> Metric:
    """The mean of M_t's values less those of another model, with its interval over rows, or over groups of rows, which n counts."""
    gain, low, high = mean_gain(gains, groups, 1.0 if GAIN_OF_SHARES.fullmatch(name) else math.inf)
    return Metric(
        name, gain, "candidate", over, by, low, high, len(gains) if groups is None else groups.n_unique(), sha
    )


def refuse_answers_of_another(model_checkpoint: Checkpoint, answers: pl.DataFrame, asset: str = "evaluation") -> None:
    """Raises a sentence if the answers in the table of an asset are not those of this M_t."""
    answered = answers["candidate_checkpoint_sha"].first()
    if answered != model_checkpoint.sha:
        raise FinalError(
            f"The answers in `{asset}` are those of {str(answered)[:16]}, not of {model_checkpoint.label}, which is "
            f"{model_checkpoint.sha[:16]}: materialize `{asset}` of this iteration again first."
        )
