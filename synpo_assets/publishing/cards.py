"""The cards of published pairs and models: what they are, how they were made, and what is known of their quality."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from resources.common.text import duration
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.rows import DIFFERING, Row, report_rows
from synpo_assets.reports.search import HEAD, candidate_rows, metric_name, recorded_search

FOLDER = Path(__file__).parent
TAGS = ("synpo", "preference-optimization", "synthetic")
# Seconds and memory say more about a machine than about what it made.
LEFT_OUT_SECTIONS = ("Work",)
# The sections of settings that say how pairs and models were made; others may name machines.
DATA_SETTINGS = ("prompt_generator", "responses", "response_improver", "scorer", "preferences")
TOLD_SETTINGS = (*DATA_SETTINGS, "keyword_pool", "preference_optimization", "evaluation")
SIZES = ("K", "M", "B", "T")


@dataclasses.dataclass(frozen=True)
class CardData:
    """What the cards of pairs and models both say.

    The licence is named as the hub does, the language by its ISO 639-1 code. The sample is one pair as JSON, harmless to
    show. The verdicts are those of people on these pairs: how many they confirmed and flipped.
    """

    repository: str | None
    license_name: str | None
    language: str | None
    base_model: str
    base_model_id: str | None
    base_model_name: str
    iterations: Sequence[FinishedIteration]
    scorer: str
    sample: str
    verdicts: Mapping[str, int]

    @property
    def cost(self) -> str | None:
        """What each iteration cost, as a sentence; None if the settings do not say what an hour costs."""
        costs = [
            f"iteration {each.number} {each.cost} ({duration(each.seconds)})" for each in self.iterations if each.cost
        ]
        return f"What the machine cost: {', '.join(costs)}." if costs else None

    @property
    def reviewed(self) -> str | None:
        """What people did with the pairs, as a sentence; None if they read none of them."""
        if not any(self.verdicts.values()):
            return None
        said = " and ".join(f"{outcome} {count}" for outcome, count in self.verdicts.items())
        return f"People read {sum(self.verdicts.values())} of the pairs: they {said}."

    @property
    def metrics(self) -> str:
        """The metrics by iteration as a Markdown table, and the settings that differ between them."""
        return metrics_table(self._rows, [iteration.key for iteration in self.iterations])

    @property
    def settings_differ(self) -> bool:
        """Whether iterations were made with other settings than others."""
        return any(row.section == DIFFERING for row in filter(_is_told, self._rows))

    @functools.cached_property
    def _rows(self) -> list[Row]:
        return report_rows(self.iterations)


def dataset_card(
    data: CardData,
    *,
    pairs: pl.DataFrame,
    columns: Mapping[str, str],
    writers: Sequence[Mapping[str, str]],
    ranked_samples: int | None,
    rewrites: int,
    own_answers: bool,
    settings: Mapping[str, Any],
) -> str:
    """The card of the preference pairs, as the hub and `datasets` read it.

    `writers` has a row for each iteration and role, with `checkpoint` and `sha`. `ranked_samples` is how many answers to a
    prompt were ranked to find both sides; None if an improver wrote `chosen`, one of so many `rewrites`, or the policy where
    `own_answers` are better.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    card_data = DatasetCardData(
        language=data.language,
        license=data.license_name,
        annotations_creators=["machine-generated", "expert-generated"] if data.reviewed else "machine-generated",
        language_creators="machine-generated",
        size_categories=size_category(pairs.height),
        source_datasets=["original"],
        task_categories=["text-generation"],
        pretty_name="SynPO preference pairs",
        tags=[*TAGS, "trl", "dpo"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    conventions = pairs["score_convention"].unique().sort()
    card = DatasetCard.from_template(
        card_data,
        template_path=str(FOLDER / "dataset_card.md.jinja"),
        data=data,
        pairs=pairs.height,
        iterations=len(data.iterations),
        columns=_table(["column", "meaning"], columns.items()),
        writers=_table(["iteration", "role", "checkpoint", "sha"], (row.values() for row in writers)),
        score_conventions=", ".join(f"`{name}`" for name in conventions),
        with_rules=int((pairs["rules"] != "").sum()),
        ranked_samples=ranked_samples,
        rewrites=rewrites,
        own_answers=own_answers,
        settings=_yaml(settings),
        libraries=_libraries(data.iterations[-1].manifest.get("libraries", {})),
    )
    return str(card)


def model_card(
    data: CardData, *, dataset_repository: str | None, label: str, manifest: Mapping[str, Any], adapter: bool
) -> str:
    """The card of M_t, as the hub and transformers read it."""
    from huggingface_hub import ModelCard, ModelCardData

    card_data = ModelCardData(
        base_model=data.base_model_id,
        datasets=dataset_repository,
        language=data.language,
        license=data.license_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, "trl"],
    )
    search = recorded_search(manifest)
    parents = [[role, parent["asset"], parent["sha"]] for role, parent in manifest["parents"].items()]
    card = ModelCard.from_template(
        card_data,
        template_path=str(FOLDER / "model_card.md.jinja"),
        data=data,
        label=label,
        manifest=manifest,
        iteration=int(data.iterations[-1].key),
        parents=_table(["role", "checkpoint", "sha"], parents),
        trained_on=_table(["pairs", "content version"], manifest["trained_on"].items()),
        adapter=adapter,
        search=search,
        candidates=_table(HEAD, candidate_rows(search)) if search else "",
        searched_by=metric_name(search) if search else "",
        settings=_yaml({name: value for name, value in manifest["settings"].items() if name != "search"}),
        libraries=_libraries(manifest["libraries"]),
    )
    return str(card)


def metrics_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """The metrics by iteration as a Markdown table, a blank line of its own before each section's name.

    Examples:
        >>> print(metrics_table([Row("Pairs", "pairs kept", ("28", "30"))], ["0001", "0002"]))
        | | M_1 | M_2 |
        | --- | --- | --- |
        | **Pairs** | | |
        | pairs kept | 28 | 30 |
    """
    lines = [f"| | {' | '.join(f'M_{int(key)}' for key in keys)} |", f"|{' --- |' * (1 + len(keys))}"]
    section = None
    for row in filter(_is_told, rows):
        if row.section != section:
            section = row.section
            lines.append(f"| **{section}** |{' |' * len(keys)}")
        lines.append(_line([row.label, *map(without_folder, row.cells)]))
    return "\n".join(lines)


def without_folder(place: str) -> str:
    """The name alone of a file or directory of this machine, whose path is nobody's business; settings have made it absolute."""
    return Path(place).name if Path(place).is_absolute() else place


def _is_told(row: Row) -> bool:
    if row.section == DIFFERING:
        return row.label.split(".")[0] in TOLD_SETTINGS
    return row.section not in LEFT_OUT_SECTIONS


def size_category(rows: int) -> str:
    """How large the hub calls a dataset.

    Examples:
        >>> [size_category(rows) for rows in (28, 1000, 40_000, 2_000_000)]
        ['n<1K', '1K<n<10K', '10K<n<100K', '1M<n<10M']
    """
    if rows < 1000:
        return "n<1K"
    digits = len(str(rows)) - 1
    low, high = (f"{10 ** (power % 3)}{SIZES[power // 3 - 1]}" for power in (digits, digits + 1))
    return f"{low}<n<{high}"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [_line(head), f"|{' --- |' * len(head)}", *(_line(list(row)) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).rstrip("\n")


def _libraries(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
