"""The closing summary of a run on the terminal, read back from what the assets recorded."""

import operator

from dagster import DagsterInstance
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from resources.common.text import asset_label, visible
from resources.judging.judge_choice import INDEPENDENT
from resources.storage.tables import ParquetTables
from synpo_assets.graph.boosting import FORMS, NULL_LABELS
from synpo_assets.graph.history import seconds_of
from synpo_assets.graph.metrics import MetricName, Metrics, judge_doubt, recorded
from synpo_assets.graph.missing import asset_names
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.services import Services
from synpo_assets.graph.texts import gain_text, number_text, rate_text, share_text
from synpo_assets.method.pairs import middle_pair
from synpo_assets.reports import FOLDER, REPORT
from synpo_assets.stages.loop import promotion_refusal, promotion_verdict

# The win rates of each judge: whose over whom, and what is made equal. The last two show what form alone wins.
COMPARED: tuple[tuple[str, MetricName, str, str], ...] = (
    ("over M_0", "win_rate", "candidate", "initial"),
    ("  both answers ended", "win_rate_both_ended", "candidate", "initial"),
    ("  length-controlled", "length_controlled_win_rate", "candidate", "initial"),
    ("over M_t-1", "win_rate", "candidate", "previous"),
    *((f"M_0 {form} over M_0", "win_rate", form, "initial") for form in FORMS),
)


def print_summary(instance: DagsterInstance, services: Services, iterations: int) -> None:
    """Prints what was made, one pair, held-out win rates, what was promoted, where all is kept, and how to open the UI."""
    console, home = Console(), services.home
    root = services.settings.storage.root(home)
    console.print(_made(instance, services, iterations))
    console.print(_sample_pair(services.tables, iterations))
    console.print(_held_out(services, iterations))
    for partition in (partition_key(number) for number in range(1, iterations + 1)):
        sentence = promotion_refusal(services, partition) or promotion_verdict(services, partition)
        console.print(sentence, highlight=False, markup=False)
    places = {
        # Not where it was made: the home may have been moved since.
        f"M_{iterations}": services.checkpoints.current("model_checkpoint", partition_key(iterations)).weights,
        "preference pairs": f"{root}/tables/preference_pairs/{partition_key(iterations)}.parquet",
        "report": home / FOLDER / REPORT,
        "everything": home if root == str(home) else f"{home} and {root}",
        "Dagster UI": f"synpo ui --home {home}",
    }
    for name, place in places.items():
        console.print(f"{name:<18}{place}", soft_wrap=True, highlight=False, markup=False)


def _made(instance: DagsterInstance, services: Services, iterations: int) -> Table:
    table = Table("asset", title="What was made", title_justify="left")
    for column in ("rows", "tokens", "seconds", "peak GB"):
        table.add_column(column, justify="right")
    for partition in (None, *(partition_key(number) for number in range(1, iterations + 1))):
        measured = recorded(services.metrics, partition)
        for name in asset_names(services.graph, partitioned=partition is not None):
            rows = _first(measured, name, "rows", "examples")
            tokens = _first(measured, name, "trained_tokens", "generated_tokens", "embedded_tokens")
            seconds = f"{seconds_of(instance, name, partition):.0f}"
            memory = measured.value("peak_memory_gb", asset=name)
            gigabytes = "" if memory is None else f"{memory:.2f}"
            table.add_row(asset_label(name, partition), rows, tokens, seconds, gigabytes)
        table.add_section()
    return table


def _first(measured: Metrics, asset: str, *names: MetricName) -> str:
    """The first of some metrics that an asset recorded, as text."""
    values = (measured.value(name, asset=asset) for name in names)
    return next((f"{value:.0f}" for value in values if value is not None), "")


def _sample_pair(tables: ParquetTables, iterations: int) -> Panel:
    pair = middle_pair(tables.read("preference_pairs", partition_key(iterations)))
    text = Text()
    if pair["rules"]:
        text.append(f"rules {visible(pair['rules'])}\n", style="dim")
    for side, score in (("prompt", None), ("chosen", "chosen_score"), ("rejected", "rejected_score")):
        title = side if score is None else f"{side} (score {pair[score]:.2f})"
        text.append(f"{title}\n", style="bold")
        text.append(f"{visible(pair[side][-1]['content'])}\n")
    return Panel(text, title=f"The pair with the median margin: {pair['pair_id']}", title_align="left")


def _held_out(services: Services, iterations: int) -> Table:
    table = Table("", "judge", title="Test prompts: win rates of M_t, 95 % interval", title_justify="left")
    table.add_column("compared", no_wrap=True)
    for column in ("win rate", "prompts"):
        table.add_column(column, justify="right", no_wrap=True)
    rewards, followings, sentence = [], [], judge_doubt(services.metrics)
    for number in range(1, iterations + 1):
        measured = recorded(services.metrics, partition_key(number))
        measured = measured.without_rates_by(INDEPENDENT) if sentence else measured
        for judge in dict.fromkeys(rate.by for rate in measured.every("win_rate")):
            whose = (f"M_{number}", judge)
            for what, metric, model, opponent in COMPARED:
                rate = measured.find(metric, model, over=opponent, by=judge)
                prompts = "" if rate is None else f"{rate.n}"
                table.add_row(*whose, what, rate_text(rate), prompts)
                whose = ("", "")
        table.add_section()
        means = (number_text(measured.value("held_out_reward", side)) for side in ("initial", "candidate"))
        rewards.append(f"{' → '.join(means)} (M_{number}, {measured.value('held_out_prompts'):.0f} prompts)")
        gain = measured.find("verifiable_gain", "candidate", over="initial")
        if gain is not None and gain.value is not None:
            shares = (share_text(measured.value("verifiable_rate", side)) for side in ("initial", "candidate"))
            nulls = {what: measured.value("verifiable_rate", null) or 0.0 for null, what in NULL_LABELS.items()}
            what, strongest = max(nulls.items(), key=operator.itemgetter(1))
            followings.append(
                f"{' → '.join(shares)}, {gain_text(gain)} (M_{number}, {measured.value('instructions'):.0f} instructions; "
                f"{share_text(strongest)} by {what})"
            )
    table.caption_justify = "left"
    table.caption = f"Mean reward by the scorer, M_0 → M_t: {', '.join(rewards)}."
    if followings:
        table.caption += f"\nVerifiable instructions followed, M_0 → M_t: {', '.join(followings)}."
    if sentence:
        table.caption += f"\n{sentence}"
    return table
