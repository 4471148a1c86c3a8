"""The cards of published pairs and models: what they are, how they were made, and what is known of their quality."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from synpo_assets.reports.rows import Row

FOLDER = Path(__file__).parent
TAGS = ("synpo", "preference-optimization", "synthetic")
# Seconds and memory say more about a machine than about what it made.
LEFT_OUT_SECTIONS = ("Work",)
SIZES = ("K", "M", "B", "T")


def dataset_card(
    *,
    repository: str | None,
    license_name: str | None,
    language: str | None,
    base_model: str,
    keys: Sequence[str],
    rows: Sequence[Row],
    pairs: int,
    columns: Mapping[str, str],
    writers: Sequence[Mapping[str, str]],
    scorer: str,
    score_conventions: Sequence[str],
    ranked_samples: int | None,
    settings: Mapping[str, Any],
    libraries: Mapping[str, str],
    sample: str,
) -> str:
    """The card of the preference pairs, as the hub and `datasets` read it.

    Args:
        repository: Hub id, or None.
        license_name: Licence as the hub names it, or None.
        language: ISO 639-1 code of the prompts, or None if it is open.
        base_model: M_0 in words.
        keys: The iterations, `0001` and so on.
        rows: Figures by iteration.
        pairs: Number of pairs.
        columns: Description by column.
        writers: Of each iteration and role, the checkpoint: keys `iteration`, `role`, `checkpoint` and `sha`.
        scorer: The scorer in words.
        score_conventions: What a margin is, as the pairs state it.
        ranked_samples: How many answers to a prompt were ranked to find both sides; None if an improver wrote `chosen`.
        settings: The settings that decide what the pairs are.
        libraries: Version by library.
        sample: One pair as JSON, harmless to show.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCardData(
        language=language,
        license=license_name,
        annotations_creators="machine-generated",
        language_creators="machine-generated",
        size_categories=size_category(pairs),
        source_datasets=["original"],
        task_categories=["text-generation"],
        pretty_name="SynPO preference pairs",
        tags=[*TAGS, "trl", "dpo"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    card = DatasetCard.from_template(
        data,
        template_path=str(FOLDER / "dataset_card.md.jinja"),
        repository=repository,
        base_model=base_model,
        pairs=pairs,
        iterations=len(keys),
        figures=figures_table(rows, keys),
        columns=_table(["column", "meaning"], columns.items()),
        writers=_table(["iteration", "role", "checkpoint", "sha"], (row.values() for row in writers)),
        scorer=scorer,
        score_conventions=", ".join(f"`{name}`" for name in score_conventions),
        ranked_samples=ranked_samples,
        settings=_yaml(settings),
        libraries=_libraries(libraries),
        sample=sample,
    )
    return str(card)


def model_card(
    *,
    repository: str | None,
    dataset_repository: str | None,
    license_name: str | None,
    language: str | None,
    base_model: str,
    base_model_id: str | None,
    label: str,
    keys: Sequence[str],
    rows: Sequence[Row],
    manifest: Mapping[str, Any],
    scorer: str,
    adapter: bool,
    sample: str,
) -> str:
    """The card of M_t, as the hub and transformers read it.

    Args:
        repository: Hub id of this model, or None.
        dataset_repository: Hub id of the pairs, or None.
        license_name: Licence as the hub names it, or None.
        language: ISO 639-1 code of the prompts, or None if it is open.
        base_model: M_0 in words.
        base_model_id: Hub id of M_0, if it has one.
        label: `model_checkpoint[0002]`.
        keys: The iterations up to this one.
        rows: Figures by iteration.
        manifest: The manifest of the checkpoint.
        scorer: The scorer in words.
        adapter: Whether the adapter lies beside the merged weights.
        sample: One pair that it was trained on as JSON, harmless to show.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base_model_id,
        datasets=dataset_repository,
        language=language,
        license=license_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, "trl"],
    )
    parents = [[role, parent["asset"], parent["sha"]] for role, parent in manifest["parents"].items()]
    card = ModelCard.from_template(
        data,
        template_path=str(FOLDER / "model_card.md.jinja"),
        repository=repository,
        base_model_words=base_model,
        base_model_id=base_model_id,
        label=label,
        sha=manifest["sha"],
        iteration=int(keys[-1]),
        figures=figures_table(rows, keys),
        parents=_table(["role", "checkpoint", "sha"], parents),
        trained_on=_table(["pairs", "content version"], manifest["trained_on"].items()),
        scorer=scorer,
        adapter=adapter,
        random_seed=manifest["random_seed"],
        settings=_yaml(manifest["settings"]),
        libraries=_libraries(manifest["libraries"]),
        sample=sample,
    )
    return str(card)


def figures_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """The figures by iteration as a Markdown table, a blank line of its own before each section's name.

    Examples:
        >>> print(figures_table([Row("Pairs", "pairs kept", ("28", "30"))], ["0001", "0002"]))
        | | M_1 | M_2 |
        | --- | --- | --- |
        | **Pairs** | | |
        | pairs kept | 28 | 30 |
    """
    lines = [f"| | {' | '.join(f'M_{int(key)}' for key in keys)} |", f"|{' --- |' * (1 + len(keys))}"]
    section = None
    for row in rows:
        if row.section in LEFT_OUT_SECTIONS:
            continue
        if row.section != section:
            section = row.section
            lines.append(f"| **{section}** |{' |' * len(keys)}")
        lines.append(_line([row.label, *row.cells]))
    return "\n".join(lines)


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
