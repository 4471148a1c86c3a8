"""The improver as an editor: what it is trained on beside own answers, and how damaged answers come out of it."""

import dataclasses
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from definitions import build
from resources.generation.language_model import Usage
from resources.training.job import TrainingSummary
from synpo_assets.cli.estimate import expected_work, sizes_of
from synpo_assets.evaluation.improver_edits import improver_edits
from synpo_assets.graph.evaluation_schemas import EDIT_SHARES, ImproverEdits
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.tables import check
from synpo_assets.method.damage import DAMAGES, all_damages, damaged
from synpo_assets.method.edits import EDIT_OUTCOMES, damaged_copies, edit_outcome, edit_shares
from synpo_assets.method.templates import improver_instruction
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.rows import report_rows
from synpo_assets.stages.improver import response_improver
from tests.nano import active_settings, seed_rows
from tests.stand_ins import ITERATIONS, run, services_in, shown
from tests.stand_ins import instance as instance
from tests.test_evaluation import stand_in, weights
from tests.test_loop import pairs
from tests.test_ranked_samples import stand_in_checkpoint

ROWS = seed_rows()
GOLD = st.sampled_from([row["answer"] for row in ROWS])
NAMES, SEEDS = st.sampled_from(list(DAMAGES)), st.integers(0, 9)


def editing(copies=2, **changes):
    """The nano settings with damaged gold among the improver's examples."""
    shared = active_settings()
    improver = shared.response_improver.model_copy(update={"damaged_copies": copies, **changes})
    return shared.model_copy(update={"response_improver": improver})


# What became of a damaged answer.


@given(GOLD, GOLD, SEEDS)
def test_gold_is_right_and_the_damaged_answer_is_left_whatever_the_white_space(gold, other, seed):
    for shown_text in all_damages(gold, other, seed).values():
        for respaced in (str, lambda text: " ".join(text.split()), lambda text: text.replace(" ", "\n\n") + " "):
            assert edit_outcome(gold, shown_text, respaced(gold)) == "right"
            assert edit_outcome(gold, shown_text, respaced(shown_text)) == "left"


@given(GOLD, GOLD, NAMES, SEEDS)
def test_what_is_added_beside_the_damage_is_worse(gold, other, name, seed):
    shown_text = damaged(name, gold, other, seed)
    if shown_text is not None:
        assert edit_outcome(gold, shown_text, f"{shown_text} xyzzy") == "worse"


@given(GOLD, GOLD, st.sampled_from(["off_topic_sentence", "repeated_item"]), SEEDS)
def test_of_two_damages_one_undone_is_nearer_and_one_more_is_worse(gold, other, name, seed):
    once = damaged(name, gold, other, seed)
    twice = once and damaged("repeated_item", once, other, seed)
    if twice:
        assert edit_outcome(gold, twice, once) == "nearer"
        assert edit_outcome(gold, once, twice) == "worse"


@pytest.mark.parametrize(
    ("rewrite", "outcome"),
    [
        ("1. Wait 20 minutes.\n2. Drain it.", "right"),
        ("1. Wait 20 minutes. 2. Drain it.", "right"),
        ("1. Wait 98 minutes.\n2. Drain it.", "left"),
        ("1. Wait 45 minutes.\n2. Drain it.", "worse"),
        ("1. Wait some minutes.\n2. Drain it.", "worse"),
        ("1. Wait minutes.\n2. Drain it.", "nearer"),
        ("Wait 20 minutes, then drain it.", "worse"),
        ("", "worse"),
    ],
)
def test_what_counts_as_what(rewrite, outcome):
    """Another wrong number, and the right one in other words, are as far from gold as the damaged answer, or farther."""
    gold, shown_text = "1. Wait 20 minutes.\n2. Drain it.", "1. Wait 98 minutes.\n2. Drain it."
    assert edit_outcome(gold, shown_text, rewrite) == outcome


# What R_t is trained on.


