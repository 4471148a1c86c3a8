"""What an edit of the code makes stale: exactly what computes something else, whichever module the edit is in."""

import json
import shutil
import subprocess
import sys

import pandera.polars as pa
import pytest

from resources.settings.files import load_settings
from synpo_assets.graph import stage
from synpo_assets.graph.code_versions import code_version
from synpo_assets.graph.schemas import SeedResponses
from synpo_assets.graph.tables import Table
from tests.conftest import HOME, synpo_here
from tests.test_structure import ROOT

TRAINED = {"prompt_generator", "reward_model", "judge_model", "response_improver", "model_checkpoint"}
# File, what is replaced, by what, and what becomes stale.
EDITS = {
    "the body of a stage": (
        "synpo_assets/stages/improver.py",
        " margin=found[",
        " margin=-found[",
        {"seed_responses"},
    ),
    "a helper in the same file": (
        "synpo_assets/stages/responses.py", "response_table(prompts, written,", "response_table(prompts, written.clone(),",
        {"base_responses", "rejected_responses", "seed_responses"},
    ),
    "a function of the method, several calls away": (
        "synpo_assets/method/words.py", ", usual).lower())", ", usual))",
        {"seed_pairs", "synthetic_prompts", "self_instruct_prompts", "prompt_diversity", "preference_pairs", "evaluation"},
    ),
    "a template": (
        "synpo_assets/method/templates/response_improver.jinja", None, "\nBe brief.",
        # How long a row of the seed, or a new prompt, is in it decides whether it can be used.
        {"seed_pairs", "synthetic_prompts", "verifiable_instructions", "response_improver", "refined_responses"},
    ),
    "a constant": ("synpo_assets/method/evaluation.py", "(0.5, 2.0)", "(0.5, 3.0)", {"gold_comparison"}),
    "a constant that another constant is made of": (
        "synpo_assets/method/rules.py", '"words_at_most": lambda answer, value: len(words_in(answer)) <=',
        '"words_at_most": lambda answer, value: len(words_in(answer)) <',
        {
            "instruction_following", "verifiable_instructions", "seed_pairs", "seed_responses", "preference_pairs",
            "synthetic_prompts", "self_instruct_prompts", "prompt_diversity", "refined_responses",
        },
    ),
    "how training rows are built": (
        "resources/training/rows.py", "cut = int(len(prompt) > training.max_prompt_length)",
        "cut = int(len(prompt) >= training.max_prompt_length)", TRAINED,
    ),
    "how chats are rendered": (
        "resources/models/chat.py", "adds_bos = bos is not None and", "adds_bos = bos is None and", None,
    ),
    "a class that a service reaches": (
        "resources/models/embeddings.py", "means = (states * mask).sum(dim=1) / mask.sum(dim=1)",
        "means = (states * mask).sum(dim=1)", {"prompt_diversity", "gold_comparison"},
    ),
}  # fmt: skip
# What computes nothing makes nothing stale, all together: file, what is replaced, by what.
HARMLESS = (
    # A docstring.
    (
        "synpo_assets/method/pairs.py", '"""Turns selected pairs into TRL', '"""Makes selected pairs into TRL',
    ),
    # The docstring of a stage.
    (
        "synpo_assets/stages/responses.py", '"""M_{t-1}\'s answers to the synthetic prompts:', '"""Answers:',
    ),
    # A comment.
    (
        "synpo_assets/method/pairs.py", "# Streamed, because", "# It is streamed, because",
    ),
    # Formatting.
    (
        "synpo_assets/method/ids.py", 'return f"{kind}-{digest[:16]}"', 'return (\n        f"{kind}-{digest[:16]}"\n    )',
    ),
    # How things are shown.
    (
        "synpo_assets/graph/presentation.py", "SHOWN_STEPS = 50", "SHOWN_STEPS = 60",
    ),
    # The annotation of an argument.
    (
        "synpo_assets/method/pairs.py", "def repetition(text: str, size: int)", "def repetition(text, size: int)",
    ),
)  # fmt: skip
# One process for all edits: the code is read anew for each, and not imported anew.
LOAD = """
import json, sys
from pathlib import Path
from resources.settings.files import home_directory, home_settings
from synpo_assets.algorithm import stages_of
from synpo_assets.graph import code_versions
settings = home_settings(home_directory())
def versions():
    for name in ("reached_code", "_read", "_tree", "_names", "_module_imports"):
        getattr(code_versions, name).cache_clear()
    return {s.name: code_versions.code_version(s.functions(settings), s.schema, s.reads, settings) for s in stages_of(settings)}
found = {"": versions()}
for name, edits in json.loads(sys.stdin.read()).items():
    texts = {file: Path(file).read_text() for file, _, _ in edits}
    for file, old, new in edits:
        text = Path(file).read_text()
        assert old is None or text.count(old) == 1, (name, text.count(old))
        Path(file).write_text(text + new if old is None else text.replace(old, new))
    found[name] = versions()
    for file, text in texts.items():
        Path(file).write_text(text)
assert versions() == found[""]
# Imported by name, imported inside a function, and used as a module.
for folder, old, new in (
    ("synpo_assets/method", "pairs", "couples"), ("resources/scoring", "pairrm", "rm"), ("synpo_assets/graph", "metrics", "figures")
):
    Path(folder, f"{old}.py").rename(Path(folder, f"{new}.py"))
    package = folder.replace("/", ".")
    for file in [*Path("synpo_assets").rglob("*.py"), *Path("resources").rglob("*.py")]:
        text = file.read_text().replace(f"{package}.{old} ", f"{package}.{new} ")
        file.write_text(text.replace(f"from {package} import {old}", f"from {package} import {new} as {old}"))
found["the name of a module"] = versions()
print(json.dumps(found))
"""


