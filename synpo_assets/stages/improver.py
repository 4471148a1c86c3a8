"""The two sides of a pair, the paper's way: the response improver, the refined answers, and M_0's answers.

Paper (section 2.2, algorithm 1 lines 2 to 4): the policy M_{t-1} answers the seed prompts; where gold beats its answer
by a margin, (prompt, own answer) -> gold trains the response improver R_t, from M_0 in every iteration. R_t then
rewrites the policy's answers to the synthetic prompts, once. M_0's answers to them become the rejected side.
Here: the same, with `preferences.rejected_from` as a setting for an ablation, and
`response_improver.init_from` because an improver that starts from M_0 can fall behind the policy that it rewrites. At t = 1 the
policy is M_0, so its answers to synthetic prompts are found in the shards and not generated twice. A scorer that is trained
here never saw the seed rows that are filtered (scorers.py), and how many gold answers pass stands beside how many would pass
in whose place gold of another prompt is scored: if these are as many, the filter knows nothing of what was asked. Several
rewrites of an answer (`response_improver.samples`) are made and chosen from in best_rewrites.py.
Where M_{t-1} already follows the rules of a seed prompt, gold is no better and the row is dropped, so that R_t, from M_0, is shown
ever fewer right answers; with `response_improver.keep_right_answers` such rows stay.
Where `response_improver.damaged_copies` is more than 0, R_t is also trained on damaged gold -> gold, so that it learns to edit what
it is shown and not only to answer anew; the paper trains on own answers alone. Damaged gold needs no filter, because gold is the
better one by construction. What R_t makes of damaged answers is measured in evaluation/improver_edits.py.
"""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from resources.storage.checkpoint_store import Checkpoint
from resources.training.job import TrainingError
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work, training_work
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import checkpoint_output, made_by, table_output, training_log
from synpo_assets.graph.schemas import RefinedResponses, Responses, SeedResponses
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.edits import damaged_copies
from synpo_assets.method.judging import ANOTHER_GOLD, other_answers
from synpo_assets.method.responses import answers_that_follow, response_table
from synpo_assets.method.templates import Message, improver_instruction, rewrite_requests
from synpo_assets.method.verifiable import both_follow, preferred
from synpo_assets.stages.responses import answer_prompts
from synpo_assets.stages.scorers import comparison_tokens, scored_answers
from synpo_assets.stages.training import train_on_table

# Whose margin over the policy's answer stands in which column.
MARGINS = {"gold": "margin", ANOTHER_GOLD: "other_margin"}