@given(
    st.lists(st.sampled_from(ROWS), min_size=2, max_size=6, unique_by=lambda row: row["prompt"]),
    st.integers(0, 9),
    SEEDS,
)
def test_each_gold_answer_gets_so_many_different_damages_as_far_as_they_apply(rows, copies, seed):
    table = pl.DataFrame([{name: row[name] for name in ("prompt", "answer")} for row in rows])
    made = damaged_copies(table, copies, seed)
    assert made.equals(damaged_copies(table, copies, seed))
    assert made.columns == ["prompt", "answer", "damage", "damaged"]
    every = damaged_copies(table, len(DAMAGES), seed)
    for prompt, answer in table.rows():
        own, applied = (each.filter(prompt=prompt).drop("prompt") for each in (made, every))
        assert own.height == own["damage"].n_unique() == min(copies, applied.height)
        assert set(own.rows()) <= set(applied.rows()), "the number of copies draws the kind and not the damage"
        assert set(own["answer"]) <= {answer}
        assert answer not in own["damaged"]


# The shares.

EDITS = st.lists(
    st.tuples(st.integers(1, 5), NAMES, st.sampled_from(EDIT_OUTCOMES), st.sampled_from(EDIT_OUTCOMES)),
    min_size=1, max_size=20, unique_by=lambda row: row[:2],
)  # fmt: skip


def edits_of(rows):
    columns = ["prompt_id", "damage", "improver_outcome", "initial_outcome"]
    return pl.DataFrame(rows, schema=columns, orient="row").with_columns(pl.col("prompt_id").cast(pl.String))


@settings(deadline=None, max_examples=8)
@given(EDITS)
def test_shares_are_of_all_answers_and_every_interval_has_a_width(rows):
    shares = edit_shares(edits_of(rows))
    assert shares["damage"].unique(maintain_order=True).to_list() == [
        None, *(name for name in DAMAGES if any(row[1] == name for row in rows))
    ]  # fmt: skip
    for row in shares.iter_rows(named=True):
        part = [each for each in rows if row["damage"] in (None, each[1])]
        counts = [sum(each[place] == row["outcome"] for each in part) for place in (2, 3)]
        assert (row["answers"], row["prompts"]) == (len(part), len({each[0] for each in part}))
        assert (row["improver"], row["initial"]) == pytest.approx([count / len(part) for count in counts])
        assert row["gain"] == pytest.approx(row["improver"] - row["initial"])
        for name, least, most in (("improver", 0, 1), ("initial", 0, 1), ("gain", -1, 1)):
            low, value, high = row[f"{name}_low"], row[name], row[f"{name}_high"]
            assert least - 1e-9 <= low <= value + 1e-9 <= high + 2e-9 <= most + 3e-9
            assert high - low > 0.05, "twenty answers are never certain"


