"""A model behind OpenAI's chat API that names what a prompt is about and what it asks for, and whether it can be answered."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from pydantic import BaseModel, ConfigDict, StrictBool, create_model

from resources.judging.structured_chat import StructuredChat
from resources.scoring.scorer import ScoringUsage
from resources.settings.evaluation import JudgeServer

LABELS = Path(__file__).parent / "labels.yaml"
TEMPLATE = LABELS.with_suffix(".jinja")


class TopicLabeler:
    """Asks a server for one topic and one intention of each prompt, of the lists in labels.yaml, and if it is answerable.

    Labels are kept in shards under a fingerprint of model, template and lists.
    """

    def __init__(self, server: JudgeServer, shards: str, shard_rows: int) -> None:
        """Reads template and lists; connects only when a label is missing."""
        text, lists = TEMPLATE.read_text(encoding="utf-8"), LABELS.read_text(encoding="utf-8")
        self._lists: dict[str, list[str]] = yaml.safe_load(lists)
        # The texts are for a model, not for a browser.
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True)
        self._template = environment.from_string(text)
        fingerprint = {"labels": hashlib.sha256((text + lists).encode()).hexdigest()[:16]}
        self._chat = StructuredChat(server, _form(**self._lists), "label", fingerprint, shards, shard_rows)
        self.label, self.shards = self._chat.label, self._chat.shards

    def label_prompts(self, prompts: Sequence[str]) -> tuple[list[dict[str, Any] | None], ScoringUsage]:
        """Asks about each different prompt once.

        The labels are `topic`, `intention` and `answerable` (true or false) of each prompt, None where the reply is not of
        that form.
        """
        keys = [hashlib.sha256(prompt.encode()).hexdigest()[:32] for prompt in prompts]
        questions = {
            key: self._template.render(prompt=prompt, **self._lists) for key, prompt in zip(keys, prompts, strict=True)
        }
        replies = self._chat.ask(questions)
        labels = {key: None if reply is None else reply.model_dump() for key, reply in replies.by_key.items()}
        return [labels[key] for key in keys], replies.usage


def _form(topics: Sequence[str], intentions: Sequence[str]) -> type[BaseModel]:
    """The reply that is asked for."""
    fields: dict[str, Any] = {"topic": (Literal[tuple(topics)], ...), "intention": (Literal[tuple(intentions)], ...)}
    # Strict, because "maybe" must not be read as true.
    fields["answerable"] = (StrictBool, ...)
    return create_model("Labels", __config__=ConfigDict(extra="forbid"), **fields)
