"""Writes the settings reference from the field descriptions: `python -m resources.settings.reference`."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from resources.settings.settings import Settings

REFERENCE = Path(__file__).with_name("reference.md")
HEAD = """# Settings\n\nEvery setting, with its default as YAML. Sections of one form share a table, which then has several names.
What is `required` stands in each preset, or is taken from another section where its description says so.
`python -m resources.settings.reference` writes this file from the descriptions in the code: change them there.\n"""
COLUMNS = "| setting | default | description |\n|---|---|---|\n"


def sections(model: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and all sections below it, by dotted name; a union gives one for each variant."""
    yield name, model
    for key, field in model.model_fields.items():
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part, f"{name}.{key}".lstrip("."))


def reference(settings: type[BaseModel]) -> str:
    """The reference as Markdown."""
    names: dict[type[BaseModel], list[str]] = {}
    for name, section in sections(settings):
        kinds = _parts(section.model_fields["kind"].annotation) if "kind" in section.model_fields else []
        variant = f" of kind `{kinds[0]}`" if len(kinds) == 1 else ""
        names.setdefault(section, []).append(f"`{name}`{variant}" if name else "Top level")
    tables = {section: "".join(_row(*item) for item in section.model_fields.items()) for section in names}
    return HEAD + "".join(
        f"\n## {', '.join(dict.fromkeys(names[s]))}\n\n{_description(s)}\n\n{COLUMNS}{tables[s]}" for s in tables
    )


def _row(name: str, field: FieldInfo) -> str:
    default, parts = field.get_default(call_default_factory=True), _parts(field.annotation)
    stated = default.model_dump(mode="json", exclude_unset=True) if isinstance(default, BaseModel) else default
    value = "" if field.is_required() else yaml.safe_dump([stated], default_flow_style=True, width=999)[1:-2]
    text, choices = field.description or "", [f"`{part}`" for part in parts if isinstance(part, str)]
    text = (text or " ".join(map(_summary, parts))).replace("|", r"\|")
    text += "" if all(choice in text for choice in choices) else f" Choices: {', '.join(choices)}."
    return f"| `{name}` | {f'`{value}`' if value else 'required'} | {text.strip()} |\n"


def _parts(annotation: Any) -> list[Any]:
    return [part for argument in get_args(annotation) for part in _parts(argument)] or [annotation]


def _description(section: type) -> str:
    paragraphs = (inspect.getdoc(section) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _summary(section: Any) -> str:
    return _description(section).partition("\n\n")[0] if isinstance(section, type) else ""


if __name__ == "__main__":
    REFERENCE.write_text(reference(Settings), encoding="utf-8")
