"""How varied the synthetic prompts are, beside the seed prompts and a baseline that M_0 writes.

Paper (section on diversity): the mean cosine similarity of each of 1,000 prompts to all others, by an embedding model that
is not named; synthetic prompts are less alike than those of UltraFeedback, Self-Instruct and UltraChat. A judge names the
topics of 1,000 prompts.
Here: the same measure with all-MiniLM-L6-v2, on samples of equal size. The baseline is written by the same M_0 after
seeing a few seed prompts (Self-Instruct, https://arxiv.org/abs/2212.10560), without the filter that Self-Instruct has
against similar prompts, while the synthetic prompts are without near-duplicates (prompts.py). Topics are clusters of the
embeddings, which need no judge and have no names. Where `judge.server` is stated, its model names a topic and an intention
of the same prompts, from lists of our own (resources/judging/labels.yaml): the paper's counts are of other lists.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl

from resources.generation.language_model import LanguageModel, Usage
from resources.judging.judge_choice import topic_labeler
from resources.models.embeddings import SentenceEmbedder
from resources.models.model_source import fetch_embedding_model
from resources.scoring.scorer import RewardScorer
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.cli.preflight import shown_seed_prompts
from synpo_assets.graph.partitions import GPU_POOL, ITERATIONS, iteration_of, table
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.schemas import PromptDiversity, SelfInstructPrompts
from synpo_assets.method import diversity as diversity_method
from synpo_assets.method import prompts as prompt_method
from synpo_assets.method import self_instruct as self_instruct_method
from synpo_assets.method import templates
from synpo_assets.method.diversity import Diversity, equal_samples, label_counts, label_coverage, measure
from synpo_assets.method.prompts import draw_until_enough
from synpo_assets.method.self_instruct import NewTasks, draw_examples
from synpo_assets.method.templates import self_instruct_instruction
from synpo_assets.reports.plots import similarity_densities

SOURCES = ("synthetic", "seed", "self_instruct")
ROUNDED_DIGITS = 4


@dg.asset(
    **table(
        SelfInstructPrompts,
        "diversity.self_instruct_shots", "diversity.self_instruct_max_words", "diversity.self_instruct_sampling",
        "prompt_generator.sampling", "prompt_generator.prompts_per_iteration", "prompt_generator.max_overdraw",
        "engine.dtype", "engine.kind", self_instruct_method, prompt_method, templates,
    ),
    pool=GPU_POOL,
    kinds={"huggingface"},
)  # fmt: skip
def self_instruct_prompts(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    language_model: LanguageModel,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """The baseline: prompts that M_0 writes after seeing some of the seed, as many as G writes in an iteration."""
    options = settings.diversity
    shown = dict(shown_seed_prompts(settings, seed_pairs).select("prompt_id", "prompt").iter_rows())
    draws = draw_examples(
        list(shown), options.self_instruct_shots, settings.keyword_sets_per_iteration, settings.random_seed
    )
    tasks = NewTasks(seed_pairs.filter(split="train")["prompt"])
    usages: list[Usage] = []

    def write(drawn: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = [
            (f"self-instruct {row['number']}", self_instruct_instruction([shown[name] for name in row["example_ids"]]))
            for row in drawn
        ]
        written, usage = language_model.answer(initial_policy, asked, settings.self_instruct_sampling, context.log.info)
        usages.append(usage)
        return written.to_dicts()

    kept, asked_for = draw_until_enough(draws, settings.prompt_generator.prompts_per_iteration, write, tasks.keep)
    # There may be no rows, from a model that writes nothing: prompt_diversity then goes without the baseline.
    rows = [{**row, "checkpoint_sha": initial_policy.sha} for row in kept]
    frame = pl.DataFrame(rows, schema=SelfInstructPrompts.empty().schema)
    return table_output(
        context,
        frame,
        wanted=settings.prompt_generator.prompts_per_iteration,
        asked_for=asked_for,
        dropped=dg.MetadataValue.json(dict(tasks.dropped)),
        cut_share=(frame["finish_reason"] == "length").mean(),
        **sum(usages[1:], usages[0]).metadata(),
        **made_by(initial_policy),
    )


@dg.asset(
    partitions_def=ITERATIONS,
    **table(
        PromptDiversity,
        "diversity.sample_size",
        "diversity.clusters",
        "diversity.embedding_model",
        "judge.server",
        diversity_method,
    ),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def prompt_diversity(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    seed_pairs: pl.DataFrame,
    self_instruct_prompts: pl.DataFrame,
    embedder: SentenceEmbedder,
    scorer: RewardScorer,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """How much prompts resemble each other: the synthetic ones, those of the seed, and the Self-Instruct baseline."""
    options, tables = settings.diversity, (synthetic_prompts, seed_pairs.filter(split="train"), self_instruct_prompts)
    sources = {name: frame["prompt"].to_list() for name, frame in zip(SOURCES, tables, strict=True)}
    sampled = equal_samples(sources, options.sample_size, settings.random_seed)
    for name in sources.keys() - sampled.keys():
        context.log.warning(f"{name} has {len(sources[name])} prompts, too few to compare: it is left out.")
    weights, origin = fetch_embedding_model(options.embedding_model, settings.engine.trust_remote_code)
    texts = [text for prompts in sampled.values() for text in prompts]
    embedded = embedder.embed(weights, texts, context.log.info)
    found = measure(sampled, embedded.vectors, options.clusters, settings.random_seed)
    plot = similarity_densities(iteration_of(context), found.similarities)
    return table_output(
        context,
        _frame(found, sources, origin["name"], iteration_of(context)),
        **{f"mean_similarity {row['source']}": row["mean"] for row in found.rows},
        **{f"effective_clusters {row['source']}": row["effective_clusters"] for row in found.rows},
        prompts_compared=found.rows[0]["prompts"],
        similarities=dg.MetadataValue.md(f"![{plot.description}]({plot.data_uri})"),
        extremes=table_metadata(pl.DataFrame(found.extremes)),
        topics=table_metadata(pl.DataFrame(found.topics)),
        **{f"embedding_model {key}": value for key, value in origin.items()},
        **embedded.metadata(),
        **_labels(context, sampled, scorer, settings),
    )


def _labels(
    context: dg.AssetExecutionContext, sampled: Mapping[str, Sequence[str]], scorer: RewardScorer, settings: Settings
) -> dict[str, Any]:
    """What the model of judge.server says that the prompts are about, as metadata; nothing where none is stated."""
    if settings.judge.server is None:
        return {}
    labeler = topic_labeler(settings.judge, scorer)
    texts = [text for prompts in sampled.values() for text in prompts]
    named, usage = labeler.label_prompts(texts, context.log.info)
    waiting = iter(named)
    labelled = {source: list(itertools.islice(waiting, len(prompts))) for source, prompts in sampled.items()}
    rows = label_coverage(labelled)
    figures = ("topics", "topic_entropy", "intentions", "intention_entropy", "not_labelled")
    return {
        **{f"{name} {row['source']}": row[name] for row in rows for name in figures},
        "labelled_by": labeler.label,
        "label_coverage": table_metadata(pl.DataFrame(rows)),
        "label_counts": table_metadata(pl.DataFrame(label_counts(labelled))),
        **usage.metadata(),
    }


def _frame(found: Diversity, sources: Mapping[str, Sequence[str]], model: str, iteration: int) -> pl.DataFrame:
    """The table, with numbers rounded: their last digits depend on the machine, and the content version on them."""
    about = {"embedding_model": model, "iteration": iteration}
    rows = [{**row, "available": len(sources[row["source"]]), **about} for row in found.rows]
    frame = pl.DataFrame(rows, schema=PromptDiversity.empty().schema)
    return frame.with_columns(pl.selectors.float().round(ROUNDED_DIGITS))
