"""Benchmarks: lm-eval's tasks, and answers in the forms that AlpacaEval 2, Arena-Hard and MT-Bench are judged in.

Paper (section 3): all of these in each iteration, with GPT-4 Turbo as the judge. Here: opt-in. No job, no sensor and no
`synpo run` makes these assets. The tasks and their shots are the paper's, but the names of its six further tasks are inferred. As
on the leaderboard, no chat template is applied to them. M_0 stands beside M_t everywhere; its part is done once for all
iterations. Nothing is judged here: the answers go to the official judges, which ask models behind an API. The paper says how it
decodes for AlpacaEval 2 only; the other two are decoded as their own code does. Question files are named in the settings and
never fetched.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg
import polars as pl

from resources.generation.language_model import Usage
from resources.models.evaluation_harness import open_tasks, read_questions
from resources.settings.evaluation import TASK_PRESETS, Benchmarks
from resources.settings.method import Sampling
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import json_sha256, replace_directory, temporary_directory_beside
from resources.storage.tables import table_metadata
from synpo_assets.graph import metrics
from synpo_assets.graph.evaluation_schemas import BenchmarkScores
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output, written_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.benchmarks import (
    MT_BENCH_TEMPERATURE,
    MT_BENCH_TEMPERATURES,
    QUESTION_FIELDS,
    answer_row,
    asked_turns,
    conversation,
    leaderboard_average,
    question_problem,
    score_rows,
)

# Where the judge of each benchmark looks for the answers of a model, and under which name.
PLACES = {
    "alpaca_eval": "alpaca_eval/{}.json",
    "arena_hard": "arena_hard/model_answer/{}.jsonl",
    "mt_bench": "mt_bench/model_answer/{}.jsonl",
}
SHOWN_QUESTIONS = 2
LEADERBOARD_SHOTS = TASK_PRESETS["open_llm_leaderboard"]
Answers = list[list[str]]


def answer_samplings(options: Benchmarks) -> list[Sampling]:
    """Every way in which questions of the settings may be answered."""
    rows = [{"category": category} for category in (*MT_BENCH_TEMPERATURES, "any other")]
    return [_sampling(benchmark, row, options) for benchmark in _question_files(options) for row in rows]


@Stage(
    BenchmarkScores,
    group="evaluation",
    work=("scores",),
    opt_in=True,
    needs=lambda settings: None if settings.benchmarks.tasks else "Name lm-eval's tasks in `benchmarks.tasks`.",
    reads=("benchmarks.tasks", "benchmarks.task_folder", "benchmarks.limit"),
)
def benchmark_scores(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    initial_policy: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """M_t compared with M_0 on the tasks of `benchmarks.tasks`, as lm-eval measures them.

    `scores` has M_t and M_0 in one row. A difference smaller than about two standard errors says nothing.
    """
    options = services.settings.benchmarks
    manager, started = open_tasks(options, services.settings.engine.trust_remote_code), time.monotonic()
    candidate, initial = (
        [row for task, scores in services.harness.evaluate(model, manager, options)
         for row in score_rows(task.name, task.shots, scores)]
        for model in (model_checkpoint, initial_policy)
    )  # fmt: skip
    frame = _compared(candidate, initial).with_columns(
        checkpoint_sha=pl.lit(model_checkpoint.sha),
        initial_checkpoint_sha=pl.lit(initial_policy.sha),
        iteration=pl.lit(iteration_of(context), pl.Int64),
    )
    averages = [
        Metric("leaderboard_average", leaderboard_average(rows, LEADERBOARD_SHOTS), of=name, checkpoint_sha=model.sha)
        for name, rows, model in (
            ("candidate", candidate, model_checkpoint), ("initial", initial, initial_policy),
        )
    ]  # fmt: skip
    seconds = Metric("scoring_seconds", round(time.monotonic() - started, 1))
    scores = table_metadata(frame.drop("checkpoint_sha", "initial_checkpoint_sha", "iteration"))
    shown = {"scores": scores, "limit": options.limit, **made_by(model_checkpoint)}
    return table_output(context, services, frame, [*averages, seconds], **shown)


def _needed_files(settings: Settings) -> str | None:
    named = " or ".join(f"`benchmarks.{name}`" for name in QUESTION_FIELDS)
    return None if _question_files(settings.benchmarks) else f"Name a question file in {named}."


@Stage(
    group="evaluation",
    work=("generates",),
    opt_in=True,
    needs=_needed_files,
    reads=(
        *(f"benchmarks.{name}" for name in QUESTION_FIELDS), "benchmarks.alpaca_eval_sampling",
        "benchmarks.arena_hard_sampling", "benchmarks.mt_bench_max_new_tokens",
    ),
    samplings=lambda settings: answer_samplings(settings.benchmarks),
)  # fmt: skip
def benchmark_answers(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    initial_policy: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.MaterializeResult:
    """M_t's and M_0's answers to AlpacaEval 2, Arena-Hard and MT-Bench, as files for the official judges.

    Nothing is judged here: give the files to the benchmarks' own judges.
    """
    options = services.settings.benchmarks
    questions = questions_of(options)
    models = {f"synpo-iteration-{iteration_of(context)}": model_checkpoint, "synpo-initial": initial_policy}
    models = {f"{name}-{model.sha[:8]}": model for name, model in models.items()}
    answers: dict[tuple[str, str], Answers] = {}
    usages: list[Usage] = []
    for model_name, model in models.items():
        for benchmark, rows in questions.items():
            answer = functools.partial(services.language_model.answer, model)
            written, used = _answers(answer, benchmark, rows, options)
            answers[benchmark, model_name] = written
            usages += used
    count, shown = _write(context, services, questions, answers)
    measured = [Metric("answers_written", count), *metrics.generating(*usages)]
    version = json_sha256([*answers.values()])[:16]
    return written_output(context, services, version, measured, **shown, **made_by(model_checkpoint))


def questions_of(options: Benchmarks) -> dict[str, list[dict[str, Any]]]:
    """The questions of each benchmark whose question file the settings name."""
    return {
        name: read_questions(file, f"benchmarks.{name}", functools.partial(question_problem, name))
        for name, file in _question_files(options).items()
    }


def _compared(candidate: list[dict[str, Any]], initial: list[dict[str, Any]]) -> pl.DataFrame:
    """The scores of M_t, each with that of M_0 in the same row."""
    ours, theirs = (
        pl.DataFrame(rows, schema_overrides={"value": pl.Float64, "stderr": pl.Float64})
        for rows in (candidate, initial)
    )
    keys = ["task", "shots", "metric", "filter"]
    return ours.join(theirs.drop("questions"), on=keys, suffix="_initial", maintain_order="left")


def _question_files(options: Benchmarks) -> dict[str, str]:
    return {benchmark: file for benchmark in QUESTION_FIELDS if (file := getattr(options, benchmark))}


def _sampling(benchmark: str, row: Mapping[str, Any], options: Benchmarks) -> Sampling:
    if benchmark == "mt_bench":
        temperature = MT_BENCH_TEMPERATURES.get(row["category"], MT_BENCH_TEMPERATURE)
        return Sampling(temperature=temperature, max_new_tokens=options.mt_bench_max_new_tokens)
    return options.alpaca_eval_sampling if benchmark == "alpaca_eval" else options.arena_hard_sampling


def _answers(
    answer: Callable[..., tuple[pl.DataFrame, Usage]], benchmark: str, rows: list[dict[str, Any]], options: Benchmarks
) -> tuple[Answers, list[Usage]]:
    """The answers to all turns of each question, and what they cost; a later turn sees the answers to those before it."""
    turns = [asked_turns(benchmark, row) for row in rows]
    samplings = [_sampling(benchmark, row, options) for row in rows]
    answers: Answers = [[] for _ in rows]
    usages = []
    for turn in range(max(map(len, turns))):
        # Within a benchmark, samplings differ in nothing but the temperature.
        for temperature, sampling in {each.temperature: each for each in samplings}.items():
            alike = [place for place, each in enumerate(samplings) if each.temperature == temperature]
            places = [place for place in alike if len(turns[place]) > turn]
            chats = [(benchmark, conversation(turns[place], answers[place])) for place in places]
            frame, usage = answer(chats, sampling)
            usages.append(usage)
            for place, text in zip(places, frame["text"], strict=True):
                answers[place].append(text.strip())
    return answers, usages


def _write(
    context: dg.AssetExecutionContext,
    services: Services,
    questions: Mapping[str, list[dict[str, Any]]],
    answers: Mapping[tuple[str, str], Answers],
) -> tuple[int, dict[str, Any]]:
    """Writes the files of an iteration into the home, in place of earlier ones, whole or not at all; what was written."""
    place, now = services.home / "benchmarks" / context.partition_key, time.time()
    files, sample = list[dict[str, Any]](), list[dict[str, Any]]()
    with temporary_directory_beside(place) as temporary:
        for (benchmark, model), own in answers.items():
            file = temporary / PLACES[benchmark].format(model)
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                answer_row(benchmark, question, turns, model, now)
                for question, turns in zip(questions[benchmark], own, strict=True)
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.write_text(
                json.dumps(rows, indent=2, ensure_ascii=False) if file.suffix == ".json" else lines, "utf-8"
            )
            files.append({"file": str(file.relative_to(temporary)), "answers": len(rows), "bytes": file.stat().st_size})
            sample += [
                {"benchmark": benchmark, "model": model, "turns": asked_turns(benchmark, question), "answers": turns}
                for question, turns in zip(questions[benchmark][:SHOWN_QUESTIONS], own, strict=False)
            ]
        replace_directory(temporary, place)
    context.log.info(f"{place}: {', '.join(str(entry['file']) for entry in files)}")
    tables = {"files": table_metadata(pl.DataFrame(files)), "sample": table_metadata(pl.DataFrame(sample))}
    return sum(entry["answers"] for entry in files), {"path": dg.MetadataValue.path(place), **tables}
