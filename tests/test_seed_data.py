"""The data that ships with the project."""

import collections

import pytest
import yaml

from resources.settings.files import load_settings, preset_path
from synpo_assets.method.prompts import Contamination, NearDuplicates
from synpo_assets.method.rules import RULES
from synpo_assets.method.words import words_of
from synpo_assets.stages.seed import seed_table, verifiable_table
from tests.benchmarks.rules_seed import tasks_of
from tests.nano import SEED, seed_rows


def test_sizes_and_spread():
    train, held_out, corpus = seed_rows("train"), seed_rows("held_out"), seed_rows("corpus")
    assert len(train) >= 240
    assert len(held_out) >= 60
    assert len(corpus) >= 300
    assert len({row["topic"] for row in train}) >= 20
    assert len({row["topic"] for row in corpus}) >= 40
    kinds = collections.Counter(row["kind"] for row in train)
    assert set(kinds) == {
        "explain", "rewrite", "list", "classify", "plan", "compare", "write", "code", "arithmetic", "advice"
    }  # fmt: skip
    assert min(kinds.values()) >= 20


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_answers_are_short_and_finished(name):
    for row in seed_rows(name):
        assert 0 < len(row["answer"].split()) <= 45, row
        assert row["answer"].strip() == row["answer"]
        assert row["prompt"].strip() == row["prompt"]


def test_no_two_prompts_alike():
    known = NearDuplicates(0.5)
    for row in seed_rows("train") + seed_rows("held_out"):
        assert known.find(row["prompt"]) is None, row["prompt"]
        known.add(row["prompt"])


def test_train_does_not_overlap_with_held_out():
    held_out = Contamination([row["prompt"] for row in seed_rows("held_out")], 8)
    assert [row["prompt"] for row in seed_rows() if held_out.find(row["prompt"])] == []


def test_held_out_questions_of_one_word_drop_no_seed_prompt():
    short, prompts = (
        ["Why?", "How?", "What?"],
        [row["prompt"] for name in ("train", "held_out") for row in seed_rows(name)],
    )
    held_out = Contamination(short, 8)
    # Searched inside the prompts, they would drop many.
    assert sum(bool({"why", "how", "what"} & set(words_of(prompt))) for prompt in prompts) > 100
    assert [prompt for prompt in prompts if held_out.find(prompt)] == []
    assert [held_out.find(text) for text in ("why", "How", "“What”?!")] == short


def test_the_shipped_seed_is_valid():
    settings = load_settings(preset_path("laptop"))
    whole = settings.seed_data.model_copy(update={"train_limit": None, "held_out_limit": None})
    frame, bad = seed_table(settings.model_copy(update={"seed_data": whole}))
    assert bad == []
    assert frame.height == len(seed_rows("train")) + len(seed_rows("held_out"))


def test_the_shipped_instructions_are_valid_and_alike_to_no_prompt():
    settings = load_settings(preset_path("laptop"))
    limits = dict.fromkeys(("train_limit", "held_out_limit", "verifiable_limit"))
    settings = settings.model_copy(update={"seed_data": settings.seed_data.model_copy(update=limits)})
    frame, _ = seed_table(settings)
    instructions, _ = verifiable_table(settings)
    assert instructions.height >= 60
    # Instructions of one form have some words in common.
    known = NearDuplicates(0.6)
    for prompt in [*frame["prompt"], *instructions["prompt"]]:
        assert known.find(prompt) is None, prompt
        known.add(prompt)
    rules = collections.Counter(each["rule"] for row in instructions["constraints"] for each in row)
    assert set(rules) <= RULES.keys()
    limited = settings.seed_data.model_copy(update={"verifiable_limit": 24})
    some, _ = verifiable_table(settings.model_copy(update={"seed_data": limited}))
    assert (some.height, set(some["prompt_id"]) <= set(instructions["prompt_id"])) == (24, True)


def test_the_seed_with_rules_is_what_its_script_makes():
    topics, templates = (yaml.safe_load((SEED / f"rules/{name}.yaml").read_text()) for name in ("topics", "templates"))
    made = {split: list(tasks_of(split, of_split, templates)) for split, of_split in topics.items()}
    shipped = [row for row in seed_rows("rules/train") if row["constraints"]]
    assert shipped == made["train"]
    assert seed_rows("rules/instructions") == [
        row | {"split": split} for split in ("dev", "test") for row in made[split]
    ]
    assert len(shipped) >= 700
    assert len(made["dev"]) >= 150
    assert len(made["test"]) >= 300
    assert len({row["kind"] for row in shipped}) >= 12
    assert len({row["topic"] for row in shipped}) >= 40


def test_dev_and_test_have_topics_templates_and_combinations_of_rules_of_their_own():
    train, instructions = seed_rows("rules/train"), seed_rows("rules/instructions")
    taught = [row for row in train if row["constraints"]]
    for column in ("topic", "template"):
        by_split = [{row[column] for row in taught}]
        by_split += [{row[column] for row in instructions if row["split"] == split} for split in ("dev", "test")]
        assert sum(map(len, by_split)) == len(set().union(*by_split)), column

    def combinations(rows):
        return {tuple(sorted({each["rule"] for each in row["constraints"]})) for row in rows}

    for split in ("dev", "test"):
        assert combinations(row for row in instructions if row["split"] == split) - combinations(taught)


def test_how_it_was_made_and_its_licence_are_stated():
    text = (SEED / "README.md").read_text()
    assert "licen" in text.lower()
    for name in ("train.jsonl", "held_out.jsonl", "corpus.jsonl", "verifiable.jsonl"):
        assert name in text