@Stage(
    Responses,
    group="responses",
    work=("generates",),
    reads=("responses", "preferences.rejected_from"),
    samplings=lambda settings: [settings.responses.sampling],
    cost=lambda sizes: [Work("generate", sizes.prompts * sizes.written, later_only=True)],
    made_from={"prompt_id": "synthetic_prompts"},
)
def rejected_responses(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    initial_policy: Checkpoint,
    policy: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """M_0's answers to the synthetic prompts: the rejected side in every iteration (algorithm 1, line 4).

    Read the sample beside that of the chosen side: the pairs teach the difference between the two. `cut_share` should be small,
    or the pairs teach how an answer ends.
    """
    answerer = initial_policy if services.settings.preferences.rejected_from == "initial" else policy
    frame, usage = answer_prompts(context, services, synthetic_prompts.select("prompt_id", "prompt"), answerer)
    return table_output(context, services, frame, metrics.generating(usage), **made_by(answerer))


@Stage(
    SeedResponses,
    group="responses",
    work=("generates", "scores"),
    reads=("responses", "scorer.convention", "scorer.max_length"),
    samplings=lambda settings: [settings.responses.sampling],
    cost=lambda sizes: [
        Work("generate", sizes.train * sizes.written),
        Work("score", 2 * sizes.train * comparison_tokens(sizes, sizes.gold, sizes.written)),
    ],
    made_from={"prompt_id": "seed_pairs"},
)
def seed_responses(
    context: dg.AssetExecutionContext,
    seed_pairs: pl.DataFrame,
    policy: Checkpoint,
    reward_model: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """M_{t-1}'s answers to the seed prompts, scored in comparison with the gold answers (algorithm 1, line 2).

    A margin above 0 means that the scorer prefers gold. The rows above the threshold are what the improver learns from; where
    few are, it learns little.
    """
    seed = seed_pairs.filter(split="train").select("prompt_id", "prompt", "answer", "constraints")
    frame, usage = answer_prompts(context, services, seed, policy)
    others = frame.with_columns(answer=pl.Series(other_answers(frame["answer"].to_list()), dtype=pl.String))
    # Trimming can make an answer short enough for a rule, so what was cut follows none.
    by_rules = (pl.col("finish_reason") == "length") & (pl.col("constraints").list.len() > 0)
    second = pl.when(by_rules).then(pl.lit("")).otherwise("response")
    asked = pl.concat([frame, others]).select("prompt", "constraints", first="answer", second=second)
    compared = scored_answers(services, reward_model, asked)
    found = compared.rows.head(frame.height)
    scored = frame.drop("constraints").with_columns(
        answer_score=found["first_score"],
        response_score=found["second_score"],
        margin=found["margin"],
        other_margin=compared.rows["margin"].tail(frame.height),
        score_convention=found["score_convention"],
        scorer_sha=pl.lit(reward_model.sha),
    )
    better = [metrics.share("gold_better_share", scored[column] > 0, whose) for whose, column in MARGINS.items()]
    measured = [*better, *metrics.generating(usage), *metrics.scoring(compared.usage)]
    return table_output(context, services, scored, measured, score_convention=compared.conventions, **made_by(policy))


def _training_cost(sizes: Sizes) -> list[Work]:
    options = sizes.settings.response_improver
    # A damaged answer is about as long as gold.
    shown = (sizes.written + options.damaged_copies * sizes.gold) / (1 + options.damaged_copies)
    length = sizes.improver_instruction + sizes.asked + shown + sizes.gold
    return [training_work(options.training, (1 + options.damaged_copies) * sizes.train, length)]


@Stage(
    group="responses",
    checkpoint=True,
    work=("trains",),
    reads=tuple(
        f"response_improver.{name}"
        for name in ("init_from", "training", "margin_threshold", "keep_right_answers", "damaged_copies")
    ),
    cost=_training_cost,
)
def response_improver(
    context: dg.AssetExecutionContext,
    seed_responses: pl.DataFrame,
    initial_policy: Checkpoint,
    policy: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[Checkpoint]:
    """R_t, fine-tuned to turn the policy's own answer into the gold answer (algorithm 1, line 2).

    It starts from M_0, or from M_{t-1} where `response_improver.init_from` says so. Look at `curves`: the loss should fall and stay
    down. `examples` says how many rows it learned from.
    """
    options, random_seed = services.settings.response_improver, services.settings.random_seed
    right = both_follow("answer_score", "response_score") if options.keep_right_answers else pl.lit(False)
    valid = seed_responses.filter(preferred("margin", options.margin_threshold) | right, pl.col("response") != "")
    if valid.is_empty():
        raise TrainingError(
            "No gold answer beats an answer of the policy's own by more than response_improver.margin_threshold = "
            f"{options.margin_threshold}, or by rules that it breaks: lower the threshold."
        )
    damaged = damaged_copies(seed_responses.select("prompt", "answer"), options.damaged_copies, random_seed)
    examples = [*_examples(valid, "response"), *_examples(damaged, "damaged")]
    start = initial_policy if options.init_from == "initial" else policy
    made, summary = train_on_table(
        context, services, "supervised", start, examples, options.training, random_seed, seed_responses=seed_responses,
    )  # fmt: skip
    answered = seed_responses.filter(pl.col("response") != "")
    passing = [
        metrics.share("passing_share", answered.select(passes).to_series(), whose)
        for whose, passes in ((whose, preferred(column, options.margin_threshold)) for whose, column in MARGINS.items())
    ]
    kept = [Metric("right_answers_kept", valid.filter(right).height)] if options.keep_right_answers else []
    measured = [*passing, *kept, *_origin_metrics(valid, damaged), *metrics.training(summary)]
    return checkpoint_output(context, services, made, measured, **training_log(summary))


def _examples(rows: pl.DataFrame, shown: str) -> list[tuple[list[Message], str]]:
    """What R_t is trained on: the prompt with the answer in the column `shown`, and gold."""
    texts = rows.select("prompt", shown, "answer").rows()
    return [(improver_instruction(prompt, response), answer) for prompt, response, answer in texts]


def _origin_metrics(valid: pl.DataFrame, damaged: pl.DataFrame) -> list[Metric]:
    """How many examples there are of each origin, and of each damage; nothing where all are own answers."""
    if damaged.is_empty():
        return []
    counts = damaged["damage"].value_counts(sort=True).rows()
    return [
        Metric("examples", valid.height, of="own_answers"),
        Metric("examples", damaged.height, of="damaged_gold"),
        *(Metric("examples", count, of="damaged_gold", by=damage) for damage, count in counts),
    ]


@Stage(
    RefinedResponses,
    group="responses",
    side="chosen_responses",
    work=("generates",),
    reads=("response_improver.sampling",),
    samplings=lambda settings: [settings.response_improver.sampling],
    cost=lambda sizes: [Work("generate", sizes.prompts * sizes.settings.response_improver.sampling.max_new_tokens)],
    made_from={"base_response_id": "base_responses"},
)
def refined_responses(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    base_responses: pl.DataFrame,
    response_improver: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """The policy's answers, rewritten by R_t: the chosen side (algorithm 1, line 3).

    Read the sample beside `base_responses`: a rewrite should be better for its content. `unchanged_share` counts rewrites that
    change nothing; much longer ones teach length. Where prompts have rules, `rules_followed_share` of the improver should lie
    above that of the policy, whose answers it was shown.
    """
    base = base_responses.select("prompt_id", "prompt", "response", base_response_id="response_id")
    requests, sampling = rewrite_requests(base, "base_response_id"), services.settings.response_improver.sampling
    written, usage = services.language_model.answer(response_improver, requests, sampling)
    frame = response_table(base.drop("response"), written, response_improver.sha, iteration_of(context))
    measured = [*_rewriting_metrics(synthetic_prompts, base_responses, frame), *metrics.generating(usage)]
    return table_output(context, services, frame, measured, **made_by(response_improver))


def _rewriting_metrics(prompts: pl.DataFrame, base: pl.DataFrame, rewritten: pl.DataFrame) -> Iterator[Metric]:
    """How many rewrites change nothing, and how many follow the rules of their prompt, beside the answers that they rewrote."""
    unchanged = rewritten["response"] == base["response"].str.strip_chars()
    yield Metric("unchanged_share", metrics.mean(unchanged), n=rewritten.height)
    for who, answers in {"policy": base, "improver": rewritten}.items():
        if (held := answers_that_follow(prompts, answers)).len():
            yield Metric("rules_followed_share", metrics.mean(held), of=who, n=held.len())
