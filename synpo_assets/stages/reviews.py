"""What people say of the pairs of an iteration, where `preferences.reviewed` names a file of it.

Paper: no human takes part after the seed.
Here: none either, unless that setting is stated. Its table keeps who said what and when; `preference_pairs` then drops, turns
or leaves the pairs that it would keep, and evaluation/agreement.py says how often scorer and judge are of the same opinion.
"""

from collections.abc import Mapping
from pathlib import Path

import dagster as dg
import polars as pl

from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.row_files import file_rows
from resources.storage.tables import ParquetTables
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import table_output
from synpo_assets.graph.schemas import PairVerdicts
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.pairs import join_sides
from synpo_assets.method.reviews import OUTCOMES, decided, read_verdicts

SETTING = "preferences.reviewed"
SHOWN_UNKNOWN = 3


@Stage(
    PairVerdicts,
    group="preferences",
    reads=(SETTING,),
    kinds=("polars",),
    made_from={
        "prompt_id": "synthetic_prompts",
        "chosen_response_id": "chosen_responses",
        "rejected_response_id": "rejected_responses",
    },
)
def pair_verdicts(
    context: dg.AssetExecutionContext,
    chosen_responses: pl.DataFrame,
    rejected_responses: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """What people say of this iteration's pairs, with who and when; verdicts on pairs of other iterations are left out.

    `outcome` is what becomes of the pair in `preference_pairs`: confirmed, flipped (people prefer the other answer) or dropped.
    """
    settings = services.settings
    read = decided(join_sides(chosen_responses, rejected_responses), verdicts_of(settings), settings.random_seed)
    texts = {side: pl.col(f"{side}_response") for side in ("chosen", "rejected")}
    frame = read.with_columns(iteration=pl.lit(iteration_of(context), pl.Int64), **texts)
    frame = frame.select(*PairVerdicts.to_schema().columns)
    measured = [Metric("verdicts", frame.filter(outcome=outcome).height, of=outcome) for outcome in OUTCOMES]
    return table_output(context, services, frame, measured)


def verdicts_of(settings: Settings) -> pl.DataFrame:
    """The verdicts in the file that the settings name; none if they name none.

    Raises:
        SettingsError: The file is not there, or something in it is wrong.
    """
    place = settings.preferences.reviewed
    frame, problem = read_verdicts(file_rows(Path(place), SETTING) if place else [])
    if place and problem:
        raise SettingsError(f"{place} ({SETTING}): {problem}. Correct the file.")
    return frame


def check_verdicts(settings: Settings, tables: ParquetTables, sides: Mapping[str, str]) -> str | None:
    """What the verdicts of people are about, as a sentence; None if the settings name no file.

    Args:
        sides: The assets that make the two sides, by the names that stages have for them.

    Raises:
        SettingsError: The file is wrong, or names a pair of no iteration in this home.
    """
    if settings.preferences.reviewed is None:
        return None
    verdicts, known = verdicts_of(settings), _candidate_ids(tables, sides)
    if not known:
        return f"{verdicts.height} verdicts of people; this home has no pairs yet, so none of them can apply"
    unknown = verdicts.filter(~pl.col("pair_id").is_in(list(known)))
    if unknown.height:
        named = ", ".join(
            f"{row['pair_id'][:40]} in line {row['line']}" for row in unknown.head(SHOWN_UNKNOWN).to_dicts()
        )
        raise SettingsError(
            f"{settings.preferences.reviewed} ({SETTING}) has {unknown.height} verdicts on pairs of no iteration in this home "
            f"({named}): they are of another home, or the answers were made again since. Remove these rows."
        )
    return f"{verdicts.height} verdicts of people"


def _candidate_ids(tables: ParquetTables, sides: Mapping[str, str]) -> set[str]:
    """The ids of all pairs that answers of this home make, whether a filter keeps them or not."""
    found = set[str]()
    chosen, rejected = sides["chosen_responses"], sides.get("rejected_responses", "rejected_responses")
    for key in set(tables.partitions(chosen)).intersection(tables.partitions(rejected)):
        found |= set(join_sides(tables.read(chosen, key), tables.read(rejected, key))["pair_id"])
    return found
