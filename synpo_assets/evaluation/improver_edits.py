"""What the response improver makes of damaged answers: right, nearer to gold, left as they are, or worse.

Paper: none. R_t is trained on own answers alone, and measured by what M_t wins.
Here: where `response_improver.damaged_copies` is more than 0 (stages/improver.py). The gold answers of dev and test, which no
training reads, get each damage that applies to them under the random seed of the experiment; R_t rewrites each of them once, as it
rewrites the policy's answers. M_0 is asked the same with R_t's template: what it makes right needs no training. Where R_t starts
from M_{t-1} (`response_improver.init_from`), its gain over M_0 also holds what preference optimization taught. The kinds of damage
are those that R_t may have been trained on, so this says how well it learned these kinds on other prompts, not whether it
finds mistakes of another kind. How a rewrite counts is in method/edits.py.
"""

import dagster as dg
import polars as pl

from resources.generation.language_model import Usage
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.evaluation_schemas import EDIT_SHARES, ImproverEdits
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.cut import whole_answers
from synpo_assets.method.damage import DAMAGES
from synpo_assets.method.edits import damaged_copies, edit_outcome, edit_shares
from synpo_assets.method.seed import IS_HELD_OUT
from synpo_assets.method.templates import improver_instruction


def _cost(sizes: Sizes) -> list[Work]:
    """All damages may apply; M_0's rewrites are found in the shards from the second iteration on."""
    longest = sizes.settings.response_improver.sampling.max_new_tokens
    return [Work("generate", 2 * sizes.held_out * len(DAMAGES) * longest)]


@Stage(
    ImproverEdits,
    group="evaluation",
    work=("generates",),
    reads=("response_improver.sampling",),
    samplings=lambda settings: [settings.response_improver.sampling],
    cost=_cost,
    made_from={"prompt_id": "seed_pairs"},
)
def improver_edits(
    context: dg.AssetExecutionContext,
    response_improver: Checkpoint,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """Damaged held-out gold answers as R_t rewrites them, compared with M_0's rewrites and with gold.

    Good: `edits_right` and `edits_nearer` above M_0's, and `edits_worse` below. Many left as they were mean that it does not
    look.
    """
    held_out = seed_pairs.filter(IS_HELD_OUT).select("prompt_id", "split", "prompt", "answer")
    damaged = damaged_copies(held_out, len(DAMAGES), services.settings.random_seed)
    edited, usage = _edited(services, response_improver, damaged, "improver")
    edited_untrained, usage_untrained = _edited(services, initial_policy, damaged, "initial")
    frame = damaged.with_columns(*edited, *edited_untrained, iteration=pl.lit(iteration_of(context), pl.Int64))
    frame = frame.select(*ImproverEdits.to_schema().columns)
    measured = [
        *metrics.by_split(frame, lambda rows: edit_metrics(rows, response_improver.sha)),
        *metrics.generating(usage, usage_untrained),
    ]
    shares = table_metadata(edit_shares(frame.filter(split="test")))
    return table_output(context, services, frame, measured, shares=shares, **made_by(response_improver))


def _edited(
    services: Services, editor: Checkpoint, damaged: pl.DataFrame, name: str
) -> tuple[list[pl.Series | pl.Expr], Usage]:
    """A model's rewrites of damaged answers, what became of each, and its sha, as columns; and the cost."""
    rows = damaged.select("prompt_id", "damage", "prompt", "damaged").rows()
    asked = [(f"{row_id} {damage}", improver_instruction(prompt, text)) for row_id, damage, prompt, text in rows]
    written, usage = services.language_model.answer(editor, asked, services.settings.response_improver.sampling)
    rewrites = whole_answers(written)
    made = [edit_outcome(*texts) for texts in zip(damaged["answer"], damaged["damaged"], rewrites, strict=True)]
    return [
        rewrites.alias(f"{name}_response"),
        pl.Series(f"{name}_outcome", made, dtype=pl.String),
        pl.lit(editor.sha).alias(f"{name}_checkpoint_sha"),
    ], usage


def edit_metrics(edits: pl.DataFrame, sha: str) -> list[Metric]:
    """The shares of each outcome, of R_t and of M_0, and R_t's less M_0's: of all damages together, and by damage."""
    measured = list[Metric]()
    for row in edit_shares(edits).iter_rows(named=True):
        share, gain = EDIT_SHARES[row["outcome"]]
        about = {"by": row["damage"], "n": row["prompts"]}
        ours = {"of": "improver", "checkpoint_sha": sha, **about}
        measured += [
            Metric(share, row["improver"], **metrics.ends(row, "improver"), **ours),
            Metric(share, row["initial"], of="initial", **metrics.ends(row, "initial"), **about),
            Metric(gain, row["gain"], over="initial", **metrics.ends(row, "gain"), **ours),
        ]
    return measured
