"""How varied the synthetic prompts are, beside the seed prompts and a baseline that M_0 writes.

Paper (section on diversity): the mean cosine similarity of each of 1,000 prompts to all others, by an embedding model that
is not named; synthetic prompts are less alike than those of UltraFeedback, Self-Instruct and UltraChat. A judge names the
topics of 1,000 prompts.
Here: the same measure with all-MiniLM-L6-v2, on samples of equal size. The baseline is written by the same M_0 after
seeing a few seed prompts (Self-Instruct, https://arxiv.org/abs/2212.10560). All sources pass one filter (prompts.py):
length, language, near-duplicates. Intervals are over prompts: they say how far another sample of prompts of the same
source would differ, and nothing of another training of the generator. Topics are clusters of the embeddings, which need
no judge and have no names. Nonsense is varied too, so the share of the prompts whose words M_0 finds likelier in their
order than shuffled stands beside it (method/word_order.py). Where `judge.server` is stated, its model says whether a prompt
can be answered, and names a topic and an intention, from lists of our own (resources/judging/labels.yaml): the paper's
counts are of other lists.
"""

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from resources.generation.language_model import Usage
from resources.judging.judge_choice import topic_labeler
from resources.models.model_source import fetch_embedding_model
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.drawing import Plot, finish, new_figure, plot_of
from synpo_assets.graph.evaluation_schemas import PromptDiversity, SelfInstructPrompts
from synpo_assets.graph.metrics import Metric, MetricName
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.cut import whole_answers
from synpo_assets.method.diversity import (
    SOURCES,
    Diversity,
    density,
    equal_samples,
    label_counts,
    label_coverage,
    measure,
)
from synpo_assets.method.prompts import draw_until_enough
from synpo_assets.method.self_instruct import draw_examples, parse_task
from synpo_assets.method.templates import self_instruct_instruction
from synpo_assets.method.word_order import ORDERS, REQUEST, answerable_shares, in_three_orders, ordered_shares
from synpo_assets.method.words import words_of
from synpo_assets.stages.prompts import FILTER_READS, asked_in_evaluations, prompt_filter

# Orange, blue and grey stay apart for colour-blind eyes, and the lines differ too.
SOURCE_STYLES = dict(zip(SOURCES, (("-", "#0072b2"), ("--", "#e69f00"), ("-.", "#666666")), strict=True))
SHOWN_PLACES, SMALLEST_MARGIN = 400, 0.02
ROUNDED_DIGITS = 4


