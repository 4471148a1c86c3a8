"""`synpo ask`: two models of a home answer the same prompts, side by side, and its judge says which answer it prefers."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import PrivateAttr
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from resources.common.text import visible
from resources.generation.language_model import LanguageModel
from resources.judging.judge_choice import judge_scorer
from resources.models.context import ModelContext
from resources.models.device import DeviceResource
from resources.scoring.scorer import RewardScorer
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import opened_atomically
from resources.storage.output_files import refuse_existing, writing
from resources.storage.row_files import table_rows
from synpo_assets.graph.metrics import judge_doubt
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.services import Services
from synpo_assets.method.chat_rows import unwritable
from synpo_assets.method.cut import whole_answers
from synpo_assets.method.ids import content_id
from synpo_assets.method.outcomes import outcomes
from synpo_assets.method.templates import user_message

# The assets whose checkpoints answer prompts.
ANSWERING = ("initial_policy", "model_checkpoint", "equal_steps_checkpoint")
FEWEST_SHA_DIGITS = 6
# By the outcome of the second answer.
PREFERS = {"win": "second", "tie": "tie", "loss": "first"}


class _Keeping(DeviceResource):
    """Keeps the models that it has loaded: in a conversation, each would be loaded for every question."""

    _kept: dict[str, Any] = PrivateAttr(default_factory=dict)

    def opened(self, checkpoint: Checkpoint) -> Any:
        if checkpoint.sha not in self._kept:
            self._kept[checkpoint.sha] = super().opened(checkpoint)  # type: ignore[misc]
        return self._kept[checkpoint.sha]


class _KeepingModel(_Keeping, LanguageModel):
    """M_0 and M_t."""


class _KeepingScorer(_Keeping, RewardScorer):
    """The judge."""


def ask(
    services: Services,
    prompt: str | None,
    models: str | None,
    file: Path | None,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Answers one prompt, those of a file, or those that are typed until the input ends."""
    prompts = _prompts(prompt, file, output, overwrite)
    pair = _two_models(services, models)
    answered = _answerer(services, pair, is_kept=not prompts)
    contexts = {each.label: ModelContext(each.weights, services.settings.engine.trust_remote_code) for each in pair}
    console = Console(highlight=False, markup=False)
    for place, text in prompts:
        _refuse_unusable(services, contexts, text, place)
    if prompts:
        rows = answered([text for _, text in prompts])
        if output is None:
            for row in rows:
                _show(console, row)
            return
        with writing(output), opened_atomically(output) as opened:
            opened.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        console.print(f"{len(rows)} prompts with two answers each: {output}")
        return
    console.print(f"{pair[0].label} and {pair[1].label} answer. An empty line ends the conversation.")
    for text in _typed():
        try:
            _refuse_unusable(services, contexts, text, "This prompt")
        except SettingsError as error:
            console.print(str(error))
            continue
        _show(console, answered([text])[0])


def _prompts(prompt: str | None, file: Path | None, output: Path | None, overwrite: bool) -> list[tuple[str, str]]:
    """The prompts that are stated, each with what a sentence calls it; none if they are to be typed."""
    if prompt is not None and file is not None:
        raise SettingsError("Give a prompt or --file, not both.")
    if output is not None:
        if file is None:
            raise SettingsError(
                "--output holds the answers to the prompts of --file: name such a file, or leave it out."
            )
        if output.suffix != ".jsonl" or output.is_dir():
            raise SettingsError(f"--output {output} is no .jsonl file: name one.")
        refuse_existing(output, overwrite)
    if file is None:
        return [] if prompt is None else [("The prompt", prompt)]
    found = []
    for line, row in table_rows(file, "--file", "prompts"):
        if "prompt" not in row:
            raise SettingsError(
                f"{file} (--file) has no column `prompt` in line {line}; it has {', '.join(map(repr, row))}."
            )
        if not isinstance(row["prompt"], str):
            raise SettingsError(
                f"{file} (--file) has a `prompt` in line {line} that is no text: write one question as text."
            )
        found.append((f"{file} (--file): the prompt in line {line}", row["prompt"]))
    return found


def _two_models(services: Services, models: str | None) -> tuple[Checkpoint, Checkpoint]:
    store, settings = services.checkpoints, services.settings
    keys = [partition_key(number) for number in range(1, settings.max_iterations + 1)]
    finished = [key for key in keys if store.manifest("model_checkpoint", key)]
    if store.manifest("initial_policy", None) is None or not (finished or models):
        raise SettingsError("This home has no finished M_t yet: make an iteration with `synpo run` first.")
    names = [name.strip() for name in models.split(",")] if models else ["0", str(int(finished[-1]))]
    if len(names) != 2:
        raise SettingsError(f"--models {models} names {len(names)} models: name two, such as 0,2 for M_0 and M_2.")
    first, second = (_model(services, name, finished) for name in names)
    if first.sha == second.sha:
        raise SettingsError(f"--models {models or ','.join(names)} names the same model twice: {first.label}.")
    for model in (first, second):
        # What damaged weights write would be kept as the answers of whole ones.
        store.verify(model)
    return first, second


