"""Pairs that people read: what they see, what their words mean, and what becomes of pairs, funnel and versions."""

import csv
import io
import json
import shutil

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from definitions import build
from resources.settings.files import load_settings
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.row_files import file_rows
from resources.storage.tables import ParquetTables
from synpo_assets.graph.schemas import RefinedResponses, Responses
from synpo_assets.method.ids import content_id
from synpo_assets.method.pairs import as_preferences, join_sides
from synpo_assets.method.reviews import UNDECIDED, WORDS, apply_outcomes, decided, read_verdicts, stands_first
from synpo_assets.publishing.review import review_table
from tests.conftest import synpo, synpo_here
from tests.nano import nano_settings, write_settings

ALL = (*WORDS, "")


def responses(side, count, schema=Responses, iteration=1):
    rows = [
        {
            "response_id": content_id("response", side, place, iteration), "prompt_id": f"prompt-{iteration}-{place}",
            "prompt": f"=Question, {place}?", "response": f'{side} "answer"\nto {place}', "iteration": iteration,
            "checkpoint_sha": f"sha of {side}", "input_tokens": 1, "output_tokens": 1, "finish_reason": "stop",
            "base_response_id": "response-base",
        }
        for place in range(count)
    ]  # fmt: skip
    return pl.DataFrame(rows).select(schema.to_schema().columns.keys()).cast(dict(schema.empty().schema))


def candidates(count):
    return join_sides(responses("chosen", count), responses("rejected", count))


def scored(count):
    return candidates(count).with_columns(chosen_score=pl.lit(1.0), rejected_score=pl.lit(0.25), margin=pl.lit(0.75))


def exported(count, seed=7):
    without_rules = pl.Series([[]] * count, dtype=pl.List(pl.Struct({"rule": pl.String})))
    pairs = as_preferences(scored(count).with_columns(iteration=pl.lit(1), constraints=without_rules))
    return review_table(pairs, seed)


def filled(table, words):
    """The table as a person gives it back: a CSV file with a word in some rows."""
    rows = list(csv.DictReader(io.StringIO(table.write_csv())))
    return [row | {"verdict": word, "reviewer": "ann"} for row, word in zip(rows, words, strict=False)]


def read(rows):
    frame, problem = read_verdicts(enumerate(rows, start=2))
    assert problem is None
    return frame


@settings(max_examples=30)
@given(st.lists(st.sampled_from(ALL), min_size=1, max_size=12), st.integers(0, 99))
def test_a_word_means_the_answer_that_stood_in_that_place(words, seed):
    table = exported(12, seed)
    said = dict(zip(table["pair_id"], words, strict=False))
    outcomes = decided(candidates(12), read(filled(table, words)), seed)
    assert set(outcomes["pair_id"]) == {pair for pair, word in said.items() if word}
    first = dict(table.select("pair_id", "answer_1").iter_rows())
    for pair, outcome in outcomes.select("pair_id", "outcome").iter_rows():
        prefers_chosen = first[pair].startswith("chosen") == (said[pair] == "1")
        expected = "dropped" if said[pair] in UNDECIDED else "confirmed" if prefers_chosen else "flipped"
        assert outcome == expected


def test_the_reader_cannot_tell_which_answer_is_chosen_and_sees_no_formula():
    table = exported(200)
    assert set(table.columns) == {
        "pair_id", "iteration", "prompt", "answer_1", "answer_2", "verdict", "reviewer", "reviewed_at"
    }  # fmt: skip
    assert 70 < table["answer_1"].str.starts_with("chosen").sum() < 130
    assert table.equals(exported(200))
    assert not table.equals(exported(200, seed=8))
    assert table["prompt"].str.starts_with("'=Question").all()
    assert table["verdict"].null_count() == 200


def test_pairs_are_dropped_turned_or_left_and_keep_their_ids():
    pairs = scored(4)
    outcomes = pl.DataFrame({"pair_id": pairs["pair_id"][:3], "outcome": ["dropped", "flipped", "confirmed"]})
    kept, dropped = apply_outcomes(pairs, outcomes)
    assert dropped == 1
    assert kept["pair_id"].to_list() == pairs["pair_id"].to_list()[1:]
    turned, *left = kept.select("chosen_response", "rejected_checkpoint_sha", "chosen_score", "margin").rows()
    assert turned == ('rejected "answer"\nto 1', "sha of chosen", 0.25, -0.75)
    assert [row[0] for row in left] == ['chosen "answer"\nto 2', 'chosen "answer"\nto 3']
    # Read again, the same answer stands first whichever side it is on by now.
    ids = pairs.select("pair_id", "chosen_response_id", "rejected_response_id").row(1)
    assert stands_first(7, *ids) != stands_first(7, ids[0], ids[2], ids[1])


