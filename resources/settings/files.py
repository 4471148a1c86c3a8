"""Settings files: presets, and what is wrong with a file in a sentence."""

import functools
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from resources.settings.data import SEED_DATA_SUFFIXES
from resources.settings.sections import SettingsError, merge, nearest, section_of
from resources.settings.settings import Settings

PRESETS = Path(__file__).parents[1] / "presets"


def load_settings(path: Path) -> Settings:
    """Reads a settings file, on top of the preset that it names.

    Args:
        path: A YAML file. Relative data paths inside are relative to its folder.

    Raises:
        SettingsError: The file is missing, is not YAML, or holds an unknown, missing or impossible setting.
    """
    try:
        return Settings.model_validate(_read(path))
    except ValidationError as error:
        raise SettingsError(_sentence(path, error)) from None


def preset_path(name: str) -> Path:
    """The file of a preset.

    Raises:
        SettingsError: There is no preset of that name.
    """
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if name not in names:
        raise SettingsError(f"There is no preset `{name}`{nearest(name, names)} Presets: {', '.join(names)}.")
    return PRESETS / f"{name}.yaml"


@functools.cache
def active_settings() -> Settings:
    """The settings of this process: `settings.yaml` in the home (SYNPO_HOME), else the laptop preset."""
    stored = home_directory() / "settings.yaml"
    return load_settings(stored if stored.exists() else preset_path("laptop"))


def home_directory() -> Path:
    """Where history and artifacts live: SYNPO_HOME, else `.synpo` beside `definitions.py`."""
    return Path(os.environ.get("SYNPO_HOME", Path(__file__).parents[2] / ".synpo")).absolute()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"The settings file {path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"The settings file {path} must hold `key: value` lines at its top level.")
    _make_paths_absolute(values, path.parent)
    preset = values.get("preset")
    if preset in (None, "none") or preset_path(str(preset)) == path:
        return values
    if path.name == "settings.yaml" and set(Settings.model_fields) <= set(values):
        return values
    return merge(_read(preset_path(preset)), values)


def _make_paths_absolute(values: dict[str, Any], folder: Path) -> None:
    sources = [section_of(section_of(values, "seed_data"), key) for key in ("train", "held_out", "verifiable")]
    sources.append(section_of(section_of(values, "keyword_pool"), "corpus"))
    for source in sources:
        if str(source.get("path", "")).endswith(SEED_DATA_SUFFIXES):
            source["path"] = str((folder / source["path"]).resolve())
    model, scorer = section_of(values, "initial_policy"), section_of(values, "scorer")
    embedding = section_of(section_of(values, "diversity"), "embedding_model")
    processes, judge = section_of(values, "training_processes"), section_of(section_of(values, "judge"), "server")
    if judge.get("template"):
        judge["template"] = str((folder / str(judge["template"])).resolve())
    if processes.get("accelerate_config"):
        processes["accelerate_config"] = str((folder / str(processes["accelerate_config"])).resolve())
    publishing = section_of(values, "publishing")
    if publishing.get("directory"):
        publishing["directory"] = str((folder / str(publishing["directory"])).resolve())
    benchmarks = section_of(values, "benchmarks")
    for name in ("task_folder", "alpaca_eval", "arena_hard", "mt_bench"):
        if benchmarks.get(name):
            benchmarks[name] = str((folder / str(benchmarks[name])).resolve())
    for place in (model, embedding):
        if place.get("source") == "directory" and "name" in place:
            place["name"] = str((folder / str(place["name"])).resolve())
    if scorer.get("name") and (folder / str(scorer["name"])).is_dir():
        scorer["name"] = str((folder / str(scorer["name"])).resolve())


def _sentence(path: Path, error: ValidationError) -> str:
    sentences = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            name, fields = str(problem["loc"][-1]), _fields_at(problem["loc"][:-1])
            sentences.append(f"`{where}` is not a setting{nearest(name, [*fields, *_places_of(name)])}")
        elif problem["type"] == "missing":
            sentences.append(f"`{where}` is missing.")
        elif problem["type"] == "value_error":
            place = f"`{where}`: " if where else ""
            sentences.append(place + str(problem["ctx"]["error"]))
        else:
            sentences.append(f"`{where}` is {problem['input']!r}: {problem['msg'].lower()}.")
    return f"Settings file {path}: " + " ".join(sentences)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Settings
    for part in location:
        if isinstance(part, int):
            # The place in a list, whose elements are sections.
            continue
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(section.model_fields)


def _places_of(name: str) -> list[str]:
    """The settings of this name by dotted name, for a key that stands in the wrong section."""
    sections = {
        section: field.annotation
        for section, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    return [f"{section}.{name}" for section, kind in sections.items() if name in kind.model_fields]