def _model(services: Services, name: str, finished: Sequence[str]) -> Checkpoint:
    """A model by its iteration, 0 for M_0, or by the beginning of its sha."""
    store = services.checkpoints
    if name.isascii() and name.isdecimal() and len(name) < FEWEST_SHA_DIGITS:
        if int(name) == 0:
            return store.current("initial_policy", None)
        if partition_key(int(name)) not in finished:
            made = ", ".join(str(int(key)) for key in finished) or "none"
            raise SettingsError(f"--models: there is no M_{int(name)} in this home; finished iterations: {made}.")
        return store.current("model_checkpoint", partition_key(int(name)))
    if len(name) < FEWEST_SHA_DIGITS or not name.isalnum():
        raise SettingsError(
            f"--models: {name!r} is neither an iteration nor {FEWEST_SHA_DIGITS} or more digits of the sha of a checkpoint."
        )
    found = [each for asset in ANSWERING for each in store.with_sha(asset, name.lower())]
    by_sha = {each.sha: each for each in found}
    if len(by_sha) != 1:
        many = f"{len(by_sha)} checkpoints have" if by_sha else "no checkpoint that answers has"
        raise SettingsError(
            f"--models: {many} a sha that begins with {name!r}: `synpo trace` and the page of a checkpoint show shas."
        )
    return next(iter(by_sha.values()))


def _refuse_unusable(services: Services, contexts: Mapping[str, ModelContext], prompt: str, called: str) -> None:
    if not prompt.strip():
        raise SettingsError(f"{called} is empty: write a question.")
    if problem := unwritable(prompt):
        raise SettingsError(f"{called} {problem}: leave it out.")
    room = services.settings.evaluation.sampling.max_new_tokens
    for label, context in contexts.items():
        if context.length is not None and (asked := context.tokens(user_message(prompt))) + room > context.length:
            raise SettingsError(
                f"{called} has {asked} tokens, and with evaluation.sampling.max_new_tokens = {room} that is more than the context "
                f"of {label} holds ({context.length}): shorten it."
            )


def _answerer(
    services: Services, pair: tuple[Checkpoint, Checkpoint], is_kept: bool
) -> Callable[[Sequence[str]], list[dict[str, Any]]]:
    """What answers prompts with both models and has the judge compare the answers, if this home has a judge."""
    settings, language_model = services.settings, services.language_model
    judge = judge_scorer(settings.judge, services.scorer)
    if is_kept:
        # vLLM has a process of its own for each call, which would load the model again.
        in_process = {} if settings.engine.server else {"kind": "transformers", "ray": None}
        engine = settings.engine.model_copy(update=in_process)
        language_model = _KeepingModel(**dict(language_model) | {"engine": engine})
        judge = _KeepingScorer(**dict(judge))
    has_judge = services.checkpoints.manifest("judge_model", None) is not None
    judge_model = services.checkpoints.current("judge_model", None) if has_judge else None
    if judge_model is not None:
        services.checkpoints.verify(judge_model)
    doubt = judge_doubt(services.metrics)

    def answered(prompts: Sequence[str]) -> list[dict[str, Any]]:
        requests = [(content_id("prompt", prompt), user_message(prompt)) for prompt in prompts]
        rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
        compared, is_left = [], pl.repeat(True, len(prompts), eager=True)
        for name, checkpoint in zip(("first", "second"), pair, strict=True):
            written, _ = language_model.answer(checkpoint, requests, settings.evaluation.sampling)
            compared.append(whole_answers(written))
            is_left &= (written["finish_reason"] != "length") | (compared[-1] != "")
            texts = written["text"].str.strip_chars()
            for row, text, reason in zip(rows, texts, written["finish_reason"], strict=True):
                row[name] = {"model": checkpoint.label, "sha": checkpoint.sha, "answer": text, "finish_reason": reason}
        if judge_model is None:
            return rows
        margins = judge.compare(judge_model, list(zip(prompts, *compared, strict=True)), judging=True).margins
        # Of a cut answer there may be nothing left to compare.
        margins = pl.select(pl.when(is_left).then(margins)).to_series()
        for row, margin, outcome in zip(rows, margins, outcomes(-margins), strict=True):
            row["judge"] = {"prefers": PREFERS.get(outcome), "margin": margin, "doubt": doubt}
        return rows

    return answered


def _typed() -> Iterator[str]:
    """Lines of the terminal until an empty one, or the end of what is piped in."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _show(console: Console, row: dict[str, Any]) -> None:
    console.print(Text(visible(row["prompt"]), style="bold"))
    width = max(20, (console.width - 1) // 2)
    console.print(Columns([_panel(row[name], width) for name in ("first", "second")], padding=(0, 0)))
    if judge := row.get("judge"):
        said = {"first": row["first"]["model"], "second": row["second"]["model"], "tie": "neither", None: "no verdict"}
        margin = "" if judge["margin"] is None else f" (margin {judge['margin']:.3f})"
        console.print(f"The judge prefers: {said[judge['prefers']]}{margin}.")
        if judge["doubt"]:
            console.print(judge["doubt"])


def _panel(answer: dict[str, Any], width: int) -> Panel:
    cut = "" if answer["finish_reason"] == "stop" else " (cut)"
    return Panel(Text(visible(answer["answer"])), title=f"{answer['model']}{cut}", width=width)