def copy_of_the_code(place):
    place.mkdir(exist_ok=True)
    for name in ("synpo_assets", "resources", "definitions.py"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / name)
    return place


def run_there(place, code, text=""):
    home = place / "home"
    home.mkdir(exist_ok=True)
    (home / "settings.yaml").write_text((HOME / "settings.yaml").read_text())
    environment = {"SYNPO_HOME": str(home), "PATH": "", "PYTHONPATH": str(place)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=text, capture_output=True, text=True, cwd=place, env=environment,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    place = copy_of_the_code(tmp_path_factory.mktemp("code"))
    edits = {name: [edit[:3]] for name, edit in EDITS.items()}
    return run_there(place, LOAD, json.dumps(edits | {"nothing": HARMLESS}))


def stale(versions, name):
    return {asset for asset, version in versions[name].items() if version != versions[""][asset]}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, edit in EDITS.items() if edit[3] is not None])
def test_an_edit_makes_exactly_the_right_assets_stale(versions, name):
    assert stale(versions, name) == EDITS[name][3]


@pytest.mark.slow
def test_what_computes_nothing_makes_nothing_stale(versions):
    assert stale(versions, "nothing") == set()


@pytest.mark.slow
def test_how_chats_are_rendered_decides_all_that_generates_trains_or_scores(versions):
    untouched = versions[""].keys() - stale(versions, "how chats are rendered")
    # The labels of prompt_diversity are kept where the scorer keeps its scores.
    assert untouched == {
        "keyword_pool", "keyword_sets", "policy", "preference_history",
        "promotion", "boosting_report", "published_dataset", "published_model", "benchmark_scores",
    }  # fmt: skip


def test_a_schema_counts_by_what_it_allows():
    class Answers(Table):
        tokens: int = pa.Field(ge=1, description="Tokens written.")

    class InOtherWords(Table):
        tokens: int = pa.Field(ge=1, description="How many tokens were written.")

    class Laxer(Table):
        tokens: int = pa.Field(ge=0, description="Tokens written.")

    settings, schemas = load_settings(HOME / "settings.yaml"), (Answers, InOtherWords, Laxer)
    version, in_other_words, laxer = (code_version([], schema, [], settings) for schema in schemas)
    assert version == in_other_words != laxer


@pytest.mark.slow
def test_the_name_of_a_module_does_not_count(versions):
    assert stale(versions, "the name of a module") == set()


def test_a_run_names_what_was_made_by_other_code_and_keeps_it(nano_run, tmp_path, monkeypatch, said):
    home = shutil.copytree(nano_run.home, tmp_path / "home", symlinks=True)
    before = {path: path.stat().st_mtime for path in (home / "tables").rglob("*.parquet")}

    def edited(functions, schema, reads, settings):
        unchanged = code_version(functions, schema, reads, settings)
        return "edited" if schema is SeedResponses else unchanged

    monkeypatch.setattr(stage, "code_version", edited)
    result = synpo_here("run", "--home", home, "--iterations", 2)
    assert result.returncode == 0, result.stderr[-2000:]
    (warning,) = (line for line in said if line.startswith("Made by other code"))
    assert warning.startswith(
        "Made by other code or with other settings, and kept: seed_responses[0001], seed_responses[0002]. Materialize"
    )
    assert {path: path.stat().st_mtime for path in (home / "tables").rglob("*.parquet")} == before
