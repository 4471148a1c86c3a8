"""How many instructions with checkable constraints M_t follows: a measure that asks no model.

Paper (section 3): GPT-4 as judge, and benchmarks with one right answer; no measure that asks no model.
Here: as in IFEval (https://arxiv.org/abs/2311.07911), with rules and prompts of our own, M_t compared with M_0.
"""

from collections.abc import Iterator, Mapping

import dagster as dg
import polars as pl

from resources.generation.language_model import Usage
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.evaluation.gold_comparison import gain_metric
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.evaluation_schemas import InstructionFollowing
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.rules import followed
from synpo_assets.method.templates import user_message
from synpo_assets.method.verifiable import nulls_followed, rates_by_rule, shares_followed

ANSWERING_READS = ("evaluation.sampling", "evaluation.instruction_samples")


def instruction_tokens(sizes: Sizes) -> float:
    """Tokens that one model writes at most when it answers the instructions."""
    return sizes.settings.evaluation.instruction_samples * sizes.instructions * sizes.judged


@Stage(
    InstructionFollowing,
    group="evaluation",
    work=("generates",),
    reads=ANSWERING_READS,
    samplings=lambda settings: [settings.evaluation.sampling],
    # M_0's answers are found in the shards from the second iteration on.
    cost=lambda sizes: [Work("generate", 2 * instruction_tokens(sizes))],
    made_from={"prompt_id": "verifiable_instructions"},
)
def instruction_following(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    initial_policy: Checkpoint,
    verifiable_instructions: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """Which of the verifiable instructions M_t follows, compared with M_0.

    No judge has a say. `verifiable_gain` is M_t's share less M_0's; with an interval that holds 0, nothing is shown. A share below
    that of the strongest null, such as the prompts themselves given as answers, shows no skill either. The interval is over the
    templates of the instructions, where their rows state some.
    """
    models = {"candidate": model_checkpoint, "initial": initial_policy}
    frame, usages = instruction_answers(services, models, verifiable_instructions)
    shas = {f"{name}_checkpoint_sha": pl.lit(model.sha) for name, model in models.items()}
    frame = frame.with_columns(**shas, iteration=pl.lit(iteration_of(context), pl.Int64))
    measured = [
        Metric("samples_each", services.settings.evaluation.instruction_samples),
        *metrics.by_split(frame, lambda rows: following_metrics(rows, model_checkpoint.sha)),
        *metrics.generating(*usages),
    ]
    by_rule = table_metadata(rates_by_rule(frame.filter(split="test")))
    columns = InstructionFollowing.to_schema().columns
    return table_output(
        context, services, frame.select(*columns), measured, by_rule=by_rule, **made_by(model_checkpoint)
    )


def instruction_answers(
    services: Services, models: Mapping[str, Checkpoint], instructions: pl.DataFrame
) -> tuple[pl.DataFrame, list[Usage]]:
    """The instructions as often as each is asked, with the answer of each model and which constraints it meets."""
    options, usages = services.settings.evaluation, list[Usage]()
    if "template" not in instructions.columns:
        # Made by an earlier version.
        instructions = instructions.with_columns(template="prompt_id")
    samples = pl.DataFrame({"sample": range(1, options.instruction_samples + 1)}, schema={"sample": pl.Int64})
    frame = instructions.join(samples, how="cross")
    requests = [
        (f"{prompt_id} sample {sample}", user_message(prompt))
        for prompt_id, prompt, sample in frame.select("prompt_id", "prompt", "sample").rows()
    ]
    for name, model in models.items():
        written, usage = services.language_model.answer(model, requests, options.sampling)
        met = [followed(each, text) for each, text in zip(frame["constraints"].to_list(), written["text"], strict=True)]
        frame = frame.with_columns(
            written["text"].alias(f"{name}_response"), pl.Series(f"{name}_met", met, dtype=pl.List(pl.Boolean))
        )
        usages.append(usage)
    return frame, usages


def following_metrics(frame: pl.DataFrame, sha: str) -> list[Metric]:
    """The shares of instructions followed and of constraints met, by rule too, and M_t's gain over M_0.

    Beside them stand the nulls: how many instructions are followed by answers that show no skill, and M_t's gain over each.
    """
    shares, sides = shares_followed(frame), ("candidate", "initial")
    by_null = pl.DataFrame({"prompt_id": frame["prompt_id"], **nulls_followed(frame)})
    by_null = by_null.group_by("prompt_id", maintain_order=True).mean().drop("prompt_id")
    others = {"initial": shares["initial"], **by_null.to_dict()}
    return [
        Metric("instructions", shares.height),
        *(Metric("verifiable_rate", metrics.mean(shares[side]), of=side, n=shares.height) for side in sides),
        *(
            Metric("verifiable_rate", metrics.mean(held), of=null, n=shares.height)
            for null, held in by_null.to_dict().items()
        ),
        *(Metric("constraint_rate", metrics.mean(frame[f"{side}_met"].explode()), of=side) for side in sides),
        *(
            gain_metric("verifiable_gain", shares["candidate"] - other, over, sha, groups=shares["template"])
            for over, other in others.items()
        ),
        *_rule_metrics(frame, sha),
    ]


def _rule_metrics(frame: pl.DataFrame, sha: str) -> Iterator[Metric]:
    """The share of the constraints of each rule that are met, and M_t's gain over M_0."""
    for rule, answered, candidate, initial in rates_by_rule(frame).iter_rows():
        for side, rate in (("candidate", candidate), ("initial", initial)):
            yield Metric(
                "rule_rate", rate, of=side, by=rule, n=answered, checkpoint_sha=sha if side == "candidate" else None
            )
        gain = {"of": "candidate", "over": "initial", "by": rule, "n": answered, "checkpoint_sha": sha}
        yield Metric("rule_rate_gain", candidate - initial, **gain)
