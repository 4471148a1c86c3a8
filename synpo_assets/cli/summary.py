"""The closing summary of a run on the terminal, read back from what the assets recorded."""

from pathlib import Path
from typing import Any

from dagster import DagsterInstance
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from resources.common.text import asset_label, visible
from resources.settings.files import active_settings
from resources.storage.tables import ParquetTables
from synpo_assets.cli.runs import asset_graph
from synpo_assets.graph.history import metadata_of, seconds_of
from synpo_assets.graph.missing import asset_names
from synpo_assets.graph.partitions import partition_key
from synpo_assets.reports.rows import gain_text, rate_text
from synpo_assets.stages.loop import promotion_refusal


def print_summary(instance: DagsterInstance, home: Path, iterations: int) -> None:
    """Prints what was made, one pair, held-out win rates, what was promoted, where all lies, and how to open the UI.

    Raises:
        resources.storage.checkpoint_store.CheckpointError: Files of the newest M_t are missing.
    """
    from definitions import defs

    console = Console()
    resources: Any = defs.resources
    root = active_settings().storage.root(home)
    console.print(_made(instance, iterations))
    console.print(_sample_pair(resources["tables"], iterations))
    console.print(_held_out(instance, iterations))
    for partition in (partition_key(number) for number in range(1, iterations + 1)):
        verdict = promotion_refusal(instance, partition) or metadata_of(instance, "promotion", partition)["verdict"]
        console.print(verdict, highlight=False, markup=False)
    places = {
        # Not where it was made: the home may have been moved since.
        f"M_{iterations}": resources["checkpoints"].current("model_checkpoint", partition_key(iterations)).weights,
        "preference pairs": f"{root}/tables/preference_pairs/{partition_key(iterations)}.parquet",
        "report": home / "reports" / "boosting_report.html",
        "everything": home if root == str(home) else f"{home} and {root}",
        "Dagster UI": f"synpo ui --home {home}",
    }
    for name, place in places.items():
        console.print(f"{name:<18}{place}", soft_wrap=True, highlight=False, markup=False)


def _made(instance: DagsterInstance, iterations: int) -> Table:
    table = Table("asset", title="What was made", title_justify="left")
    for column in ("rows", "tokens", "seconds", "peak GB"):
        table.add_column(column, justify="right")
    for partition in (None, *(partition_key(number) for number in range(1, iterations + 1))):
        for name in asset_names(asset_graph(), partitioned=partition is not None):
            about = metadata_of(instance, name, partition)
            rows = about.get("dagster/row_count", about.get("examples", ""))
            tokens = about.get("generated_tokens", about.get("tokens", ""))
            seconds = f"{seconds_of(instance, name, partition):.0f}"
            memory = f"{about['peak_memory_gb']:.2f}" if "peak_memory_gb" in about else ""
            table.add_row(asset_label(name, partition), str(rows), str(tokens), seconds, memory)
        table.add_section()
    return table


def _sample_pair(tables: ParquetTables, iterations: int) -> Panel:
    pairs = tables.read("preference_pairs", partition_key(iterations)).sort("margin")
    pair = pairs.row(pairs.height // 2, named=True)
    text = Text()
    for side, score in (("prompt", None), ("chosen", "chosen_score"), ("rejected", "rejected_score")):
        title = side if score is None else f"{side} (score {pair[score]:.2f})"
        text.append(f"{title}\n", style="bold")
        text.append(f"{visible(pair[side][-1]['content'])}\n")
    return Panel(text, title=f"The pair with the median margin: {pair['pair_id']}", title_align="left")


def _held_out(instance: DagsterInstance, iterations: int) -> Table:
    table = Table("", "judge", title="Held-out prompts: win rates of M_t, 95 % interval (LC: length-controlled)")
    table.title_justify = "left"
    for column in ("over M_0", "LC", "over M_t-1"):
        table.add_column(column, justify="right", no_wrap=True)
    rewards, followings = [], []
    for number in range(1, iterations + 1):
        about = metadata_of(instance, "evaluation", partition_key(number))
        # What an earlier version of the asset recorded has no such table.
        rates = [record.data for record in about["win_rates"].records] if "win_rates" in about else []
        over = {(rate["label"], rate["opponent"]): rate for rate in rates}
        for label in dict.fromkeys(rate["label"] for rate in rates):
            initial, previous = (over[label, opponent] for opponent in ("initial", "previous"))
            controlled = rate_text(initial | {"win_rate": initial["length_controlled"], "low": None})
            table.add_row(f"M_{number}", label, rate_text(initial), controlled, rate_text(previous))
        table.add_section()
        means = (f"{about[f'held_out_reward {name}']:.3f}" for name in ("initial", "policy"))
        rewards.append(f"{' → '.join(means)} (M_{number}, {about['held_out_prompts']} prompts)")
        following = metadata_of(instance, "instruction_following", partition_key(number))
        if following.get("verifiable_gain") is not None:
            shares = (f"{following[f'verifiable_rate {name}']:.1%}" for name in ("initial", "policy"))
            gain = gain_text(*(following[f"verifiable_gain{end}"] for end in ("", "_low", "_high")))
            followings.append(f"{' → '.join(shares)}, {gain} (M_{number}, {following['instructions']} instructions)")
    table.caption_justify = "left"
    table.caption = f"Mean reward by the scorer, M_0 → M_t: {', '.join(rewards)}."
    if followings:
        table.caption += f"\nVerifiable instructions followed, M_0 → M_t: {', '.join(followings)}."
    return table
