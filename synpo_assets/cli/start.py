"""`synpo init`: writes a commented settings file for a model and a data file, on top of the nearest preset."""

import collections
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from resources.common.text import duration
from resources.models.device import prepare_device
from resources.settings.data import WITHOUT_KEYWORDS
from resources.settings.files import PRESETS, changed_settings, load_settings, preset_path
from resources.settings.machine import Engine
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.files import write_atomically
from resources.storage.row_files import table_rows
from synpo_assets.cli.estimate import expected_work, seconds, sizes_of
from synpo_assets.cli.preflight import check_data_and_training, rates_here
from synpo_assets.method.chat_rows import UnusableCellError, row_text
from synpo_assets.method.ids import content_id
from synpo_assets.method.seed import BadRow, seed_rows

# Names of columns in the order in which they are proposed; one column of chat messages may hold both.
PROMPTS = ("prompt", "instruction", "question", "query", "input", "problem", "user", "messages", "conversations")
ANSWERS = ("answer", "response", "output", "completion", "chosen", "solution", "assistant", "messages", "conversations")
TRIED_ROWS, USABLE_SHARE = 200, 0.9
FEWEST_ROWS = 12
# One row of so many is held out, and so many at most: more would make only the evaluation longer.
HELD_OUT_OF, MOST_HELD_OUT = 5, 200
LANGUAGE_CHARACTERS = 20_000
LANGUAGE_CHARACTERS_OF_A_ROW = 1_000
FEWEST_PROMPTS = 8


def print_presets() -> None:
    """Prints each preset with the sentence that its file begins with."""
    for name, sentence in presets().items():
        Console(soft_wrap=True, highlight=False, markup=False).print(f"{name:<14}{sentence}")


def presets() -> dict[str, str]:
    """The presets, each with the sentence that its file begins with."""
    found = {}
    for file in sorted(PRESETS.glob("*.yaml")):
        lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
        found[file.stem] = " ".join(line.lstrip("# ") for line in lines).split(". ")[0].rstrip(".") + "."
    return found