def test_the_forms_of_label_studio_and_argilla_are_read_as_they_are(tmp_path):
    table, words = exported(4), ["1", "2", "tie", "both"]
    rows = list(csv.DictReader(io.StringIO(table.write_csv())))
    # A task holds the columns of the imported file; what was labelled takes the place of the empty column.
    studio = [
        row | {"id": place, "verdict": word, "annotator": 3, "annotation_id": 9, "created_at": "2026-01-02T09:00:00Z",
               "updated_at": "2026-01-02T10:00:00Z", "lead_time": 12.5}
        for place, (row, word) in enumerate(zip(rows, words, strict=True))
    ]  # fmt: skip
    with (tmp_path / "studio.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, studio[0], quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        writer.writerows(studio)
    argilla = [
        {"id": row["pair_id"], "status": "completed", "_server_id": "c0ffee", **{name: row[name] for name in ("prompt",)},
         "verdict.responses": [word], "verdict.responses.users": ["ann"], "verdict.responses.status": ["submitted"]}
        for row, word in zip(rows, words, strict=True)
    ]  # fmt: skip
    (tmp_path / "argilla.jsonl").write_text("\n".join(json.dumps(row) for row in argilla))
    pl.DataFrame(argilla).write_parquet(tmp_path / "argilla.parquet")
    for name, reviewer, time in (
        ("studio.csv", "3", "2026-01-02T10:00:00Z"), ("argilla.jsonl", "ann", ""), ("argilla.parquet", "ann", ""),
    ):  # fmt: skip
        frame, problem = read_verdicts(file_rows(tmp_path / name, "preferences.reviewed"))
        assert problem is None
        assert frame["verdict"].to_list() == words
        assert frame["pair_id"].to_list() == table["pair_id"].to_list()
        assert set(frame["reviewer"]) == {reviewer}
        assert set(frame["reviewed_at"]) == {time}


def test_numbers_of_a_spreadsheet_are_words():
    rows = [
        {"pair_id": "pair-1", "verdict": 1.0},
        {"pair_id": "pair-2", "verdict": "2.0"},
        {"pair_id": "pair-3", "verdict": " TIE "},
    ]
    assert read(rows)["verdict"].to_list() == ["1", "2", "tie"]


def test_a_verdict_that_is_the_number_0_is_one():
    _, problem = read_verdicts([(1, {"pair_id": "pair-1", "verdict": 0})])
    assert "the verdict '0' is none of" in problem


@pytest.fixture
def home(tmp_path, nano_model):
    """A home with the answers of iteration 1, and settings that name a file of verdicts."""
    home, values = tmp_path / "home", nano_settings(nano_model)
    values["preferences"]["reviewed"] = "reviewed.csv"
    (home / "metrics").mkdir(parents=True)
    write_settings(home / "settings.yaml", values)
    tables = ParquetTables(str(home / "tables"))
    tables.write("refined_responses", "0001", responses("chosen", 3, RefinedResponses))
    tables.write("rejected_responses", "0001", responses("rejected", 3))
    return home


HEAD = "pair_id,verdict\n"
PAIR = candidates(1)["pair_id"][0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "reviewed.csv (preferences.reviewed) does not exist"),
        (b"pair_id,verdict\npair-\xff,1\n", "is not UTF-8 in line 2"),
        ((HEAD + "pair-0,1\n").encode(), "1 verdicts on pairs of no iteration in this home (pair-0 in line 2)"),
        ((HEAD + f"{PAIR},1\n\n{PAIR},2\n").encode(), f"lines 2 and 4 hold two verdicts for {PAIR}"),
        ((HEAD + f"{PAIR},3\n").encode(), "line 2: the verdict '3' is none of 1, 2, tie, neither, both"),
        (b"pair,word\nx,1\n", "there is no column `pair_id`, `verdict`; there is `pair`, `word`"),
        ((HEAD + f"{PAIR},0\n").encode(), "line 2: the verdict '0' is none of 1, 2, tie, neither, both"),
        ((HEAD + f"{PAIR};1\n").encode(), "has 1 cells in line 2 and 2 columns"),
        ((HEAD + f'{PAIR},"1\n').encode(), "is no CSV in line"),
        (b"pair_id,verdict,verdict\nx,1,2\n", "has the column `verdict` twice"),
        (b"", "there is no column `pair_id`, `verdict`; there is none"),
        ((HEAD + ",1\n").encode(), "line 2 has a verdict and no pair_id"),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_wrong_file_is_refused_before_a_model_is_loaded(home, monkeypatch, content, words, command):
    monkeypatch.setattr("synpo_assets.cli.preflight.fetch_initial_policy", lambda *_: pytest.fail("loads M_0"))
    if content is not None:
        (home / "reviewed.csv").write_bytes(content)
    result = synpo_here(command, "--home", home)
    assert result.returncode == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_check_counts_the_verdicts_and_a_home_without_pairs_says_that_none_applies(home):
    (home / "reviewed.csv").write_text(HEAD + f"{PAIR},1\n")
    assert "1 verdicts of people\n" in synpo_here("check", "--home", home).stdout.replace("  ", "")
    shutil.rmtree(home / "tables")
    assert "this home has no pairs yet" in " ".join(synpo_here("check", "--home", home).stdout.split())


def test_a_file_of_another_kind_is_refused(home):
    values = yaml.safe_load((home / "settings.yaml").read_text())
    values["preferences"]["reviewed"] = "reviewed.xlsx"
    write_settings(home / "settings.yaml", values)
    assert "`preferences.reviewed` is " in synpo_here("check", "--home", home).stderr


def test_the_content_of_the_file_is_part_of_the_version_of_the_verdicts_alone(home):
    def versions():
        graph = build(load_settings(home / "settings.yaml"), home)[1].graph
        return {key.to_user_string(): graph.get(key).code_version for key in graph.materializable_asset_keys}

    (home / "reviewed.csv").write_text(HEAD + f"{PAIR},1\n")
    before = versions()
    (home / "reviewed.csv").write_text(HEAD + f"{PAIR},2\n")
    after = versions()
    assert {name for name in before if before[name] != after[name]} == {"pair_verdicts"}


def test_without_a_file_the_graph_has_no_verdicts(nano_model, tmp_path):
    chosen = load_settings(write_settings(tmp_path / "mine.yaml", nano_settings(nano_model)))
    graph = build(chosen, tmp_path)[1].graph
    assert not {"pair_verdicts", "verdict_agreement"} & {
        key.to_user_string() for key in graph.materializable_asset_keys
    }


@pytest.mark.slow
def test_pairs_and_what_follows_are_those_that_people_want(nano_run, tmp_path):
    home, review = tmp_path / "home", tmp_path / "review.csv"
    shutil.copytree(nano_run.home, home)
    assert synpo("export", "--home", home, "--format", "review", "--iteration", 2, "--output", review).returncode == 0
    rows = list(csv.DictReader(io.StringIO(review.read_text("utf-8-sig"))))
    before = ParquetTables(str(home / "tables")).read("preference_pairs", "0002").sort("pair_id")
    for row, word in zip(rows, ["1", "1", "neither"], strict=False):
        row["verdict"] = word
    pl.DataFrame(rows).write_csv(home / "reviewed.csv")
    values = yaml.safe_load((home / "settings.yaml").read_text())
    values["preferences"]["reviewed"] = "reviewed.csv"
    write_settings(home / "settings.yaml", values)
    result = synpo("run", "--home", home, "--iterations", 2)
    assert result.returncode == 0, result.stderr
    tables, metrics = ParquetTables(str(home / "tables")), ParquetTables(str(home / "metrics"))
    verdicts, pairs = tables.read("pair_verdicts", "0002"), tables.read("preference_pairs", "0002")
    assert tables.read("pair_verdicts", "0001").is_empty()
    outcomes = dict(verdicts.select("pair_id", "outcome").iter_rows())
    assert len(outcomes) == 3
    kept = dict(pairs.select("pair_id", "chosen_response_id").iter_rows())
    for pair, chosen, rejected in before.select("pair_id", "chosen_response_id", "rejected_response_id").iter_rows():
        side = {"dropped": None, "flipped": rejected}.get(outcomes.get(pair, "confirmed"), chosen)
        assert kept.get(pair) == side
    measured = metrics.read("preference_pairs", "0002").filter(metric="dropped", of="people")
    assert measured["value"].to_list() == [1.0]
    trained = metrics.read("model_checkpoint", "0002").filter(metric="examples")["value"][0]
    assert trained == tables.read("preference_history", "0002").height + before.height - 1
    agreement = metrics.read("verdict_agreement", "0002").filter(metric="agreement_rate")
    assert agreement["n"].to_list() == [2, 2]
    assert "agreement with people" in (home / "reports" / "boosting_report.html").read_text()
    # What people say of iteration 1 is learned by M_2 as well, whose own pairs stay.
    earlier = tmp_path / "earlier.csv"
    assert synpo("export", "--home", home, "--format", "review", "--iteration", 1, "--output", earlier).returncode == 0
    more = list(csv.DictReader(io.StringIO(earlier.read_text("utf-8-sig"))))
    more[0]["verdict"] = "neither"
    pl.DataFrame(rows + more).write_csv(home / "reviewed.csv")
    result = synpo("run", "--home", home, "--iterations", 2)
    assert result.returncode == 0, result.stderr
    assert metrics.read("model_checkpoint", "0002").filter(metric="examples")["value"][0] == trained - 1
    learned = [
        CheckpointStore(str(home / "checkpoints")).manifest("model_checkpoint", key)["trained_on"][
            "preference_pairs[0001]"
        ]
        for key in ("0001", "0002")
    ]
    assert learned[0] == learned[1]
    assert tables.read("preference_pairs", "0002").equals(pairs)
