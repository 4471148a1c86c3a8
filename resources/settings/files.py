"""Settings files: presets, and what is wrong with a file in a sentence."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from upath import UPath

from resources.common.text import one_line
from resources.settings.data import SEED_DATA_SUFFIXES
from resources.settings.sections import (
    SECRET_VALUE,
    SettingsError,
    flattened,
    is_unwritable,
    may_be_secret,
    merge,
    nearest,
    section_of,
    sections_in,
)
from resources.settings.settings import Settings

# A few lines of aliases of aliases would be written out until memory ends.
MOST_VALUES, DEEPEST = 100_000, 50
# Of more, nobody would read all, and it takes long to say what may have been meant.
MOST_PROBLEMS = 30
# In a home, beside settings.yaml: its settings when they were valid last.
LAST_VALID = "last_valid_settings.json"
PRESETS = Path(__file__).parents[1] / "presets"
# Settings that name a file or folder, relative to the settings file.
FILES = (
    ("preferences", "reviewed"), ("judge.server", "template"), ("training_processes", "accelerate_config"),
    ("publishing", "directory"),
    ("benchmarks", "task_folder"), ("benchmarks", "alpaca_eval"), ("benchmarks", "arena_hard"), ("benchmarks", "mt_bench"),
)  # fmt: skip

# Settings that all runs of a home share.
OF_THE_HOME = (
    "preset", "random_seed", "max_iterations", "initial_policy", "seed_data", "keyword_pool", "storage", "automation",
)  # fmt: skip

EARLIER_VERSION = (
    "The home {} was made by an earlier version of SynPO, whose settings, tables and columns have other names. Go on with it in "
    "that version, or name another directory with --home to start anew; nothing in it was changed."
)


# What else may hold a password is not repeated wherever it stands.
SECRET_PLACES = re.compile(r"^storage\b|\b(server|ray|vllm_arguments)\b")


def load_settings(path: Path) -> Settings:
    """Reads a YAML file of settings, on top of the preset that it names; relative paths inside are relative to its folder."""
    try:
        return Settings.model_validate(_read(path))
    except ValidationError as error:
        raise SettingsError(_sentence(f"Settings file {path}", error)) from None


def changed_settings(settings: Settings, changes: Mapping[str, Any], folder: Path) -> Settings:
    """Settings of which some are changed for one run, by dotted name; relative paths are relative to a folder.

    Raises:
        SettingsError: There is no such setting, all runs of a home share it, or its value is wrong.
    """
    values = settings.model_dump()
    for name, value in changes.items():
        if name.split(".")[0] in OF_THE_HOME:
            raise SettingsError(
                f"Changes of this run: `{name}` is the same for all runs of a home. Change it in settings.yaml, or name another "
                "home for another experiment."
            )
        change = functools.reduce(lambda inner, part: {part: inner}, reversed(name.split(".")), value)
        _make_paths_absolute(change, folder)
        values = merge(values, change, [Settings])
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_sentence("Changes of this run", error)) from None


def changes_between(before: Settings, after: Settings) -> list[str]:
    """What differs in settings, as `preference_optimization.loss.beta 3 instead of 2`."""
    old, new = (dict(flattened(settings.model_dump())) for settings in (before, after))
    return [
        f"{name} {_written(value)}" + (f" instead of {_written(old[name])}" if name in old else "")
        for name, value in new.items()
        if name not in old or value != old[name]
    ]


def preset_path(name: str) -> Path:
    """The file of a preset."""
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if name not in names:
        raise SettingsError(f"There is no preset `{name}`{nearest(name, names)} Presets: {', '.join(names)}.")
    return PRESETS / f"{name}.yaml"


def home_settings(home: Path) -> Settings:
    """The settings stored in a home; those of the laptop preset if the home is new.

    Raises:
        SettingsError: An earlier version made the home, its settings are wrong, or they are gone.
    """
    stored = home / "settings.yaml"
    if not stored.exists():
        if (last := home / LAST_VALID).exists():
            raise SettingsError(
                f"{stored} is gone, and {home} was used before: copy {last}, which holds the last valid settings, to it, or name "
                "another home with --home."
            )
        return load_settings(preset_path("laptop"))
    values = _yaml(stored)
    if "policy" in values:
        raise SettingsError(EARLIER_VERSION.format(home))
    # Where artifacts lie elsewhere, `check_storage` asks: settings are read where that place may not answer.
    if not section_of(values, "storage").get("artifacts"):
        refuse_earlier_version(home)
    return load_settings(stored)


def settings_problem(home: Path) -> str | None:
    """What is wrong with the settings of a home, and what follows from that, as sentences; None if they are valid."""
    try:
        home_settings(home)
    except SettingsError as error:
        return (
            f"{error} Until the settings are valid and *Reload definitions* was pressed, no run starts, and the graph is that of "
            "the last valid settings."
        )
    return None


def refuse_earlier_version(root: Path | UPath) -> None:
    """Raises a sentence if the tables under a folder are those of an earlier version, when no asset recorded metrics."""
    if (root / "tables" / "seed_pairs.parquet").exists() and not (root / "metrics").exists():
        raise SettingsError(EARLIER_VERSION.format(root))


def dagster_configuration(home: Path) -> str:
    """What `dagster.yaml` of a home says; nothing if there is none yet."""
    file = home / "dagster.yaml"
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if isinstance(yaml.safe_load(text) or {}, dict):
            return text
    # A tag that does not suit its value raises whatever Python says of it.
    except Exception:
        pass
    raise SettingsError(f"{file} is no configuration of Dagster: move it away, and it is written anew.")


def home_directory() -> Path:
    """Where history and artifacts live: SYNPO_HOME, else `.synpo` in a checkout; of an installed wheel in the working directory."""
    project = Path(__file__).parents[2]
    beside = project if (project / "pyproject.toml").exists() else Path()
    return Path(os.environ.get("SYNPO_HOME", beside / ".synpo")).absolute()


def _read(path: Path) -> dict[str, Any]:
    values = _yaml(path)
    # No path can hold it; the validation that follows says where it stands.
    if not any(is_unwritable(value) for _, value in flattened(values)):
        _make_paths_absolute(values, path.parent)
    preset = values.get("preset")
    if preset in (None, "none") or preset_path(str(preset)) == path:
        return values
    if path.name == "settings.yaml" and set(Settings.model_fields) <= set(values):
        return values
    base = _read(preset_path(preset))
    if section_of(values, "scorer").get("kind") == "verifier" and section_of(base, "scorer").get("kind") == "trained":
        # A verifier trains the same reward model beside its rules.
        base["scorer"]["kind"] = "verifier"
    merged = merge(base, values, [Settings])
    training = section_of(base, "scorer").get("training")
    judge = section_of(merged, "judge")
    if training and "training" not in section_of(merged, "scorer") and judge.get("kind", "trained") == "trained":
        # Another kind of scorer takes nothing from the preset's, but the judge is still trained as that would be.
        merged["judge"] = {"training": training} | judge
    return merged


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"The settings file {path} does not exist.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader) or {}
        size, depth = _extent(values, {})
    # As in dagster.yaml.
    except Exception as error:
        raise SettingsError(f"The settings file {path} is not valid YAML: {one_line(str(error))}") from None
    if size > MOST_VALUES:
        raise SettingsError(
            f"The settings file {path} holds more than {MOST_VALUES:,} values once its aliases are written out."
        )
    if depth > DEEPEST:
        raise SettingsError(f"The settings file {path} is nested more than {DEEPEST} deep.")
    if not isinstance(values, dict):
        raise SettingsError(f"The settings file {path} must hold `key: value` lines at its top level.")
    return values


def _extent(value: Any, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values there are with aliases written out, and how deep; without end where one holds itself."""
    if id(value) not in known:
        known[id(value)] = float("inf"), float("inf")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        found = [_extent(each, known) for each in inner]
        known[id(value)] = 1 + sum(size for size, _ in found), 1 + max((depth for _, depth in found), default=0)
    return known[id(value)]


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, the fast one where it is there; refuses keys that stand twice, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set[str]()
        for name in (str(key.value) for key, _ in node.value if not key.tag.endswith(":merge")):
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"`{name}` stands there twice", node.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def _make_paths_absolute(values: dict[str, Any], folder: Path) -> None:
    def at(place: str) -> dict[str, Any]:
        return functools.reduce(section_of, place.split("."), values)

    sources = map(at, ("seed_data.train", "seed_data.held_out", "seed_data.verifiable", "keyword_pool.corpus"))
    models = map(at, ("initial_policy", "diversity.embedding_model"))
    published = [section for section in map(at, ("scorer", "judge")) if section.get("name")]
    named = [(source, "path") for source in sources if _is_local(folder, str(source.get("path", "")))]
    named += [(model, "name") for model in models if model.get("source") == "directory" and "name" in model]
    named += [(section, "name") for section in published if os.path.isdir(folder / str(section["name"]))]
    named += [(at(place), name) for place, name in FILES if at(place).get(name)]
    for section, name in named:
        # What is no text is refused when it is validated.
        if not isinstance(section[name], str | Path):
            continue
        section[name] = str((folder / os.path.expanduser(str(section[name]))).resolve())


