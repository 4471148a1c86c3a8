"""Benchmarks: what lm-eval found as rows of a table, and answers in the forms that the official judges read.

Paper (section 3): the Open LLM leaderboard and six more tasks with lm-eval; AlpacaEval 2, Arena-Hard and MT-Bench. Here: pure
functions, one per form. Questions are rows of the benchmarks' own question files.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from synpo_assets.method.chat_rows import unwritable
from synpo_assets.method.ids import content_id

Row = dict[str, Any]

# The metric, and lm-eval's filter, that the Open LLM leaderboard averages over.
LEADERBOARD = {
    "arc_challenge": ("acc_norm", "none"),
    "hellaswag": ("acc_norm", "none"),
    "truthfulqa_mc2": ("acc", "none"),
    "mmlu": ("acc", "none"),
    "winogrande": ("acc", "none"),
    "gsm8k": ("exact_match", "strict-match"),
}
# What a question must hold, by benchmark.
QUESTION_FIELDS = {
    "alpaca_eval": ("instruction",),
    "arena_hard": ("uid", "prompt"),
    "mt_bench": ("question_id", "category", "turns"),
}
# The field that tells questions apart, and by which a judge looks up the answer.
QUESTION_IDS = {"arena_hard": "uid", "mt_bench": "question_id"}
# https://github.com/lm-sys/FastChat/blob/main/fastchat/llm_judge/common.py: the temperature of a category, 0.7 of any other.
MT_BENCH_TEMPERATURES = dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0) | {
    "stem": 0.1,
    "humanities": 0.1,
}
MT_BENCH_TEMPERATURE = 0.7


def score_rows(task: str, shots: int, output: Mapping[str, Any]) -> list[Row]:
    """The figures of a task or group of tasks, one row per metric and filter, from lm-eval's `results` and `n-samples`.

    What a group consists of is left out where lm-eval sums it up.

    Examples:
        >>> score_rows("sums", 5, {
        ...     "results": {"sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1}},
        ...     "n-samples": {"sums": {"original": 8, "effective": 4}},
        ... })  # doctest: +NORMALIZE_WHITESPACE
        [{'task': 'sums', 'shots': 5, 'metric': 'acc', 'filter': 'none', 'questions': 4, 'value': 0.5, 'stderr': 0.1}]
    """
    counts = {name: each["effective"] for name, each in output["n-samples"].items()}
    rows: list[Row] = []
    for name, figures in output["results"].items():
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, Real):
                error = figures.get(f"{metric}_stderr,{chosen}")
                rows.append({
                    "task": name,
                    "shots": shots,
                    "metric": metric,
                    "filter": chosen,
                    "questions": counts.get(name) or sum(counts.values()),
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, Real) else None,
                })  # fmt: skip
    return [row for row in rows if row["task"] == task] or rows


def leaderboard_average(rows: Iterable[Mapping[str, Any]], shots: Mapping[str, int]) -> float | None:
    """The mean over the six tasks of the Open LLM leaderboard; None unless each is there once with its number of shots.

    Rows of other tasks, or with other shots, do not count.

    Examples:
        >>> rows = [{"task": task, "shots": 5, "metric": metric, "filter": chosen, "value": 0.5}
        ...         for task, (metric, chosen) in LEADERBOARD.items()]
        >>> shots = dict.fromkeys(LEADERBOARD, 5)
        >>> leaderboard_average(rows, shots), leaderboard_average([*rows[1:], rows[1]], shots)
        (0.5, None)
    """
    values = [
        (row["task"], row["value"])
        for row in rows
        if LEADERBOARD.get(row["task"]) == (row["metric"], row["filter"]) and row["shots"] == shots[row["task"]]
    ]
    if sorted(task for task, _ in values) != sorted(LEADERBOARD):
        return None
    return sum(value for _, value in values) / len(values)


def question_problem(benchmark: str, row: object, earlier: Iterable[Mapping[str, Any]] = ()) -> str | None:
    """What is wrong with a row of a question file, to follow the words `row 3`; None if nothing is.

    Examples:
        >>> question_problem("alpaca_eval", {"prompt": "Why?"})
        'has no `instruction`'
        >>> question_problem("mt_bench", {"question_id": 81, "category": "math", "turns": "Why?"})
        'has `turns` that are not a list of texts'
        >>> question_problem("arena_hard", {"uid": "1f", "prompt": "Why?"}, [{"uid": "1f", "prompt": "How?"}])
        "has the `uid` '1f' of an earlier row"
    """
    if not isinstance(row, dict) or not row:
        return "is no JSON object in UTF-8"
    for field in QUESTION_FIELDS[benchmark]:
        if problem := _field_problem(field, row.get(field)):
            return problem
    name = QUESTION_IDS.get(benchmark)
    if name and any(row[name] == other[name] for other in earlier):
        return f"has the `{name}` {row[name]!r} of an earlier row"
    return None


def asked_turns(benchmark: str, question: Mapping[str, Any]) -> list[str]:
    """What is asked, turn by turn.

    Examples:
        >>> asked_turns("alpaca_eval", {"instruction": "Why?"})
        ['Why?']
    """
    if benchmark == "mt_bench":
        return list(question["turns"])
    return [question["instruction" if benchmark == "alpaca_eval" else "prompt"]]


def conversation(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """The chat that leads to the next answer: the turns so far, each but the last with its answer.

    Examples:
        >>> [message["content"] for message in conversation(["Why?", "Shorter!", "Again!"], ["Because of it."])]
        ['Why?', 'Because of it.', 'Shorter!']
    """
    messages = []
    for turn, answer in zip(turns, answers, strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": turns[len(answers)]}]


def answer_row(benchmark: str, question: Mapping[str, Any], answers: Sequence[str], model: str, seconds: float) -> Row:
    """The answers to the turns of a question in the form of a benchmark; `seconds` since 1970 say when it was answered."""
    if benchmark == "alpaca_eval":
        return alpaca_eval_row(question, answers[0], model)
    if benchmark == "arena_hard":
        return arena_hard_row(question, answers[0], model, seconds)
    return mt_bench_row(question, answers, model, seconds)


def alpaca_eval_row(question: Mapping[str, Any], answer: str, model: str) -> Row:
    """An element of AlpacaEval's `model_outputs`: dataset and split go along where the question names them.

    Source: https://github.com/tatsu-lab/alpaca_eval#evaluating-a-model.

    Examples:
        >>> alpaca_eval_row({"instruction": "Why?", "dataset": "koala", "output": "Its own."}, "Because.", "m")
        {'instruction': 'Why?', 'output': 'Because.', 'generator': 'm', 'dataset': 'koala'}
    """
    origin = {name: question[name] for name in ("dataset", "datasplit") if name in question}
    return {"instruction": question["instruction"], "output": answer, "generator": model, **origin}


def arena_hard_row(question: Mapping[str, Any], answer: str, model: str, seconds: float) -> Row:
    """A line of Arena-Hard's `model_answer`, the same for questions of v0.1 and v2.0.

    Source: https://github.com/lmarena/arena-hard-auto, `gen_answer.py`. Its `metadata`, which only style control reads,
    counts tokens with GPT-4o's tokenizer; its own `utils/add_markdown_info.py` adds them to a finished file.

    Examples:
        >>> row = arena_hard_row({"uid": "1f", "prompt": "Why?"}, "Because.", "m", 0.0)
        >>> row["uid"], row["model"], row["messages"][-1]
        ('1f', 'm', {'role': 'assistant', 'content': {'answer': 'Because.'}})
    """
    return {
        "uid": question["uid"],
        "ans_id": content_id("answer", model, question["uid"], answer),
        "model": model,
        "messages": [
            {"role": "user", "content": question["prompt"]},
            {"role": "assistant", "content": {"answer": answer}},
        ],
        "tstamp": seconds,
    }


def mt_bench_row(question: Mapping[str, Any], answers: Sequence[str], model: str, seconds: float) -> Row:
    """A line of MT-Bench's `model_answer`, with one choice: the answers to all turns.

    Source: https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge, `gen_model_answer.py`.

    Examples:
        >>> row = mt_bench_row({"question_id": 81}, ["Because.", "So."], "m", 0.0)
        >>> row["question_id"], row["choices"]
        (81, [{'index': 0, 'turns': ['Because.', 'So.']}])
    """
    return {
        "question_id": question["question_id"],
        "answer_id": content_id("answer", model, question["question_id"], *answers),
        "model_id": model,
        "choices": [{"index": 0, "turns": list(answers)}],
        "tstamp": seconds,
    }


def _field_problem(field: str, value: object) -> str | None:
    if value in (None, "", []):
        return f"has no `{field}`"
    if field == "turns":
        if not (isinstance(value, list) and all(isinstance(turn, str) for turn in value)):
            return "has `turns` that are not a list of texts"
        if problem := next(filter(None, map(unwritable, value)), None):
            return f"has `turns` of which one {problem}"
        return None if all(turn.strip() for turn in value) else "has a blank text among its `turns`"
    if field in QUESTION_IDS.values() and type(value) is int:
        return None
    if not isinstance(value, str):
        return f"has a `{field}` that is not a text"
    if problem := unwritable(value):
        return f"has a `{field}` that {problem}"
    return None if value.strip() else f"has a blank `{field}`"
