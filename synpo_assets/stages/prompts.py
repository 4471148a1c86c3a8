"""Writing new prompts: the prompt generator G, this iteration's keyword sets, the synthetic prompts.

Paper (section 2.1): G is trained once, from M_0, to turn two keywords of a seed prompt and one noise keyword into the
prompt and its answer; at generation three keywords of one paragraph go in, and only the question is used.
Here: the prompt is masked in the SFT loss (not stated). Keyword sets are drawn without repetition across iterations while
the pool lasts, until enough prompts are valid or the cap `max_overdraw` is hit. We also drop near-duplicates, other
languages and prompts that overlap with held-out ones, which the paper does not do. Where seed rows have rules that a
program checks (`scorer.kind: verifier`), G also learns to write the rules of a prompt, after it; a prompt that does not
state them is dropped.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.generation.language_model import Usage
from resources.models.context import ModelContext
from resources.settings.method import Sampling
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work, training_work
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import checkpoint_output, made_by, table_output, training_log
from synpo_assets.graph.schemas import KeywordSets, SyntheticPrompts
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.ids import content_id
from synpo_assets.method.keywords import Keywords, drawn_rows, training_keywords
from synpo_assets.method.prompts import Contamination, NearDuplicates, PromptFilter, draw_until_enough
from synpo_assets.method.row_lengths import has_room
from synpo_assets.method.rules import CONSTRAINTS
from synpo_assets.method.seed import IS_HELD_OUT
from synpo_assets.method.templates import (
    RULES_END,
    SOLUTION_START,
    generator_instruction,
    generator_target,
    parse_question,
    parse_rules,
)
from synpo_assets.method.verifiable import has_rules
from synpo_assets.stages.seed import WRITTEN, room_of
from synpo_assets.stages.training import train_on_table

# What decides which prompts any source keeps.
FILTER_READS = (
    "prompt_generator.min_words", "prompt_generator.max_words", "prompt_generator.language",
    "prompt_generator.near_duplicate_similarity", "prompt_generator.decontamination_ngram",
)  # fmt: skip


def _training_cost(sizes: Sizes) -> list[Work]:
    training, length = sizes.settings.prompt_generator.training, sizes.generator_instruction + sizes.asked + sizes.gold
    return [training_work(training, sizes.train, length)]


@Stage(
    group="seed",
    checkpoint=True,
    once=True,
    work=("trains",),
    reads=(
        "prompt_generator.training", "prompt_generator.noise_keywords", "keyword_pool.keywords_per_set",
        "keyword_pool.language", "keyword_pool.drop_personal_names",
    ),
    cost=_training_cost,
)  # fmt: skip
def prompt_generator(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[Checkpoint]:
    """G, fine-tuned from M_0 to write a prompt and its answer from three keywords (paper, section 2.1).

    Look at `curves`: the loss should fall and stay down. Whether its prompts are any good shows in `synthetic_prompts`.
    """
    settings, seed = services.settings, seed_pairs.filter(split="train")
    generator, pool = settings.prompt_generator, settings.keyword_pool
    extractor = Keywords(pool.language, pool.drop_personal_names)
    counts = (settings.keywords_from_seed_prompt, generator.noise_keywords)
    drawn = training_keywords(seed["prompt"].to_list(), extractor, *counts, settings.random_seed)
    written = map(generator_target, seed["prompt"], seed["answer"], seed["constraints"].to_list())
    examples = [
        (generator_instruction(keywords, writes_rules(seed_pairs)), target)
        for keywords, target in zip(drawn, written, strict=True)
        if keywords is not None
    ]
    training, random_seed = generator.training, settings.random_seed
    made, summary = train_on_table(
        context, services, "supervised", initial_policy, examples, training, random_seed, seed_pairs=seed_pairs
    )
    measured = [Metric("examples_without_keywords", drawn.count(None)), *metrics.training(summary)]
    return checkpoint_output(context, services, made, measured, **training_log(summary))


@Stage(
    KeywordSets,
    group="prompts",
    kinds=("polars",),
    # It reads nothing of the policy; with this arrow every asset of an iteration descends from `policy`.
    deps=("policy",),
    reads=("prompt_generator.prompts_per_iteration", "prompt_generator.max_overdraw"),
)
def keyword_sets(
    context: dg.AssetExecutionContext, keyword_pool: pl.LazyFrame, services: dg.ResourceParam[Services]
) -> dg.Output[pl.DataFrame]:
    """This iteration's draw from the keyword pool, in random order (algorithm 1, line 1).

    Each row is one request to the prompt generator. The pool starts over when it is used up, which repeats sets.
    """
    settings, iteration = services.settings, iteration_of(context)
    pool_size = keyword_pool.select(pl.len()).collect().item()
    wanted = settings.keyword_sets_per_iteration
    rows = drawn_rows(pool_size, iteration, wanted, settings.random_seed)
    order = pl.DataFrame({"row": rows}, schema={"row": pl.UInt32}).lazy()
    drawn = order.join(keyword_pool.with_row_index("row"), on="row", how="inner", maintain_order="left").drop("row")
    frame = drawn.with_columns(iteration=pl.lit(iteration, pl.Int64)).collect()
    if iteration * wanted > pool_size:
        context.log.warning(f"The pool has {pool_size} keyword sets: some are drawn again. Enlarge the corpus.")
    return table_output(context, services, frame, [Metric("pool_size", pool_size)])


def prompt_sampling(settings: Settings) -> Sampling:
    """How G samples: only the question and its rules are used, so writing stops where they end, if not before."""
    sampling = settings.prompt_generator.sampling
    return sampling.model_copy(update={"stop": [*sampling.stop, RULES_END, SOLUTION_START]})


@Stage(
    SyntheticPrompts,
    group="prompts",
    work=("generates",),
    # How long the answers and rewrites may be, for which there must be room after a prompt.
    reads=("prompt_generator", *WRITTEN, "response_improver.sampling.max_new_tokens", "preferences.chosen_from"),
    samplings=lambda settings: [prompt_sampling(settings)],
    cost=lambda sizes: [
        Work("generate", sizes.settings.keyword_sets_per_iteration * prompt_sampling(sizes.settings).max_new_tokens)
    ],
    made_from={"keyword_set_id": "keyword_sets"},
)
def synthetic_prompts(
    context: dg.AssetExecutionContext,
    keyword_sets: pl.DataFrame,
    prompt_generator: Checkpoint,
    seed_pairs: pl.DataFrame,
    verifiable_instructions: pl.DataFrame,
    preference_history: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """New prompts that G writes from the keyword sets; only valid ones stay (paper, section 2.1).

    Read the sample: could a person have asked this, and can it be answered? `dropped` says how many were too short, repeated an
    earlier one, overlap with what evaluations ask, or leave too little room for an answer in the context.
    """
    earlier = [messages[0]["content"] for messages in preference_history["prompt"].to_list()]
    known = [*seed_pairs.filter(split="train")["prompt"], *earlier]
    with_rules, asked_later = writes_rules(seed_pairs), asked_in_evaluations(seed_pairs, verifiable_instructions)
    prompts = prompt_filter(
        services.settings, known, asked_later, with_rules=with_rules, fits=room_in(prompt_generator, services.settings)
    )
    kept, used, usages = written_prompts(
        services, prompt_generator, keyword_sets, prompts, with_rules, context.partition_key
    )
    constraints = [parse_rules(row["text"]) if with_rules else [] for row in kept]
    frame = pl.DataFrame(kept).with_columns(
        constraints=pl.Series(constraints, dtype=CONSTRAINTS),
        prompt_id=pl.Series([content_id("prompt", row["prompt"]) for row in kept]),
        checkpoint_sha=pl.lit(prompt_generator.sha),
    )
    frame = frame.select(*SyntheticPrompts.to_schema().columns)
    measured = [
        Metric("prompts_wanted", services.settings.prompt_generator.prompts_per_iteration),
        Metric("keyword_sets_used", used),
        *metrics.with_rules(frame),
        *(Metric("dropped", count, of=reason) for reason, count in prompts.dropped.items()),
        *metrics.generating(*usages),
    ]
    matches = table_metadata(pl.DataFrame(prompts.matches, schema=["prompt", "held_out_prompt"], orient="row"))
    return table_output(context, services, frame, measured, contaminated=matches, **made_by(prompt_generator))


def written_prompts(
    services: Services,
    generator: Checkpoint,
    keyword_sets: pl.DataFrame,
    prompts: PromptFilter,
    with_rules: bool,
    key: str,
) -> tuple[list[dict[str, Any]], int, list[Usage]]:
    """Draws keyword sets until G has written enough valid prompts: these, how many sets that took, and what it cost."""
    wanted, usages = services.settings.prompt_generator.prompts_per_iteration, list[Usage]()

    def write(drawn: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        # With the iteration in its id, a keyword set that is drawn again later gives another prompt.
        requests = [
            (f"{row['keyword_set_id']} {key}", generator_instruction(row["keywords"], with_rules)) for row in drawn
        ]
        written, usage = services.language_model.answer(generator, requests, prompt_sampling(services.settings))
        usages.append(usage)
        return written.to_dicts()

    kept, used = draw_until_enough(keyword_sets.to_dicts(), wanted, write, prompts.keep)
    if not kept:
        raise FinalError(
            f"None of {used} completions of the prompt generator held a valid prompt: {dict(prompts.dropped)}. "
            "If most are unparsable, train longer (prompt_generator.training); else loosen the filter that dropped them."
        )
    return kept, used, usages


def room_in(checkpoint: Checkpoint, settings: Settings) -> Callable[[str], bool]:
    """Says of a prompt whether M_0, and so what is trained from it, has room for it with what is written after it."""
    context = ModelContext(checkpoint.weights, settings.engine.trust_remote_code)
    if context.length is None:
        return lambda prompt: True
    room = room_of(settings, context.length)
    return lambda prompt: has_room(prompt, room, context.tokens)


def writes_rules(seed_pairs: pl.DataFrame) -> bool:
    """Whether G learns to write rules with its prompts."""
    return bool(has_rules(seed_pairs.filter(split="train")).any())


def asked_in_evaluations(seed_pairs: pl.DataFrame, verifiable_instructions: pl.DataFrame) -> list[str]:
    """The prompts that evaluations ask: none that overlaps with one of them is kept."""
    return [*seed_pairs.filter(IS_HELD_OUT)["prompt"], *verifiable_instructions["prompt"]]


def prompt_filter(
    settings: Settings,
    known: Iterable[str] = (),
    asked_later: Iterable[str] = (),
    parse: Callable[[str], str | None] = parse_question,
    with_rules: bool = False,
    fits: Callable[[str], bool] = lambda prompt: True,
) -> PromptFilter:
    """The filter of all sources of prompts: it knows prompts that are not written again, and those of evaluations."""
    options = settings.prompt_generator
    earlier = NearDuplicates(options.near_duplicate_similarity)
    for prompt in known:
        earlier.add(prompt)
    contamination = Contamination(asked_later, options.decontamination_ngram)
    return PromptFilter(
        options.min_words, options.max_words, options.language, earlier, contamination, parse, with_rules, fits
    )
