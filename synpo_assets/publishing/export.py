"""Writing the preference pairs of a home in the form that another trainer reads, or people."""

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from rich.console import Console

from resources.models.gguf_file import write_gguf
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.files import opened_atomically, temporary_directory_beside, write_atomically
from resources.storage.output_files import refuse_existing, writing
from resources.storage.tables import ParquetTables
from synpo_assets.graph.partitions import partition_key, stated_iteration
from synpo_assets.publishing.forms import CONVERSIONS, Format, Trainer, axolotl_dataset, dataset_info
from synpo_assets.publishing.review import review_table

NAME = "preference_pairs"
DATASET = "synpo_preference_pairs"
# LLaMA-Factory's list of all data sets of a folder, where others may stand beside ours.
INFO = "dataset_info.json"
SUFFIXES = (".jsonl", ".parquet")


def print_export(settings: Settings, home: Path, form: Format, only: str | None, output: Path, overwrite: bool) -> None:
    """Writes the pairs and prints what was written, where, and how to use it.

    Only with `overwrite` are files replaced; of a `dataset_info.json`, only what it says about these pairs.
    """
    if form == "gguf":
        return _print_gguf(settings, home, only, output, overwrite)
    with writing(output):
        file = output_file(form, output)
        is_described = form == "llama-factory" and DATASET in _data_sets(file)
    for place in (file, *_beside(form, file)):
        is_list = place.name == INFO
        refuse_existing(place, overwrite or (is_list and not is_described), f" and names {DATASET}" if is_list else "")
    pairs = read_pairs(ParquetTables(f"{settings.storage.root(home)}/tables"), only)
    with writing(output):
        if form == "review":
            write_atomically(file, review_table(pairs, settings.random_seed).write_csv(include_bom=True).encode())
        else:
            write_pairs(pairs, form, file)
    counts = ", ".join(f"{count} of iteration {number}" for number, count in _counts(pairs))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{pairs.height} pairs ({counts}) in the form of {form}: {file}")
    for place in _beside(form, file):
        console.print(f"{'how to use it':<18}{place}")
    if form == "review":
        console.print(
            "Fill in `verdict`: 1 or 2 for the better answer, or tie, neither or both; rows without one stay as they are. Then "
            f"name the file in {home / 'settings.yaml'} as preferences.reviewed, and give `synpo run` again."
        )


def _print_gguf(settings: Settings, home: Path, only: str | None, output: Path, overwrite: bool) -> None:
    """Writes M_t, the model of one iteration, as a GGUF file and prints where."""
    number = stated_iteration(only or "")
    if number == 0:
        raise SettingsError(
            "Iterations are counted from 1, and M_0 is the model that you started from: name --iteration 1 or later."
        )
    if number is None:
        raise SettingsError("One model goes into a GGUF file: name its iteration, such as --iteration 2.")
    if output.suffix != ".gguf":
        raise SettingsError(f"A model is written as .gguf: give --output a .gguf file, not {output}.")
    refuse_existing(output, overwrite)
    root, cache = settings.storage.root(home), str(home / "cache" / "checkpoints")
    store = CheckpointStore(f"{root}/checkpoints", cache if settings.storage.artifacts else None)
    if store.manifest("model_checkpoint", partition_key(number)) is None:
        raise SettingsError(
            f"Iteration {number} has no finished model: make it with `synpo run --iterations {number}`."
        )
    model = store.current("model_checkpoint", partition_key(number))
    store.verify(model)
    with writing(output), temporary_directory_beside(output) as temporary:
        write_gguf(Path(model.weights), temporary / output.name)
        (temporary / output.name).rename(output)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"M_{number} (sha {model.sha[:16]}) as GGUF: {output}")


def output_file(form: Format, output: Path) -> Path:
    """The file that the pairs go into: `output` itself, or one in it if it is a folder."""
    if form == "review":
        if output.suffix.lower() != ".csv" and not output.is_dir():
            raise SettingsError(f"Pairs for people are written as .csv: give --output a .csv file, not {output}.")
        return output / "review.csv" if output.is_dir() else output
    if output.suffix not in SUFFIXES:
        if output.is_file() or (output.suffix and not output.exists()):
            raise SettingsError(
                f"{output} is neither a folder nor a file of a kind that is written: give --output a folder (one with a dot "
                "in its name must exist), a .jsonl file, or for trl a .parquet file."
            )
        return output / f"{NAME}.jsonl"
    if output.is_dir():
        raise SettingsError(
            f"{output} is a folder: give --output a file, or a folder that does not end in {output.suffix}."
        )
    if output.suffix == ".parquet" and form != "trl":
        raise SettingsError(f"The form of {form} is written as .jsonl: give --output a .jsonl file or a folder.")
    if form in ("llama-factory", "axolotl"):
        raise SettingsError(f"The form of {form} needs a file beside the pairs: give --output a folder.")
    return output


def read_pairs(tables: ParquetTables, only: str | None) -> pl.DataFrame:
    """The pairs of all iterations, or only of some, such as `2,3`, in order."""
    stored = tables.scan(NAME)
    pairs = None if stored is None else stored.sort("iteration", maintain_order=True).collect()
    if pairs is None or pairs.is_empty():
        raise SettingsError("This home holds no preference pairs yet: make an iteration with `synpo run` first.")
    if only is None:
        return pairs
    stated = [stated_iteration(part.strip()) for part in only.split(",")]
    wanted = {number for number in stated if number is not None}
    if None in stated:
        raise SettingsError(f"--only {only} is no list of iterations such as 2,3.")
    if missing := sorted(wanted - set(pairs["iteration"])):
        existing = ", ".join(str(number) for number, _ in _counts(pairs))
        raise SettingsError(f"Iteration {missing[0]} has no preference pairs; iterations that have: {existing}.")
    return pairs.filter(pl.col("iteration").is_in(wanted))


def write_pairs(pairs: pl.DataFrame, form: Trainer, file: Path) -> None:
    """Writes pairs in the form of a trainer, each file as a whole or not at all; what uses the pairs comes last."""
    with opened_atomically(file) as opened:
        if file.suffix == ".parquet":
            pairs.write_parquet(opened)
        else:
            for row in map(CONVERSIONS[form], pairs.iter_rows(named=True)):
                opened.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    for place in _beside(form, file):
        write_atomically(place, _use(form, file).encode())


def _beside(form: Format, file: Path) -> list[Path]:
    """The files that tell the trainer how to read the pairs."""
    names = {"llama-factory": [INFO], "axolotl": ["axolotl.yaml"]}.get(form, [])
    return [file.with_name(name) for name in names]


def _use(form: Format, file: Path) -> str:
    if form == "llama-factory":
        return json.dumps(_data_sets(file) | dataset_info(DATASET, file.name), indent=2) + "\n"
    return "# Add the model and the training settings.\n" + yaml.safe_dump(
        axolotl_dataset(str(file.absolute())), sort_keys=False
    )


def _data_sets(file: Path) -> dict[str, Any]:
    """What a `dataset_info.json` beside the pairs says already; nothing if there is none."""
    place = file.with_name(INFO)
    if not os.path.lexists(place):
        return {}
    try:
        described = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise SettingsError(
            f"{place} is no JSON object, so the pairs cannot be named in it: correct it or move it away."
        )
    return described


def _counts(pairs: pl.DataFrame) -> list[tuple[int, int]]:
    return list(pairs.group_by("iteration").len().sort("iteration").iter_rows())
