"""Which settings make which assets stale: no more, no less. Each case loads the code location with one setting changed."""

import json
import subprocess
import sys

import pytest

from tests.conftest import HOME
from tests.test_structure import ROOT

GENERATED = {
    "synthetic_prompts", "self_instruct_prompts", "base_responses", "initial_responses", "seed_responses",
    "refined_responses",
}  # fmt: skip
TRAINED = {"prompt_generator", "reward_model", "judge_model", "response_improver", "model_checkpoint"}
CASES = {
    "policy.training.beta": (7.5, {"model_checkpoint"}),
    "policy.policy_init": ("previous", {"model_checkpoint"}),
    "policy.training.loss": ("dpo", {"model_checkpoint"}),
    "policy.accumulate": (False, {"model_checkpoint"}),
    "preferences.margin_threshold": (0.5, {"preference_pairs"}),
    "preferences.rejected_from": ("previous", {"preference_pairs", "initial_responses"}),
    "preferences.chosen_from": ("ranked_samples", {"preference_pairs", "initial_responses", "refined_responses"}),
    "prompt_generator.min_words": (3, {"synthetic_prompts"}),
    "prompt_generator.prompts_per_iteration": (9, {"synthetic_prompts", "keyword_sets", "self_instruct_prompts"}),
    "prompt_generator.sampling.temperature": (0.9, {"synthetic_prompts", "self_instruct_prompts"}),
    "diversity.sample_size": (7, {"prompt_diversity"}),
    "diversity.embedding_model.name": ("/elsewhere", {"prompt_diversity", "gold_comparison"}),
    "diversity.self_instruct_shots": (2, {"self_instruct_prompts"}),
    "prompt_generator.training.epochs": (2, {"prompt_generator", "synthetic_prompts"}),
    "keyword_pool.drop_personal_names": (False, {"keyword_pool", "prompt_generator"}),
    "keyword_pool.keywords_per_set": (2, {"keyword_pool", "prompt_generator"}),
    "prompt_generator.noise_keywords": (0, {"prompt_generator", "synthetic_prompts"}),
    "response_improver.sampling.temperature": (0.9, {"refined_responses"}),
    "response_improver.margin_threshold": (0.3, {"response_improver"}),
    "responses.sampling.temperature": (
        0.9, {"reward_model", "judge_model", "seed_responses", "base_responses", "initial_responses", "evaluation",
              "instruction_following"}
    ),
    "engine.dtype": (
        "bfloat16",
        GENERATED | TRAINED | {
            "preference_pairs", "evaluation", "instruction_following", "gold_comparison", "benchmark_scores", "benchmark_answers"
        },
    ),
    "engine.kind": (
        "transformers",
        GENERATED | {"reward_model", "judge_model", "evaluation", "instruction_following", "benchmark_answers"},
    ),
    "scorer.pair_convention": (
        "one_order", {"reward_model", "seed_responses", "preference_pairs", "evaluation"}
    ),
    # The file leaves the judge out, so it is trained like the scorer.
    "scorer.training.epochs": (2, {"reward_model", "judge_model"}),
    "judge.training.epochs": (2, {"judge_model"}),
    "judge.max_length": (99, {"judge_model", "evaluation"}),
    "judge.server": ({"url": "http://127.0.0.1:1/v1", "model": "m"}, {"evaluation", "prompt_diversity"}),
    "seed_data.judge_limit": (9, {"seed_pairs", "verifiable_instructions"}),
    "engine.threads": (2, set()),
    "engine.shard_rows": (5, set()),
    "checks.min_win_rate": (0.9, set()),
    "automation.target_iterations": (2, set()),
    "gate.maximum": ({"mean_repetition": 0.5}, {"promotion"}),
    "publishing.license": ("apache-2.0", {"published_dataset", "published_model"}),
    "benchmarks.tasks": (["six_more"], {"benchmark_scores"}),
    "benchmarks.batch_size": (2, set()),
    "benchmarks.mt_bench": ("/question.jsonl", {"benchmark_answers"}),
    "storage.artifacts": ("memory://x", set()),
    "max_iterations": (5, set()),
}  # fmt: skip
# One process for all cases: it imports Dagster once and the project anew for each.
LOAD = """
import json, os, sys
from pathlib import Path
import yaml
def versions():
    for name in [name for name in sys.modules if name.split(".")[0] in ("definitions", "synpo_assets", "resources")]:
        del sys.modules[name]
    import definitions
    return {asset.key.to_user_string(): asset.code_versions_by_key[asset.key] for asset in definitions.defs.assets}
home = Path(os.environ["SYNPO_HOME"])
found = {"": versions()}
base = (home / "settings.yaml").read_text()
for setting, value in json.loads(sys.stdin.read()).items():
    # Through JSON, so that sections which the file shares by an alias become separate.
    settings = place = json.loads(json.dumps(yaml.safe_load(base)))
    *sections, last = setting.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    (home / "settings.yaml").write_text(yaml.safe_dump(settings))
    found[setting] = versions()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    home = tmp_path_factory.mktemp("stale")
    (home / "settings.yaml").write_text((HOME / "settings.yaml").read_text())
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD],
        input=json.dumps({setting: value for setting, (value, _) in CASES.items()}),
        capture_output=True, text=True, cwd=ROOT, env={"SYNPO_HOME": str(home), "PATH": ""}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("setting", CASES)
def test_a_setting_makes_exactly_the_assets_stale_that_it_decides(versions, setting):
    stale = {asset for asset, version in versions[setting].items() if version != versions[""][asset]}
    assert stale == CASES[setting][1]


def test_an_instruction_template_counts_as_code(tmp_path):
    from types import ModuleType

    from synpo_assets.graph.partitions import code_version

    module = ModuleType("some_method")
    module.__file__ = str(tmp_path / "some_method.py")
    (tmp_path / "some_method.py").write_text("x = 1")
    (tmp_path / "some_method").mkdir()
    template = tmp_path / "some_method" / "instruction.jinja"
    template.write_text("Improve this.")
    before = code_version(module)
    assert code_version(module) == before
    template.write_text("Improve that.")
    assert code_version(module) != before
