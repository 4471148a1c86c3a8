"""The candidates of a search as texts, from the manifest of the M_t that was chosen among them."""

import json
from collections.abc import Mapping
from typing import Any

from resources.settings.search import tried_text
from resources.settings.sections import flattened
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.texts import MISSING, gain_text, number_text, rate_text, share_text

HEAD = (
    "settings",
    "on dev, 95 % interval",
    "prompts, or templates of instructions",
    "loss",
    "reward accuracy",
    "minutes",
    "",
)


def recorded_search(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the manifest of M_t says of the search; None if there was none."""
    return manifest.get("settings", {}).get("search")


def candidate_rows(search: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each candidate, in the order in which they were tried."""
    return [
        (
            tried_text(json.loads(each["settings"])),
            value_text(each),
            MISSING if each["n"] is None else str(each["n"]),
            number_text(each["loss"]),
            share_text(each["reward_accuracy"]),
            MISSING if each["minutes"] is None else f"{each['minutes']:.1f}",
            "chosen" if each["chosen"] else f"left out: {each['left_out']}" if each["left_out"] else "",
        )
        for each in search["candidates"]
    ]


def chosen_text(manifest: Mapping[str, Any]) -> str:
    """The values that were chosen."""
    search = recorded_search(manifest)
    return MISSING if search is None else tried_text(json.loads(_chosen(search)["settings"]))


def chosen_value_text(manifest: Mapping[str, Any]) -> str:
    """What they reached on dev."""
    search = recorded_search(manifest)
    return MISSING if search is None else value_text(_chosen(search))


def metric_name(search: Mapping[str, Any]) -> str:
    """What the candidates were compared by, as people read it."""
    return {
        "win_rate": "win rate over M_0 by the independent judge",
        "length_controlled_win_rate": "length-controlled win rate over M_0 by the independent judge",
        "verifiable_gain": "verifiable instructions followed, less M_0's",
    }[_chosen(search)["metric"]]


def chosen_values(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The settings by dotted name that a search chose, in place of those of the settings file."""
    if recorded_search(manifest) is None:
        return {}
    options = manifest["settings"]["preference_optimization"]
    values = flattened({name: options[name] for name in ("loss", "training")}, "preference_optimization.")
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values}


def value_text(row: Mapping[str, Any]) -> str:
    """The value of a candidate with its interval."""
    measured = Metric(row["metric"], row["value"], low=row["low"], high=row["high"])
    return gain_text(measured) if row["metric"] == "verifiable_gain" else rate_text(measured)


def _chosen(search: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(each for each in search["candidates"] if each["chosen"])