@Stage(
    SelfInstructPrompts,
    group="seed",
    once=True,
    work=("generates",),
    reads=(
        "diversity.self_instruct_shots", "diversity.self_instruct_max_words", "diversity.self_instruct_sampling",
        "diversity.sample_size",
        "prompt_generator.sampling", "prompt_generator.prompts_per_iteration", "prompt_generator.max_overdraw", *FILTER_READS,
    ),
    samplings=lambda settings: [settings.self_instruct_sampling],
    cost=lambda sizes: [
        Work("generate", sizes.settings.compared_prompts * sizes.settings.self_instruct_sampling.max_new_tokens)
    ],
)  # fmt: skip
def self_instruct_prompts(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    verifiable_instructions: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """The baseline: prompts that M_0 writes after seeing some of the seed, as many as are compared.

    What `prompt_diversity` compares the synthetic prompts with: they should be more varied than these.
    """
    settings, wanted = services.settings, services.settings.compared_prompts
    shown = dict(shown_seed_prompts(settings, seed_pairs).select("prompt_id", "prompt").iter_rows())
    shots, most = settings.diversity.self_instruct_shots, math.ceil(wanted * settings.prompt_generator.max_overdraw)
    draws = draw_examples(list(shown), shots, most, settings.random_seed)
    asked_later = asked_in_evaluations(seed_pairs, verifiable_instructions)
    tasks = prompt_filter(settings, seed_pairs.filter(split="train")["prompt"], asked_later, parse_task)
    usages: list[Usage] = []

    def write(drawn: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        examples = {f"self-instruct {row['number']}": [shown[name] for name in row["example_ids"]] for row in drawn}
        requests = ((row_id, self_instruct_instruction(texts)) for row_id, texts in examples.items())
        written, usage = services.language_model.answer(initial_policy, requests, settings.self_instruct_sampling)
        usages.append(usage)
        return written.with_columns(text=whole_answers(written)).to_dicts()

    kept, used = draw_until_enough(draws, wanted, write, tasks.keep)
    # There may be no rows, from a model that writes nothing: prompt_diversity then goes without the baseline.
    rows = [{**row, "checkpoint_sha": initial_policy.sha} for row in kept]
    frame = pl.DataFrame(rows, schema=SelfInstructPrompts.empty().schema)
    dropped = [Metric("dropped", count, of=reason) for reason, count in tasks.dropped.items()]
    measured = [Metric("prompts_wanted", wanted), Metric("sources_used", used), *dropped, *metrics.generating(*usages)]
    return table_output(context, services, frame, measured, **made_by(initial_policy))


def _diversity_cost(sizes: Sizes) -> list[Work]:
    compared = len(SOURCES) * sizes.settings.compared_prompts
    return [Work("score", compared * ORDERS * 2 * sizes.asked)]


@Stage(
    PromptDiversity,
    group="evaluation",
    work=("scores", "embeds"),
    reads=(
        "diversity.sample_size", "diversity.clusters", "diversity.embedding_model", "judge.server", *FILTER_READS,
    ),
    cost=_diversity_cost,
)  # fmt: skip
def prompt_diversity(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    seed_pairs: pl.DataFrame,
    self_instruct_prompts: pl.DataFrame,
    initial_policy: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """How varied prompts are, and how many make sense: the synthetic ones, those of the seed, and the baseline.

    `mean_similarity` is lower where prompts are more varied: that of the synthetic prompts should lie below the baseline's and
    not rise. Nonsense is varied, too, so read `ordered_share` beside it.
    """
    settings = services.settings
    seed, dropped = filtered_seed(settings, seed_pairs)
    prompts = (synthetic_prompts["prompt"].to_list(), seed, self_instruct_prompts["prompt"].to_list())
    sources = dict(zip(SOURCES, prompts, strict=True))
    sampled = equal_samples(sources, settings.diversity.sample_size, settings.random_seed)
    for name in sources.keys() - sampled.keys():
        context.log.warning(f"{name} has {len(sources[name])} prompts, too few to compare: it is left out.")
    weights, origin = fetch_embedding_model(settings.diversity.embedding_model, settings.engine.trust_remote_code)
    embedded = services.embedder.embed(weights, [text for texts in sampled.values() for text in texts])
    measures = measure(sampled, embedded.vectors, settings.diversity.clusters, settings.random_seed)
    ordered, reading = _word_order(services, initial_policy, sampled)
    answerable, labelled, shown = _labels(services, sampled)
    frame = _frame(measures.rows, [*ordered, *answerable], sources, origin["name"], iteration_of(context))
    measured = [
        *_prompt_metrics(frame),
        *(Metric("dropped", count, of=reason) for reason, count in dropped.items()),
        *reading,
        *metrics.embedding(embedded),
        *labelled,
    ]
    shown |= {f"embedding_model {key}": value for key, value in origin.items()}
    return table_output(context, services, frame, measured, **_shown(measures, iteration_of(context)), **shown)


def _shown(measures: Diversity, iteration: int) -> dict[str, Any]:
    """How alike prompts are as a plot, and the most and least alike ones and the largest clusters as tables."""
    plot = similarity_densities(iteration, measures)
    return {
        "similarities": dg.MetadataValue.md(f"![{plot.description}]({plot.data_uri})"),
        "extremes": table_metadata(pl.DataFrame(measures.extremes)),
        "topics": table_metadata(pl.DataFrame(measures.topics)),
    }


def filtered_seed(settings: Settings, seed: pl.DataFrame) -> tuple[list[str], collections.Counter[str]]:
    """The prompts of the train split that the filter of the other sources keeps, and why it drops the others.

    Overlaps with held-out prompts are looked for where the seed is read (seed_data.on_bad_rows).
    """
    prompts = prompt_filter(settings, parse=str.strip)
    kept = [prompt for text in seed.filter(split="train")["prompt"] if (prompt := prompts.keep(text)) is not None]
    return kept, prompts.dropped


def shown_seed_prompts(settings: Settings, seed: pl.DataFrame) -> pl.DataFrame:
    """The rows of the train split whose prompt is short enough to be shown to M_0 for the Self-Instruct baseline."""
    most = settings.diversity.self_instruct_max_words
    train = seed.filter(split="train")
    shown = train.filter([len(words_of(prompt)) <= most for prompt in train["prompt"]])
    if shown.is_empty():
        raise SettingsError(
            f"No seed prompt has at most diversity.self_instruct_max_words = {most} words, so none can be shown to M_0 for "
            "the Self-Instruct baseline: raise it."
        )
    return shown


def _word_order(
    services: Services, initial_policy: Checkpoint, sampled: Mapping[str, Sequence[str]]
) -> tuple[list[dict[str, Any]], list[Metric]]:
    """How many prompts of each source M_0 finds likelier than their shuffled words, and the cost."""
    random_seed = services.settings.random_seed
    texts = [
        text for prompts in sampled.values() for prompt in prompts for text in in_three_orders(prompt, random_seed)
    ]
    read = services.likelihood.measure(initial_policy, [(REQUEST, text) for text in texts])
    ends = np.cumsum([len(prompts) for prompts in sampled.values()])[:-1]
    of_sources = np.split(np.array(read.per_token).reshape(-1, ORDERS), ends)
    rows = ordered_shares(dict(zip(sampled, of_sources, strict=True)))
    return rows, metrics.reading([read])


def _labels(
    services: Services, sampled: Mapping[str, Sequence[str]]
) -> tuple[list[dict[str, Any]], list[Metric], dict[str, Any]]:
    """What the model of judge.server says of the prompts: how many can be answered, metrics, and tables.

    All are empty where none is stated.
    """
    if services.settings.judge.server is None:
        return [], [], {}
    labeler = topic_labeler(services.settings.judge, services.scorer)
    texts = [text for prompts in sampled.values() for text in prompts]
    named, usage = labeler.label_prompts(texts)
    waiting = iter(named)
    labelled = {source: list(itertools.islice(waiting, len(prompts))) for source, prompts in sampled.items()}
    rows = label_coverage(labelled)
    names: tuple[MetricName, ...] = ("topics", "topic_entropy", "intentions", "intention_entropy", "not_labelled")
    measured = [Metric(name, row[name], of=row["source"]) for row in rows for name in names]
    shown = {
        "labelled_by": labeler.label,
        "label_coverage": table_metadata(pl.DataFrame(rows)),
        "label_counts": table_metadata(pl.DataFrame(label_counts(labelled))),
    }
    answerable = answerable_shares(labelled)
    for row, covered in zip(answerable, rows, strict=True):
        who = {"of": row["source"], "n": covered["labelled"]}
        measured.append(Metric("answerable_share", row["answerable_share"], **metrics.ends(row, "answerable"), **who))
    return answerable, measured + metrics.scoring(usage), shown


def _frame(
    measured: Sequence[dict[str, Any]],
    further: Sequence[dict[str, Any]],
    sources: Mapping[str, Sequence[str]],
    model: str,
    iteration: int,
) -> pl.DataFrame:
    """The table, with numbers rounded: their last digits depend on the machine, and the content version on them."""
    same = {"embedding_model": model, "iteration": iteration}
    rows = {row["source"]: {**row, "available": len(sources[row["source"]]), **same} for row in measured}
    for row in further:
        rows[row["source"]] |= row
    frame = pl.DataFrame(list(rows.values()), schema=PromptDiversity.empty().schema)
    return frame.with_columns(pl.selectors.float().round(ROUNDED_DIGITS))


def _prompt_metrics(frame: pl.DataFrame) -> list[Metric]:
    """What the table says of each source, with intervals over its prompts."""
    measured = [Metric("prompts_compared", frame["prompts"][0])]
    for row in frame.iter_rows(named=True):
        who = {"of": row["source"], "n": row["prompts"]}
        measured += [
            Metric("mean_similarity", row["mean"], **metrics.ends(row, "mean"), **who),
            Metric("effective_clusters", row["effective_clusters"], **who),
            Metric("ordered_share", row["ordered_share"], **metrics.ends(row, "ordered"), **who),
            Metric("shuffled_ordered_share", row["shuffled_ordered_share"], **who),
        ]
    return measured


def similarity_densities(iteration: int, measures: Diversity) -> Plot:
    """How alike prompts are: the density of their mean similarities, one line per source, the interval of its mean shaded."""
    figure = new_figure()
    axes = figure.add_subplot()
    similarities, rows = measures.similarities, {row["source"]: row for row in measures.rows}
    everything = np.concatenate(list(similarities.values()))
    margin = 0.25 * (everything.max() - everything.min()) + SMALLEST_MARGIN
    places = np.linspace(everything.min() - margin, everything.max() + margin, SHOWN_PLACES)
    for name, values in similarities.items():
        style, colour = SOURCE_STYLES[name]
        axes.plot(places, density(values, places), style, color=colour, label=f"{name} (n = {len(values):,})")
        axes.axvline(values.mean(), color=colour, linewidth=0.8, linestyle=":")
        axes.axvspan(rows[name]["mean_low"], rows[name]["mean_high"], color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    finish(axes, "How alike prompts are", "mean cosine similarity to the others", "density")
    text = (
        f"Density of the prompts' mean cosine similarities to the others of their source, iteration {iteration}; shaded: the "
        "95 % interval of each mean over prompts."
    )
    return plot_of("similarities", text, figure)