def test_several_damages_of_one_prompt_count_for_less_than_those_of_many():
    """Sixteen answers, half of them right: of eight prompts that are wholly right or wrong, and of sixteen prompts."""
    few, many = (
        edit_shares(
            edits_of(
                [(number // each, "lost_item", "right" if number < 8 else "worse", "left") for number in range(16)]
            )
        )
        for each in (2, 1)
    )
    widths = [table["improver_high"][0] - table["improver_low"][0] for table in (few, many)]
    assert [table["prompts"][0] for table in (few, many)] == [8, 16]
    assert widths[0] > 1.2 * widths[1]


# The assets.

SPLITS = {"train": 4, "dev": 2, "test": 2}
SEED = pl.DataFrame([
    {"prompt_id": f"prompt-{split}{place}", "prompt": row["prompt"], "answer": row["answer"], "split": split}
    for place, (split, row) in enumerate(zip([name for name, count in SPLITS.items() for _ in range(count)], ROWS, strict=False))
])  # fmt: skip


@dg.asset(io_manager_key="tables")
def seed_pairs() -> pl.DataFrame:
    return SEED


@dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
def seed_responses() -> pl.DataFrame:
    """The second answer does not pass the filter."""
    answered = SEED.filter(split="train").drop("split")
    margins = pl.Series([1.0, -200.0, 1.0, 1.0])
    return answered.with_columns(
        response=pl.lit("Own answer."),
        margin=margins,
        other_margin=-margins,
        score_convention=pl.lit("reward_difference"),
    )


class RecordingTrainer:
    """Stands in for the trainer; keeps what is trained, and on what."""

    def __init__(self):
        self.examples, self.start = [], None

    def model_copy(self, update):
        return self

    def train(self, kind, start, examples, training, directory, loss=None):
        self.examples, self.start = examples, start
        weights("R_t")(directory)
        return TrainingSummary(len(examples), 0, 0, 9, 1, 1.0, [{"loss": 1.0, "step": 1}])


POLICIES = [stand_in("initial_policy", "M_0"), stand_in("policy", "M_{t-1}", ITERATIONS)]


def trained_on(instance, home, settings):
    """What R_t is trained on under these settings, and what it measures."""
    trainer = RecordingTrainer()
    services = dataclasses.replace(services_in(home, settings), trainer=trainer)
    run([*POLICIES, seed_responses, response_improver], instance, services, "0001")
    return trainer.examples, recorded(services.metrics, "0001"), services


def test_damaged_gold_stands_beside_the_own_answers_and_is_counted_apart(instance, tmp_path):
    plain, without, _ = trained_on(instance, tmp_path / "off", active_settings())
    examples, measured, services = trained_on(instance, tmp_path / "on", editing(2))
    assert len(plain) == 3
    assert examples[:3] == plain, "own answers are what they were"
    train = SEED.filter(split="train")
    wanted = damaged_copies(train.select("prompt", "answer"), 2, services.settings.random_seed)
    assert examples[3:] == [(improver_instruction(prompt, text), gold) for prompt, gold, _, text in wanted.rows()], (
        "the filter of own answers does not concern gold"
    )
    counts = {(each.of, each.by): each.value for each in measured.every("examples")}
    assert counts.pop((None, None)) == len(examples) == 11
    assert (counts.pop(("own_answers", None)), counts.pop(("damaged_gold", None))) == (3, 8)
    assert counts == {("damaged_gold", name): count for name, count in wanted["damage"].value_counts().rows()}
    assert [each.of for each in without.every("examples")] == [None]


class Editors:
    """Stands in for both models: R_t writes gold, but leaves changed numbers; M_0 always says the same, or leaves things."""

    def __init__(self):
        self.asked = {}

    def answer(self, checkpoint, prompts, sampling):
        asked = list(prompts)
        self.asked[checkpoint.asset] = asked
        gold = dict(SEED.select("prompt_id", "answer").rows())
        texts = []
        for row_id, messages in asked:
            prompt_id, damage = row_id.split()
            left = messages[0]["content"].partition("Original answer: ")[2].partition("\n\nRewritten answer:")[0]
            if checkpoint.asset == "initial_policy":
                texts.append("Certainly! Here it is." if damage == "lost_item" else left)
            else:
                texts.append(left if damage == "changed_number" else f" {gold[prompt_id]}\n")
        tokens = {"input_tokens": pl.lit(3, pl.Int64), "output_tokens": pl.lit(4, pl.Int64)}
        frame = pl.DataFrame({"id": [row_id for row_id, _ in asked], "text": texts}).with_columns(**tokens)
        return frame.with_columns(finish_reason=pl.lit("stop")), Usage(len(asked), 0, 3, 4, 4, 0, 1.0)


@pytest.mark.slow
def test_damaged_held_out_gold_is_edited_by_both_models_and_counted(instance, tmp_path, nano_checkpoint):
    editors = Editors()
    services = dataclasses.replace(services_in(tmp_path, editing()), language_model=editors)
    models = [
        stand_in_checkpoint("initial_policy", nano_checkpoint.weights),
        stand_in_checkpoint("response_improver", nano_checkpoint.weights, ITERATIONS),
    ]
    result = run([*models, seed_pairs, improver_edits], instance, services, "0001")
    frame = result.output_for_node("improver_edits")
    assert check(ImproverEdits, frame) is None
    assert editors.asked["initial_policy"] == editors.asked["response_improver"]
    held_out = SEED.filter(pl.col("split") != "train")
    assert set(frame["prompt"]) == set(held_out["prompt"])
    every = damaged_copies(held_out, len(DAMAGES), services.settings.random_seed)
    assert sorted(frame.select("damage", "damaged").rows()) == sorted(every.select("damage", "damaged").rows())
    expected = {"changed_number": ("left", "left"), "lost_item": ("right", "worse")}
    for damage, *outcomes in frame.select("damage", "improver_outcome", "initial_outcome").rows():
        assert tuple(outcomes) == expected.get(damage, ("right", "left"))
    measured = recorded(services.metrics, "0001")
    for split in ("dev", "test"):
        of_split = frame.filter(split=split)
        right = measured.find("edits_right", "improver", split=split)
        assert right.value == pytest.approx((of_split["damage"] != "changed_number").mean())
        assert (right.n, right.checkpoint_sha) == (2, frame["improver_checkpoint_sha"][0])
        assert measured.value("edits_right", "initial", split=split) == 0
        assert measured.value("edits_worse", "initial", by="lost_item", split=split) == 1
        assert measured.value("edits_right_gain", "improver", over="initial", split=split) == pytest.approx(right.value)
    of_test = 1 + frame.filter(split="test")["damage"].n_unique()
    assert len(shown(instance, "improver_edits", "0001")["shares"].records) == of_test * len(EDIT_OUTCOMES)
    rows = report_rows([FinishedIteration("0001", measured, 1.0, pairs(1, 2), [], "reward", {}, {}, None)])
    cells = {row.label: row.cells[0] for row in rows if row.section == "The improver as an editor"}
    assert cells["lost item: made right (gold), by R_t and by M_0, 95 % intervals"] == (
        "100.0% (34.2 to 100.0), 0.0% (0.0 to 65.8), 2 prompts"
    )
    assert len([label for label in cells if "R_t less M_0" in label]) == len(EDIT_SHARES)


@pytest.mark.slow
def test_an_improver_that_is_m_0_itself_gains_nothing(instance, tmp_path, nano_checkpoint):
    """Real generation: the same weights are asked the same, so that the second model is found in the shards."""
    sampling = active_settings().response_improver.sampling.model_copy(update={"max_new_tokens": 4})
    services = services_in(tmp_path, editing(1, sampling=sampling))
    models = [
        stand_in_checkpoint(name, nano_checkpoint.weights, partitions)
        for name, partitions in (("initial_policy", None), ("response_improver", ITERATIONS))
    ]
    result = run([*models, seed_pairs, improver_edits], instance, services, "0001")
    frame, measured = result.output_for_node("improver_edits"), recorded(services.metrics, "0001")
    assert frame["improver_response"].to_list() == frame["initial_response"].to_list()
    usage = measured.find("reused_completions", asset="improver_edits")
    assert (usage.value, usage.n) == (frame.height, 2 * frame.height)
    for split in ("dev", "test"):
        shares = [measured.value(share, "improver", split=split) for share, _ in EDIT_SHARES.values()]
        assert sum(shares) == pytest.approx(1)
        gains = [measured.find(gain, "improver", over="initial", split=split) for _, gain in EDIT_SHARES.values()]
        assert all(gain.value == 0 and gain.low < 0 < gain.high for gain in gains)
    # Nonsense of four tokens.
    assert measured.value("edits_worse", "initial") > 0.5


# The setting.


def test_only_the_setting_brings_the_stage_into_the_graph():
    ranked = editing().preferences.model_copy(update={"chosen_from": "ranked_samples"})
    ways = (active_settings(), editing(), editing().model_copy(update={"preferences": ranked}))
    assets = [
        {key.to_user_string() for key in build(each, Path("/nowhere"))[1].graph.materializable_asset_keys}
        for each in ways
    ]
    assert assets[1] - assets[0] == {"improver_edits"}
    assert "improver_edits" not in assets[2]


def test_the_estimate_counts_damaged_gold_and_its_rewrites(nano_model):
    seed = pl.DataFrame({"split": ["train", "dev", "test"], "prompt": ["a b"] * 3, "answer": ["c d"] * 3})
    free = active_settings().response_improver.training.model_copy(update={"max_examples": None})
    planned = [expected_work(sizes_of(editing(copies, training=free), seed, 0)) for copies in (0, 3)]
    off, on = ({stage.name: work for stage, work in each} for each in planned)
    sizes = sizes_of(editing(3), seed, 0)
    shorter = sizes.written - sizes.gold
    tokens = off["response_improver"].tokens
    assert on["response_improver"].tokens == pytest.approx(4 * tokens - 3 * shorter)
    assert on["improver_edits"].tokens == 2 * 2 * len(DAMAGES) * editing().response_improver.sampling.max_new_tokens
    assert "improver_edits" not in off