def _is_local(folder: Path, path: str) -> bool:
    """Whether a data source is a file or folder; what is neither, and is not written like one, is a dataset id."""
    # Unlike pathlib, these take a `~` that names no user for a letter, and a name longer than any file's for none.
    place = Path(os.path.expanduser(path))
    written_so = path.startswith(("~", ".", "/")) or place.suffix.lower() in SEED_DATA_SUFFIXES
    return bool(path) and (written_so or os.path.exists(folder / place))


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sentence(source: str, error: ValidationError) -> str:
    sentences, problems = [], error.errors()
    for problem in problems[:MOST_PROBLEMS]:
        where, _ = _place(problem["loc"])
        context = problem.get("ctx", {})
        if problem["type"] == "extra_forbidden":
            *outer, name = problem["loc"]
            _, sections = _place(outer)
            known = [field for section in sections for field in section.model_fields]
            if outer and "kind" in known and sections[0].model_fields["kind"].default == outer[-1]:
                sentences.append(f"`{where}` is not a setting of `kind: {outer[-1]}`{nearest(str(name), known)}")
            else:
                sentences.append(f"`{where}` is not a setting{nearest(str(name), [*known, *_places_of(str(name))])}")
        elif problem["type"] == "missing":
            sentences.append(f"`{where}` is missing.")
        elif problem["type"] == "union_tag_not_found":
            sentences.append(f"`{where}.kind` is missing.")
        elif problem["type"] == "union_tag_invalid":
            kind = f"{where}.kind"
            sentences.append(
                f"`{kind}` is {_shown(kind, context['tag'])}: input should be one of {context['expected_tags']}."
            )
        elif problem["type"] == "value_error":
            place = f"`{where}`: " if where else ""
            sentences.append(place + str(context["error"]))
        elif problem["type"] == "string_type" and isinstance(problem["input"], bool):
            # `no` is Norwegian.
            sentences.append(f"`{where}` is a word that YAML reads as {problem['input']}: put it in quotes.")
        else:
            sentences.append(f"`{where}` is {_shown(where, problem['input'])}: {problem['msg'].lower()}.")
    if more := len(problems) - len(sentences):
        sentences.append(f"And {more} more like these.")
    return f"{source}: " + " ".join(sentences)


