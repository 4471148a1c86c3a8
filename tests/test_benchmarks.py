"""Benchmarks: that lm-eval runs offline and counts rightly, what the answer files hold, and what is refused before a model."""

import dataclasses
import json
import socket
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from definitions import build
from resources.common.errors import FinalError
from resources.generation.language_model import LanguageModel
from resources.models.evaluation_harness import open_tasks
from resources.settings.evaluation import Benchmarks
from resources.settings.files import load_settings
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from synpo_assets.cli.preflight import check_data_and_training
from synpo_assets.evaluation.benchmarks import LEADERBOARD_SHOTS, answer_samplings, benchmark_answers, benchmark_scores
from synpo_assets.graph.metrics import recorded
from synpo_assets.method.benchmarks import LEADERBOARD, conversation, leaderboard_average
from tests.nano import nano_settings, write_settings
from tests.stand_ins import ITERATIONS, run, services_in, shown

CHOICES = [
    {"question": "Which of them is blue?", "choices": ["the sky", "a lemon", "grass"], "answer": 0},
    {"question": "Which of them is sour?", "choices": ["the sky", "a lemon", "grass"], "answer": 1},
    {"question": "Which of them barks?", "choices": ["a cat", "a cow", "a dog"], "answer": 2},
    {"question": "Which of them is green?", "choices": ["the sky", "a lemon", "grass"], "answer": 2},
]
CHOICE_TASK = """
task: things
dataset_path: json
dataset_kwargs: {data_files: {test: things.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATION_TASK = r"""
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "Q: {{question}}\nA:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
SUMS = [{"question": "one and one?", "answer": "two"}, {"question": "two and two?", "answer": "four"}]
ALPACA = [{"dataset": "koala", "instruction": "Why is the sky blue?", "output": "Rayleigh.", "generator": "reference"}]
ARENA = [{"uid": "1f", "category": "hard_prompt", "prompt": "Write a program."}]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a blog post.", "Shorter!"]},
    {"question_id": 111, "category": "math", "turns": ["What is one and one?", "And two?"]},
]


