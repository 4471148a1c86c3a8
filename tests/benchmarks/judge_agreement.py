"""How often a judge agrees with people about which of two answers is better, beside judges that cannot read.

    python -m tests.benchmarks.judge_agreement pandalm_testset-v1.json MODEL --kind pretrained

The file is PandaLM's test set (github.com/WeOpenML/PandaLM, data/testset-v1.json): 999 pairs of answers, each with the verdicts
of three people. MODEL is an id or the directory of a reward model (kind `pretrained`; of a judge that was trained here, the
folder `merged` of its checkpoint) or of a pair ranker (kind `pair_ranker`, which reads each pair in both orders).

Counted are the pairs where two people or more prefer the same answer; the rest, ties of the majority included, are left out. A tie
of the judge counts half. Intervals are 95 % score intervals over pairs.
"""

import argparse
import json
import tempfile
from pathlib import Path

import polars as pl

from resources.scoring.published import fetch_reward_model
from resources.scoring.scorer import RewardScorer
from resources.settings.machine import Engine
from resources.settings.method import PairRankerScorer, PretrainedScorer
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.method.outcomes import outcomes, win_rate, win_rate_interval

KINDS = {"pretrained": PretrainedScorer, "pair_ranker": PairRankerScorer}
PEOPLE = ("annotator1", "annotator2", "annotator3")
# People say 1 or 2 for the better answer and 0 for a tie.
SIGNS = {1: 1, 2: -1}


def decided_pairs(file: Path) -> tuple[pl.DataFrame, int]:
    """The pairs about which most people agree: prompt, both answers, and 1 or -1 for the better one; and how many there were."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    pairs = []
    for row in rows:
        verdicts = [row[person] for person in PEOPLE]
        sign = next((sign for verdict, sign in SIGNS.items() if verdicts.count(verdict) >= 2), None)
        if sign is not None:
            prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
            pairs.append((prompt, row["response1"], row["response2"], sign))
    columns = {"prompt": pl.String, "first": pl.String, "second": pl.String, "people": pl.Int64}
    return pl.DataFrame(pairs, schema=columns, orient="row"), len(rows)


def agreements(pairs: pl.DataFrame, margins: pl.Series) -> pl.DataFrame:
    """How often a judge and its nulls say what most people say: over all pairs, and over those of like length."""
    first, second = (pairs[side].str.len_chars().cast(pl.Int64) for side in ("first", "second"))
    alike = (5 * first >= 4 * second) & (5 * second >= 4 * first)
    judges = {
        "judge": margins, "longer wins": first - second, "always first": pl.Series([1] * pairs.height, dtype=pl.Int64),
    }  # fmt: skip
    rows = []
    for which, chosen in (("all", pl.Series([True] * pairs.height, dtype=pl.Boolean)), ("like length", alike)):
        for judge, found in judges.items():
            judged = outcomes((found * pairs["people"]).filter(chosen))
            low, high = win_rate_interval(judged) or (None, None)
            rows.append(
                {"pairs": which, "by": judge, "n": len(judged), "agreement": win_rate(judged), "low": low, "high": high}
            )
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(("agreement", "low", "high"), pl.Float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("model")
    parser.add_argument("--kind", choices=KINDS, default="pretrained")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="a .csv file for the numbers")
    arguments = parser.parse_args()
    pairs, asked = decided_pairs(arguments.file)
    section = KINDS[arguments.kind](name=arguments.model, max_length=arguments.max_length)
    directory, _ = fetch_reward_model(section, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as shards:
        scorer = RewardScorer(shards=shards, engine=Engine.model_validate({}), scorer=section)
        model = Checkpoint("judge_model", None, directory.name, str(directory), str(directory))
        compared = scorer.compare(model, pairs.select("prompt", "first", "second").rows(), judging=True)
    found = agreements(pairs, compared.margins)
    unread = compared.usage.answers_cut
    print(f"{pairs.height} of {asked} pairs have a majority; {unread} answers were read in part.")  # noqa: T201
    with pl.Config(tbl_rows=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True):
        print(found.with_columns(pl.col("agreement", "low", "high").round(3)))  # noqa: T201
    if arguments.output:
        found.write_csv(arguments.output, float_precision=4)


if __name__ == "__main__":
    main()
