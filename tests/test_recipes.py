"""The recipes of the README, followed to the letter in a copy of the tree: `pytest -n 0 -m slow`."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import polars as pl
import pytest

from tests.nano import nano_settings, write_settings
from tests.test_structure import ROOT
from tests.test_training import pairs

pytestmark = pytest.mark.slow

TRAIN = """
import json, sys
from pathlib import Path
from resources.settings.files import load_settings
from resources.storage.checkpoint_store import Checkpoint
from resources.training.losses import loss_module
from resources.training.trainer import Trainer
settings, model, out = load_settings(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
optimization = settings.preference_optimization
trainer = Trainer(engine=settings.engine, random_seed=1, processes=settings.training_processes, states=str(out / "states"))
start = Checkpoint("initial_policy", None, "nano", model, model)
rows = json.load(sys.stdin)
summary = trainer.train("preference", start, rows, optimization.training, out / "out", optimization.loss)
print(json.dumps([summary.history, loss_module(optimization.loss.kind).REWARD_AXIS]))
"""
COMPARE = """
import json, sys
from pathlib import Path
from resources.scoring.published import fetch_reward_model
from resources.scoring.scorer import RewardScorer
from resources.settings.files import load_settings
from resources.storage.checkpoint_store import Checkpoint
def compare(settings):
    directory, _ = fetch_reward_model(settings.scorer, False)
    scorer = RewardScorer(shards=sys.argv[1], engine=settings.engine, scorer=settings.scorer)
    model = Checkpoint("reward_model", None, "nano", str(directory), str(directory))
    compared = scorer.compare(model, [("Which one?", "This one.", "No idea, but it may be the other one.")])
    return [compared.first_scores[0] + compared.second_scores[0], compared.usage.tokens, compared.convention]
print(json.dumps([compare(load_settings(Path(file))) for file in sys.argv[2:]]))
"""


MATERIALIZE = """
import json, sys
from pathlib import Path
import dagster as dg
from definitions import build
from resources.settings.files import load_settings
from synpo_assets.graph.lineage import links_of
home = Path(sys.argv[1])
definitions, services = build(load_settings(home / "settings.yaml"), home)
resources = {"services": services, "tables": services.tables, "checkpoints": services.checkpoints}
with dg.DagsterInstance.from_config(str(home)) as instance:
    dg.materialize(definitions.assets, instance=instance, resources=resources, partition_key="0001",
                   selection=["polished_responses", "preference_pairs"])
links = links_of(services.graph)
print(json.dumps([links["preference_pairs"].made_from["chosen_response_id"], links["polished_responses"].made_from]))
"""


@pytest.fixture
def tree(tmp_path):
    for name in ("resources", "synpo_assets"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "definitions.py", tmp_path / "tree")
    return tmp_path / "tree"


def follow(recipe, tree):
    """Writes each block of code to the place that its first line names: a new file, or in place of what it defines."""
    text = (ROOT / "README.md").read_text().partition(f"<!-- {recipe} -->\n")[2]
    blocks = re.findall(r"```python\n# (\S+?)(?:, [^\n]*)?\n(.+?)```", re.split(r"\n(?=<!-- |## )", text)[0], re.DOTALL)
    assert blocks
    assert sum(bool(line) for _, code in blocks for line in code.splitlines()) <= 18
    for place, code in blocks:
        file = tree / place
        if not file.exists():
            file.write_text(code)
            continue
        name, lines = target(ast.parse(code).body[-1]), file.read_text().splitlines(keepends=True)
        (old,) = (node for node in ast.parse("".join(lines)).body if target(node) == name)
        file.write_text("".join([*lines[: old.lineno - 1], code, *lines[old.end_lineno :]]))


def target(node):
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return getattr(targets[0], "id", None)


def run(code, tree, *arguments, said=""):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], input=said, capture_output=True, text=True,
        cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_adding_a_loss(tmp_path, tree, nano_model):
    follow("recipe:loss", tree)
    settings = nano_settings(nano_model)
    settings["preference_optimization"] |= {"loss": {"kind": "ipo", "beta": 0.1}}
    file = write_settings(tmp_path / "ipo.yaml", settings)
    history, axis = run(TRAIN, tree, file, nano_model, tmp_path, said=json.dumps(pairs()))
    assert len(history) == 2
    # Before the first step M_t is its own reference: (0 - 1 / (2 beta))^2.
    assert history[0]["loss"] == pytest.approx(25, abs=1e-2)
    assert history[1]["loss"] != pytest.approx(25, abs=1e-2)
    assert axis.startswith("reward")


def test_adding_a_scorer(tmp_path, tree, nano_model, classifier):
    follow("recipe:scorer", tree)
    settings = nano_settings(nano_model)
    settings["judge"] = {"training": settings["scorer"]["training"]}
    kinds = {kind: {"kind": kind, "name": str(classifier), "max_length": 400} for kind in ("pretrained", "brief")}
    files = [write_settings(tmp_path / f"{kind}.yaml", settings | {"scorer": scorer}) for kind, scorer in kinds.items()]
    (plain, tokens, convention), brief = run(COMPARE, tree, tmp_path / "shards", *files)
    assert brief == [pytest.approx(plain - 0.01 * tokens), tokens, convention]


def test_adding_a_stage(tmp_path, tree, nano_run):
    follow("recipe:stage", tree)
    home = shutil.copytree(nano_run.home, tmp_path / "home")
    chosen, origin = run(MATERIALIZE, tree, home)
    assert (chosen, origin) == ("polished_responses", {"base_response_id": "base_responses"})
    pairs = pl.read_parquet(home / "tables" / "preference_pairs" / "0001.parquet")
    texts = [messages[-1]["content"] for messages in pairs["chosen"].to_list()]
    assert any(text != text.upper() for text in texts)
    assert texts == [text.lower() for text in texts]
    # Nothing was told of the new stage, and yet the report and the summary count it.
    assert (home / "metrics" / "polished_responses" / "0001.parquet").exists()