def _shown(where: str, value: Any) -> str:
    """A wrong value as it was written, unless it may hold a password."""
    text = repr(value)
    is_hidden = SECRET_PLACES.search(where) or "://" in text or may_be_secret(text) or SECRET_VALUE.search(text)
    return "not shown here" if is_hidden and not isinstance(value, int | float | None) else text


def _place(location: Sequence[int | str]) -> tuple[str, list[type[BaseModel]]]:
    """The dotted name of a place that pydantic names, and the sections that can stand there."""
    names: list[str] = []
    sections, is_variant = sections_in(Settings), False
    for part in location:
        if is_variant:
            # Of a union, pydantic names the variant too, which is no place in the file.
            sections = [section for section in sections if section.model_fields["kind"].default == part]
            is_variant = False
            continue
        names.append(str(part))
        fields = [section.model_fields[str(part)] for section in sections if part in section.model_fields]
        if fields:
            sections, is_variant = sections_in(fields[0].annotation), fields[0].discriminator is not None
    return ".".join(names), sections


def _places_of(name: str) -> list[str]:
    """The settings of this name by dotted name, for a key that stands in the wrong section."""
    return [
        f"{place}.{name}"
        for place, field in Settings.model_fields.items()
        if any(name in section.model_fields for section in sections_in(field.annotation))
    ]