def json_lines(rows):
    # A line separator inside of a text is no end of a line.
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """Task files and question files beside a settings file."""
    (tmp_path / "tasks").mkdir()
    for name, content in {
        "tasks/things.yaml": CHOICE_TASK,
        "tasks/things.jsonl": json_lines(CHOICES),
        "tasks/sums.yaml": GENERATION_TASK,
        "tasks/sums.jsonl": json_lines(SUMS),
        "alpaca.json": json.dumps(ALPACA),
        "arena.jsonl": json_lines([ARENA[0] | {"prompt": "Write a\u2028program."}]),
        "mt_bench.jsonl": json_lines(MT_BENCH),
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


@pytest.fixture
def make(folder, adapted_checkpoint, nano_model):
    """Materializes one of the two assets of iteration 1 with settings of the section `benchmarks`."""
    store = CheckpointStore(str(Path(adapted_checkpoint.directory).parents[2]))

    def made(stage, **options):
        settings = load_settings(
            write_settings(folder / "mine.yaml", nano_settings(nano_model) | {"benchmarks": options})
        )
        services = dataclasses.replace(
            services_in(folder, settings), checkpoints=store, language_model=language_model(folder)
        )
        models = [dg.AssetSpec("initial_policy"), dg.AssetSpec("model_checkpoint", partitions_def=ITERATIONS)]
        sources = [model.with_io_manager_key("checkpoints") for model in models]
        with dg.DagsterInstance.ephemeral() as instance:
            run([stage, *sources], instance, services, "0001")
            return shown(instance, stage.name, "0001"), recorded(services.metrics, "0001")

    return made


def language_model(folder):
    return LanguageModel(
        shards=str(folder / "shards"), engine=Engine(threads=1, shard_rows=4, dtype="float32"), random_seed=7
    )


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_arguments):
        raise AssertionError("it tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def no_model(monkeypatch):
    """Whatever loads a model fails the test."""
    import transformers

    def refuse(*_arguments, **_options):
        # Not to be tried again.
        raise FinalError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


def likeliest_is_right(weights, questions):
    """The share of the questions whose right choice is the likeliest, worked out from the logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(weights), AutoTokenizer.from_pretrained(weights)
    hits = []
    for row in questions:
        sums = []
        for choice in row["choices"]:
            asked = tokenizer(row["question"], add_special_tokens=False).input_ids
            whole = tokenizer(f"{row['question']} {choice}", add_special_tokens=False).input_ids
            with torch.inference_mode():
                steps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(steps[place - 1, whole[place]]) for place in range(len(asked), len(whole))))
        hits.append(sums.index(max(sums)) == row["answer"])
    return sum(hits) / len(hits)


TASKS = [{"name": "things", "shots": 0}, {"name": "sums", "shots": 1}]


@pytest.mark.slow
def test_local_tasks_run_offline_and_their_figures_are_right(
    make, folder, adapted_checkpoint, nano_model, offline, request
):
    pytest.importorskip("lm_eval")
    options = {"tasks": TASKS, "task_folder": "tasks", "batch_size": 2, "limit": 3}
    about, measured = make(benchmark_scores, **options)
    frame = pl.read_parquet(folder / "tables" / "benchmark_scores" / "0001.parquet")
    assert frame.select("task", "shots", "metric", "filter", "questions").rows() == [
        ("things", 0, "acc", "none", 3), ("sums", 1, "exact_match", "none", 2),
    ]  # fmt: skip
    assert frame["value"][0] == likeliest_is_right(adapted_checkpoint.weights, CHOICES[:3])
    assert frame["value_initial"][0] == likeliest_is_right(nano_model, CHOICES[:3])
    assert frame["stderr"].is_not_null().all()
    assert set(frame["checkpoint_sha"]) == {adapted_checkpoint.sha}
    assert about["checkpoint"] == "model_checkpoint[0001]"
    averages = [(each.of, each.value) for each in measured.every("leaderboard_average")]
    assert averages == [("candidate", None), ("initial", None)]

    request.getfixturevalue("no_model")
    again, _ = make(benchmark_scores, **options)
    assert again["scores"].records == about["scores"].records, "what was found is kept"
    fewer, _ = make(benchmark_scores, **options | {"tasks": TASKS[1:]})
    assert fewer["scores"].records == about["scores"].records[1:]
    (folder / "tasks" / "things.jsonl").write_text(json_lines(reversed(CHOICES)))
    with pytest.raises(FinalError, match="a model was loaded"):
        make(benchmark_scores, **options)


def test_the_leaderboards_average_is_of_its_six_tasks_with_its_shots():
    def rows(**shots):
        return [
            {
                "task": task,
                "shots": shown,
                "metric": LEADERBOARD[task][0],
                "filter": LEADERBOARD[task][1],
                "value": value,
            }
            for value, (task, shown) in enumerate(shots.items())
        ]

    six = rows(**LEADERBOARD_SHOTS)
    assert leaderboard_average(six, LEADERBOARD_SHOTS) == 2.5
    without_mmlu = [row for row in six if row["task"] != "mmlu"]
    assert leaderboard_average([*without_mmlu, *rows(arc_challenge=0)], LEADERBOARD_SHOTS) is None
    assert leaderboard_average([*without_mmlu, *rows(arc_challenge=25)], LEADERBOARD_SHOTS) is None
    assert leaderboard_average(rows(**dict.fromkeys(LEADERBOARD, 0)), LEADERBOARD_SHOTS) is None
    assert leaderboard_average([*six, *rows(mmlu=5)], LEADERBOARD_SHOTS) is None, "mmlu would count twice"
    assert leaderboard_average([*six, *rows(arc_challenge=0)], LEADERBOARD_SHOTS) == 2.5, "another measurement"


def test_answers_have_the_forms_that_the_judges_read(make, folder, adapted_checkpoint):
    sampling = {"temperature": 0.7, "max_new_tokens": 12}
    options = {
        "alpaca_eval": "alpaca.json", "alpaca_eval_sampling": sampling, "arena_hard": "arena.jsonl",
        "arena_hard_sampling": sampling | {"temperature": 0.0}, "mt_bench": "mt_bench.jsonl", "mt_bench_max_new_tokens": 10,
    }  # fmt: skip
    stale = folder / "benchmarks" / "0001" / "mt_bench" / "model_answer" / "an-earlier-model.jsonl"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    about, measured = make(benchmark_answers, **options)
    name = f"synpo-iteration-1-{adapted_checkpoint.sha[:8]}"
    home = folder / "benchmarks" / "0001"
    listed = sorted(record.data["file"] for record in about["files"].records)
    assert listed == sorted(file.relative_to(home).as_posix() for file in home.rglob("*.json*"))
    assert len(listed) == 6, "M_0's stand beside those of M_t"
    assert measured.find("reused_completions").n == 2 * (1 + 1 + 2 * 2)
    assert measured.value("answers_written") == sum(record.data["answers"] for record in about["files"].records)

    (alpaca,) = json.loads((home / "alpaca_eval" / f"{name}.json").read_text())
    assert set(alpaca) == {"instruction", "output", "generator", "dataset"}
    assert (alpaca["instruction"], alpaca["generator"], alpaca["dataset"]) == (ALPACA[0]["instruction"], name, "koala")

    (arena,) = map(json.loads, (home / "arena_hard" / "model_answer" / f"{name}.jsonl").read_text().split("\n")[:-1])
    assert set(arena) == {"uid", "ans_id", "model", "messages", "tstamp"}
    assert arena["messages"][0] == {"role": "user", "content": "Write a\u2028program."}
    assert set(arena["messages"][1]["content"]) == {"answer"}

    rows = list(map(json.loads, (home / "mt_bench" / "model_answer" / f"{name}.jsonl").read_text().splitlines()))
    assert set(rows[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert [row["question_id"] for row in rows] == [81, 111]
    answers = [row["choices"][0]["turns"] for row in rows]
    assert all(len(turns) == 2 for turns in answers)
    # The second answer is the one to a chat that holds the first; category `math` is answered greedily.
    asked = conversation(MT_BENCH[1]["turns"], answers[1][:1])
    greedy = Sampling(temperature=0.0, max_new_tokens=10)
    frame, usage = language_model(folder).answer(adapted_checkpoint, [("mt_bench", asked)], greedy)
    assert frame["text"][0].strip() == answers[1][1]
    assert usage.generated_tokens == 0

    _, again = make(benchmark_answers, **options)
    assert again.value("generated_tokens") == 0, "the shards were not found again"
    settings = load_settings(folder / "mine.yaml").benchmarks
    in_use = {
        language_model(folder).shards_of(adapted_checkpoint, each).folder.name for each in answer_samplings(settings)
    }
    made_for = {file.parent.name for file in (folder / "shards").glob("*/fingerprint.json")
                if json.loads(file.read_text())["made_for"] == "model_checkpoint[0001]"}  # fmt: skip
    assert in_use >= made_for, "`synpo clean` would remove them"


CONFIGURED = {
    "benchmark_scores": ({"tasks": TASKS}, "**Off.** Name lm-eval's tasks in `benchmarks.tasks`."),
    "benchmark_answers": (
        {"mt_bench": "mt_bench.jsonl"},
        "**Off.** Name a question file in `benchmarks.alpaca_eval` or ",
    ),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_what_is_not_configured_stays_in_the_graph_and_nothing_can_make_it(folder, nano_model, name):
    """Made of nothing, it would be green; and a run that asks for all must not fail in a home without benchmarks."""
    stated, off = CONFIGURED[name]
    key = dg.AssetKey(name)
    for benchmarks in ({}, stated):
        settings = nano_settings(nano_model) | {"benchmarks": benchmarks}
        definitions, services = build(load_settings(write_settings(folder / "mine.yaml", settings)), folder)
        graph = services.graph
        node = graph.get(key)
        assert node.description.startswith(off) == (not benchmarks)
        assert (key in graph.materializable_asset_keys) == bool(benchmarks)
        assert node.parent_keys == {dg.AssetKey("initial_policy"), dg.AssetKey("model_checkpoint")}
        assert len(node.check_keys) == (name == "benchmark_answers" and bool(benchmarks))
        job = definitions.resolve_job_def("iteration")
        assert key not in job.asset_layer.executable_asset_keys
        everything = dg.AssetSelection.all().resolve(graph)
        assert (key in everything & graph.materializable_asset_keys) == bool(benchmarks)


def test_a_run_of_all_that_can_be_made_leaves_what_is_not_configured_as_it_was(folder, nano_model):
    @dg.asset(partitions_def=ITERATIONS)
    def model_checkpoint() -> Checkpoint:
        return Checkpoint("model_checkpoint", "0001", "sha", "", "")

    settings = load_settings(write_settings(folder / "mine.yaml", nano_settings(nano_model)))
    stages = [stage.asset(settings, {}, []) for stage in (benchmark_scores, benchmark_answers)]
    definitions = dg.Definitions([dg.AssetSpec("initial_policy"), model_checkpoint, *stages])
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            partition_key="0001", instance=instance
        )
        assert result.success
        assert instance.get_materialized_partitions(dg.AssetKey("model_checkpoint")) == {"0001"}
        for name in CONFIGURED:
            assert instance.get_materialized_partitions(dg.AssetKey(name)) == set()


def test_without_lm_eval_the_extra_is_named(make, no_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FinalError, match=r"benchmarks.tasks needs lm-eval: install the extra `benchmarks`"):
        make(benchmark_scores, tasks=TASKS, task_folder="tasks")


def test_a_folder_without_task_files_is_refused(make, folder, no_model):
    pytest.importorskip("lm_eval")
    (folder / "empty").mkdir()
    with pytest.raises(FinalError, match=r"empty \(benchmarks.task_folder\) holds no .yaml file"):
        make(benchmark_scores, tasks=TASKS, task_folder="empty")
    (folder / "code").mkdir()
    (folder / "code" / "evil.yaml").write_text("task: evil\nprocess_docs: !function evil.run\n")
    with pytest.raises(
        FinalError, match=r"evil.yaml \(benchmarks.task_folder\) runs Python code .* engine.trust_remote_code"
    ):
        make(benchmark_scores, tasks=TASKS, task_folder="code")


RUNS_CODE = {
    "escaped tag": {"evil.yaml": CHOICE_TASK + "process_docs: !%66unction m.f\n"},
    "named tag": {"evil.yaml": "%TAG !e! !func\n---" + CHOICE_TASK + "process_docs: !e!tion m.f\n"},
    "included": {"evil.yaml": CHOICE_TASK + "include: inner.txt\n", "inner.txt": "process_docs: !function m.f\n"},
    "UTF-16": {"evil.yaml": (CHOICE_TASK + "process_docs: !function m.f\n").encode("utf-16")},
    "metric": {"evil.yaml": CHOICE_TASK.replace("metric: acc", "metric: m.py")},
    "metric of a name": {"evil.yaml": CHOICE_TASK.replace("metric: acc", "metric: m"), "m/m.py": "open('ran', 'w')\n"},
    "template": {
        "evil.yaml": CHOICE_TASK.replace(
            "{{question}}", "{{ cycler.__init__.__globals__.os.mkdir('ran') }}{{question}}"
        )
    },
}


@pytest.mark.parametrize("files", RUNS_CODE.values(), ids=RUNS_CODE)
def test_a_task_file_runs_no_code_that_is_not_trusted_however_it_is_written(folder, offline, files):
    pytest.importorskip("lm_eval")
    for name, content in ({"m.py": "open('ran', 'w')\ndef f(rows):\n    return rows\n"} | files).items():
        (folder / "tasks" / name).parent.mkdir(exist_ok=True)
        (folder / "tasks" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "tasks" / "things.yaml").unlink()
    options = Benchmarks(tasks=[TASKS[0]], task_folder=str(folder / "tasks"))
    with pytest.raises(
        FinalError, match=r"\(benchmarks.task_folder\) .*engine.trust_remote_code|cannot be loaded: SecurityError"
    ):
        open_tasks(options, trust_code=False)
    assert not (folder / "tasks" / "ran").exists()


def test_a_template_of_a_task_that_does_not_end_is_stopped(folder, offline, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("resources.models.bounded.CPU_SECONDS", 0.3)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    task = folder / "tasks" / "things.yaml"
    task.write_text(task.read_text().replace("{{question}}", loop + "{{question}}"))
    with pytest.raises(FinalError, match=r"benchmarks.task_folder.* does not end"):
        open_tasks(Benchmarks(tasks=[TASKS[0]], task_folder=str(folder / "tasks")), trust_code=False)


def test_a_task_folder_that_is_trusted_may_run_code_and_all_may_build_on_tasks_of_lm_eval(folder, offline):
    own = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    assert "!function" in own.read_text()
    (folder / "tasks" / "m.py").write_text("open('ran', 'w')\ndef f(rows):\n    return rows\n")
    options = Benchmarks(tasks=[TASKS[0]], task_folder=str(folder / "tasks"))
    splits = "validation_split: null\ntraining_split: null\n"
    for more, trusted in (
        (f"include: {own}\n{splits}process_docs: null\n", False),
        ("process_docs: !function m.f\n", True),
    ):
        (folder / "tasks" / "things.yaml").write_text(CHOICE_TASK + more)
        open_tasks(options, trusted)
        assert (folder / "tasks" / "ran").exists() == trusted


def test_an_unknown_task_is_refused(make, no_model, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    # Reading lm-eval's own thousands of files would take most of the time of all tests here.
    own = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: own(**options | {"include_defaults": False}))
    with pytest.raises(FinalError, match=r"lm-eval knows no task `thing` \(benchmarks.tasks\)"):
        make(benchmark_scores, tasks=[{"name": "thing", "shots": 0}], task_folder="tasks")


def test_a_task_without_its_data_is_refused(make, folder, no_model):
    pytest.importorskip("lm_eval")
    (folder / "tasks" / "sums.jsonl").unlink()
    with pytest.raises(FinalError, match=r"The task `sums` \(benchmarks.tasks\) cannot be loaded"):
        make(benchmark_scores, tasks=TASKS[1:], task_folder="tasks")


@pytest.mark.parametrize(("setting", "content", "message"), [
    ("alpaca_eval", None, r"questions.json \(benchmarks.alpaca_eval\) does not exist"),
    ("alpaca_eval", "[{", r"\(benchmarks.alpaca_eval\) is not valid JSON"),
    ("alpaca_eval", "{}", r"\(benchmarks.alpaca_eval\) holds no list of questions"),
    ("alpaca_eval", '[{"instruction": "Why?"}, {"prompt": "Why?"}]', r"Row 2 of .* has no `instruction`"),
    ("arena_hard", '[{"question_id": "1f", "turns": []}]', r"\(benchmarks.arena_hard\) has no `uid`"),
    ("mt_bench", '[{"question_id": 1, "category": "math", "turns": "a"}]', r"\(benchmarks.mt_bench\) has `turns` that are not"),
    ("mt_bench", '[{"question_id": 1, "category": ["x"], "turns": ["a"]}]', r"Row 1 of .* has a `category` that is not a text:"),
    ("mt_bench", '[{"question_id": 1, "category": "math", "turns": ["a", " "]}]', r"Row 1 of .* has a blank text among its"),
    ("mt_bench", '[{"question_id": [1], "category": "math", "turns": ["a"]}]', r"Row 1 of .* has a `question_id` that is not"),
    ("mt_bench", json.dumps([*MT_BENCH, MT_BENCH[0]]), r"Row 3 of .* has the `question_id` 81 of an earlier row:"),
    ("arena_hard", json.dumps(ARENA * 2), r"Row 2 of .* has the `uid` '1f' of an earlier row:"),
    ("arena_hard", '[{"uid": "1f", "prompt": "\\n"}]', r"Row 1 of .* has a blank `prompt`:"),
    ("arena_hard", '[{"uid": "1f", "prompt": "a \\ud83d"}]', r"Row 1 of .* has a `prompt` that holds half of a surrogate pair"),
    ("mt_bench", '[{"question_id": 1, "category": "math", "turns": ["a", "\\u0000"]}]', r"of which one holds the character NUL"),
    ("alpaca_eval", b'[{"instruction": "caf\xe9"}]', r"questions.json \(benchmarks.alpaca_eval\) is not valid JSON"),
])  # fmt: skip
def test_a_wrong_question_file_is_refused(make, folder, no_model, setting, content, message):
    if content is not None:
        (folder / "questions.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FinalError, match=message) as error:
        make(benchmark_answers, **{setting: "questions.json"})
    assert "\n" not in error.value.description


def test_a_line_that_is_no_text_is_named_before_anything_is_trained(folder):
    (folder / "questions.jsonl").write_bytes(b'{"uid": 1, "prompt": "Why?"}\n\n{"uid": 2, "prompt": "caf\xe9"}\n')
    stated = {"preset": "laptop", "benchmarks": {"arena_hard": "questions.jsonl"}}
    settings = load_settings(write_settings(folder / "x.yaml", stated))
    with pytest.raises(
        FinalError, match=r"Line 3 of .*questions.jsonl \(benchmarks.arena_hard\) is no JSON object in UTF-8"
    ):
        check_data_and_training(settings)


def test_presets_are_the_tasks_of_the_paper(folder):
    file = folder / "x.yaml"
    named = {"tasks": ["open_llm_leaderboard", {"name": "things", "shots": 2}]}
    shots = {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5, "things": 2,
    }  # fmt: skip
    settings = load_settings(write_settings(file, {"preset": "laptop", "benchmarks": named}))
    assert {task.name: task.shots for task in settings.benchmarks.tasks} == shots
    settings = load_settings(write_settings(file, {"preset": "laptop", "benchmarks": {"tasks": "six_more"}}))
    assert [task.shots for task in settings.benchmarks.tasks] == [5] * 6


@pytest.mark.parametrize(("tasks", "message"), [
    ("leaderboard", "'leaderboard' is neither a preset .open_llm_leaderboard, six_more. nor a task"),
    ([{"name": "gsm8k", "shot": 5}], "`benchmarks.tasks.0.shot` is not a setting; did you mean `shots`?"),
    (5, "`benchmarks.tasks` is 5"),
])  # fmt: skip
def test_wrong_tasks_are_refused_in_a_sentence(folder, tasks, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(write_settings(folder / "x.yaml", {"preset": "laptop", "benchmarks": {"tasks": tasks}}))