def write_settings_file(
    output: Path,
    data: Path,
    model: str | None,
    preset: str | None,
    columns: tuple[str | None, str | None],
    gpu: bool | None,
    minutes: float | None,
    confirm: Callable[[str, str], str] | None,
) -> None:
    """Writes the settings, and the seed in two files beside them, none of which may exist.

    Args:
        data: A .jsonl, .csv or .parquet file of questions with good answers.
        model: A folder or hub id of M_0, with `@` and a revision if need be; None: the preset's.
        preset: The preset to start from; None: by whether there is a GPU.
        columns: Those of question and answer; None: they are proposed.
        gpu: Whether a GPU is there; None: what this machine has.
        minutes: How long everything made once and one iteration may take; None: as large as the preset.
        confirm: Asks for a value, given what it is and a proposal; None: nobody is there to be asked.
    """
    places = {part: output.with_name(f"{output.stem}_{part}.jsonl") for part in ("train", "held_out", "corpus")}
    _refuse_places(output, places.values())
    if minutes is not None and not 0 < minutes < float("inf"):
        raise SettingsError(f"--minutes {minutes:g} is no length of time: state how many minutes a run may take.")
    on_gpu = prepare_device(Engine.model_validate({})) == "cuda" if gpu is None else gpu
    name = preset or ("single_gpu" if on_gpu else "laptop")
    base, source = load_settings(preset_path(name)), model_source(model)
    rows = table_rows(data, "--data", "rows")
    proposed = chosen_columns([row for _, row in rows], data, columns)
    if confirm:
        proposed = (confirm("column of the question", proposed[0]), confirm("column of the answer", proposed[1]))
        chosen_columns([row for _, row in rows], data, proposed)
    good, bad = _usable_rows(rows, data, proposed)
    language = _language_with_keywords(good, data)
    kept_out = min(MOST_HELD_OUT, len(good) // HELD_OUT_OF)
    files = {places["held_out"]: good[:kept_out], places["train"]: good[kept_out:]}
    if language != "en":
        files[places["corpus"]] = [{"text": row["answer"]} for row in good[kept_out:]]
    limits = {name: getattr(base.seed_data, name) for name in ("train_limit", "held_out_limit")}
    values = _values(name, source, places, language, gpu, limits)
    temporary = output.with_name(f".{output.name}.tmp.yaml")
    written = list[Path]()
    try:
        for place, kept in files.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
            write_atomically(place, "".join(lines).encode())
            written.append(place)
        write_atomically(temporary, _text(values, {}).encode())
        settings = load_settings(temporary)
        size, said = _size(settings, base, output.parent, minutes)
        values = values | {section: values.get(section, {}) | each for section, each in size.items()}
        write_atomically(temporary, _text(values, {"prompt_generator": said}).encode())
        check_data_and_training(load_settings(temporary))
        temporary.rename(output)
    except BaseException as error:
        for place in (temporary, *written):
            place.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SettingsError(f"{output} cannot be written: {error.strerror or error}.") from None
        raise
    console = Console(soft_wrap=True, highlight=False, markup=False)
    about = f"{len(good)} rows with columns {proposed[0]} and {proposed[1]}, language {language}"
    console.print(f"{output}: preset {name}; {about}; {len(bad)} left out; {kept_out} held out.\n{said}")
    if fewer := _limited(limits, {"train_limit": len(good) - kept_out, "held_out_limit": kept_out}):
        console.print(fewer)
    console.print(f"Next: synpo check --settings {output} --home runs/{output.stem}")


def chosen_columns(
    rows: Sequence[Mapping[str, Any]], data: Path, columns: tuple[str | None, str | None]
) -> tuple[str, str]:
    """The columns of question and answer: those that are stated, else by their names, if nearly all rows can be used.

    Raises:
        SettingsError: No two columns hold questions and answers.
    """
    known = list(dict.fromkeys(name for row in rows for name in row))
    for stated in columns:
        if stated is not None and stated not in known:
            raise SettingsError(f"{data} has no column `{stated}`; it has {', '.join(f'`{name}`' for name in known)}.")
    lowered = {name.lower(): name for name in known}
    asked, answered = (
        [stated] if stated else [lowered[name] for name in names if name in lowered]
        for stated, names in zip(columns, (PROMPTS, ANSWERS), strict=True)
    )
    for prompt, answer in itertools.product(asked, answered):
        if _usable_share(rows[:TRIED_ROWS], prompt, answer) >= USABLE_SHARE:
            return prompt, answer
    raise SettingsError(
        f"{data} has no two columns that hold questions and answers as text or chat messages; it has "
        f"{', '.join(f'`{name}`' for name in known) or 'none'}. Name them with --prompt-column and --answer-column."
    )


def model_source(model: str | None) -> dict[str, Any]:
    """The settings of M_0 for a folder or a hub id; none if nothing is stated."""
    if model is None:
        return {}
    without = {"wheel_sha256": None, "wheel_member": None, "system_prompt": None}
    if Path(model).expanduser().is_dir():
        return {"source": "directory", "name": str(Path(model).expanduser().absolute()), "revision": None} | without
    name, _, revision = model.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise SettingsError(
            f"--model {model} is neither a folder that is there nor a hub id such as org/name or org/name@revision."
        )
    return {"source": "hub", "name": name, "revision": revision or "main"} | without


def language_of(rows: Sequence[Mapping[str, str]]) -> str:
    """The language of questions and answers, the most frequent one of the rows."""
    import py3langid

    texts, length = collections.Counter[str](), 0
    for row in rows:
        # A long one decides no more than others: it may be code, or data.
        text = f"{row['prompt']} {row['answer']}"[:LANGUAGE_CHARACTERS_OF_A_ROW]
        language = py3langid.classify(text)[0]
        # Its `zxx` stands for no language.
        if len(language) == 2:
            texts[language] += len(text)
        length += len(text)
        if length > LANGUAGE_CHARACTERS:
            break
    return texts.most_common(1)[0][0] if texts else "en"


def _refuse_places(output: Path, beside: Iterable[Path]) -> None:
    if output.suffix not in (".yaml", ".yml"):
        raise SettingsError(f"{output} is no .yaml file: name one, such as mine.yaml.")
    if not output.parent.is_dir():
        raise SettingsError(f"The folder {output.parent} does not exist: make it, or name another file.")
    for place in (output, *beside):
        if os.path.lexists(place):
            raise SettingsError(f"{place} exists and is not overwritten: name another settings file.")


def _usable_rows(
    rows: Sequence[tuple[int, dict[str, Any]]], data: Path, columns: tuple[str, str]
) -> tuple[list[dict[str, str]], list[BadRow]]:
    """The questions and answers that can be used, in an order by which neither place nor topic decides, and the other rows."""
    good, bad = seed_rows(rows, [], *columns)
    if len(good) < FEWEST_ROWS:
        raise SettingsError(f"{data} has {len(good)} usable rows and {FEWEST_ROWS} are needed at least: add rows.")
    pairs = [{"prompt": row["prompt"], "answer": row["answer"]} for row in good]
    return sorted(pairs, key=lambda row: content_id("split", row["prompt"])), bad


def _language_with_keywords(rows: Sequence[Mapping[str, str]], data: Path) -> str:
    language = language_of(rows)
    if language in WITHOUT_KEYWORDS:
        raise SettingsError(
            f"{data} seems to be written in `{language}`, whose words nothing here tells apart, so that no keywords could be "
            "drawn: use data in another language."
        )
    return language


def _usable_share(rows: Sequence[Mapping[str, Any]], prompt: str, answer: str) -> float:
    def is_usable(row: Mapping[str, Any]) -> bool:
        try:
            texts = row_text(row, prompt, "prompt", "user"), row_text(row, answer, "answer", "assistant")
        except UnusableCellError:
            return False
        return texts[0] != texts[1]

    return sum(map(is_usable, rows)) / len(rows)


def _limited(limits: Mapping[str, int | None], rows: Mapping[str, int]) -> str:
    """Which limits take fewer rows than there are, as a sentence; empty if none does."""
    fewer = [(name, limit) for name, limit in limits.items() if limit and limit < rows[name]]
    told = " and ".join(f"seed_data.{name}: {limit} of {rows[name]}" for name, limit in fewer)
    return (
        f"Taken as in the preset, {told} rows: raise them in the file for more, or write null for all." if told else ""
    )


def _values(
    preset: str,
    source: dict[str, Any],
    places: Mapping[str, Path],
    language: str,
    gpu: bool | None,
    limits: Mapping[str, int | None],
) -> dict[str, Any]:
    """What differs from the preset, and how many rows of each file it takes."""
    train, held_out, corpus = ({"path": places[part].name} for part in ("train", "held_out", "corpus"))
    columns = {"prompt_column": "prompt", "answer_column": "answer"}
    seed: dict[str, Any] = {"train": train, "held_out": held_out, **columns, **limits, "on_bad_rows": "drop"}
    values: dict[str, Any] = {"preset": preset} | ({"initial_policy": source} if source else {})
    values["seed_data"] = seed
    if language != "en":
        seed["verifiable"] = None
        values["keyword_pool"] = {"corpus": corpus, "text_column": "text", "language": language}
    values["prompt_generator"] = {"language": language}
    if gpu is False:
        values["engine"] = {"device": "cpu"}
    return values


def _size(settings: Settings, base: Settings, folder: Path, minutes: float | None) -> tuple[dict[str, Any], str]:
    """How many prompts and pairs an iteration has, and where that is from, as a sentence."""
    most, pairs = base.prompt_generator.prompts_per_iteration, base.preferences.pairs_per_iteration
    if minutes is None:
        return {}, f"As many prompts as in the preset: {most} in each iteration."
    rates, _ = rates_here(settings)
    if rates is None:
        return {}, (
            f"How fast this machine is with this model is not known, so there are as many prompts as in the preset: {most}. "
            "Measure it with `synpo check --calibrate`, and give this command again with another file name."
        )
    seed, _, instructions = check_data_and_training(settings)
    largest = int(settings.keyword_pool.max_sets / settings.prompt_generator.max_overdraw)

    def sized(prompts: int) -> tuple[dict[str, Any], float]:
        kept = max(1, prompts * pairs // most)
        size = {"prompt_generator": {"prompts_per_iteration": prompts}, "preferences": {"pairs_per_iteration": kept}}
        changes = {f"{section}.{name}": value for section, each in size.items() for name, value in each.items()}
        changed = changed_settings(settings, changes, folder)
        work = expected_work(sizes_of(changed, seed, instructions))
        return size, sum(seconds(item, rates) for _, item in work)

    low, high = FEWEST_PROMPTS, max(FEWEST_PROMPTS, largest)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sized(middle)[1] <= 60 * minutes else (low, middle - 1)
    size, needed = sized(low)
    said = f"{low} prompts in each iteration: what is made once and one iteration take about {duration(needed)} here"
    return (
        size,
        f"{said}." if needed <= 60 * minutes else f"{said}, and fewer prompts would make no pairs to learn from.",
    )


COMMENTS = {
    "preset": "What is not stated here is as in this preset; `synpo init --presets` lists all.",
    "initial_policy": "M_0: an instruct model with a chat template. Pin a hub model to a commit instead of a branch.",
    "seed_data": "Questions with good answers, of each file so many at random; null: all. Rows that cannot be used are dropped and "
    "counted; `refuse` names them instead.",
    "keyword_pool": "Paragraphs that keywords are drawn from: here the answers of the seed. A larger text varies prompts more.",
    "engine": "`auto`, in place of `cpu`, takes a GPU if there is one.",
    "preferences": "Pairs that are kept of these prompts.",
}


def _text(values: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    return "\n".join(_section_lines(values, COMMENTS | dict(comments)))


def _section_lines(values: Mapping[str, Any], comments: Mapping[str, str]) -> Iterator[str]:
    yield "# Settings of a SynPO experiment. resources/settings/reference.md describes all; paths are relative to this file."
    for name, value in values.items():
        if comment := comments.get(name):
            yield f"# {comment}"
        yield yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=120)
