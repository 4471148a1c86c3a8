"""Which settings make which assets stale: no more, no less. Each case builds the graph with one setting changed."""

import json
from pathlib import Path

import pytest
import yaml

from definitions import build
from resources.settings.files import load_settings
from tests.conftest import HOME
from tests.nano import nano_settings, write_settings

GENERATED = {
    "synthetic_prompts", "self_instruct_prompts", "base_responses", "rejected_responses", "seed_responses",
    "refined_responses",
}  # fmt: skip
TRAINED = {"prompt_generator", "reward_model", "judge_model", "response_improver", "model_checkpoint"}
NANO = nano_settings(Path())["scorer"]["training"]
SCORER_TRAINING = NANO | {"lora": NANO["lora"] | {"last_layers": 8}}
CASES = {
    "preference_optimization.loss.beta": (7.5, {"model_checkpoint"}),
    "preference_optimization.policy_init": ("previous", {"model_checkpoint"}),
    "preference_optimization.loss": ({"kind": "dpo", "beta": 0.1}, {"model_checkpoint"}),
    "preference_optimization.accumulate": (False, {"model_checkpoint"}),
    "preference_optimization.equal_steps_control": (
        True, {"equal_steps_checkpoint", "equal_steps_evaluation", "equal_steps_gold", "equal_steps_instructions"}
    ),
    "preferences.margin_threshold": (0.5, {"preference_pairs"}),
    "preferences.rejected_from": ("previous", {"preference_pairs", "rejected_responses"}),
    "preferences.chosen_from": (
        "ranked_samples",
        {"seed_pairs", "synthetic_prompts", "preference_pairs", "rejected_responses", "chosen_responses"},
    ),
    "prompt_generator.min_words": (3, {"synthetic_prompts", "self_instruct_prompts", "prompt_diversity"}),
    "prompt_generator.prompts_per_iteration": (9, {"synthetic_prompts", "keyword_sets", "self_instruct_prompts"}),
    "prompt_generator.sampling.temperature": (0.9, {"synthetic_prompts", "self_instruct_prompts"}),
    "diversity.sample_size": (7, {"prompt_diversity", "self_instruct_prompts"}),
    "diversity.embedding_model.name": ("/elsewhere", {"prompt_diversity", "gold_comparison"}),
    "diversity.self_instruct_shots": (2, {"self_instruct_prompts"}),
    "prompt_generator.training.epochs": (2, {"prompt_generator", "synthetic_prompts"}),
    "keyword_pool.drop_personal_names": (False, {"keyword_pool", "prompt_generator"}),
    "keyword_pool.keywords_per_set": (2, {"keyword_pool", "prompt_generator"}),
    "prompt_generator.noise_keywords": (0, {"prompt_generator", "synthetic_prompts"}),
    "response_improver.sampling.temperature": (0.9, {"refined_responses"}),
    "response_improver.damaged_copies": (1, {"seed_pairs", "response_improver", "improver_edits"}),
    "response_improver.init_from": ("previous", {"response_improver"}),
    "response_improver.samples": (3, {"best_rewrites", "preference_pairs"}),
    "preferences.max_length_ratio": (1.25, {"preference_pairs"}),
    "response_improver.margin_threshold": (0.3, {"response_improver"}),
    "responses.sampling.temperature": (
        0.9, {"reward_model", "judge_model", "seed_responses", "base_responses", "rejected_responses", "evaluation",
              "instruction_following"}
    ),
    "engine.dtype": (
        "bfloat16",
        GENERATED | TRAINED | {
            "preference_pairs", "evaluation", "instruction_following", "gold_comparison", "prompt_diversity",
        },
    ),
    "engine.kind": (
        "transformers",
        GENERATED | {"reward_model", "judge_model", "evaluation", "instruction_following"},
    ),
    # What a margin is, with a judge that is trained as before.
    "scorer, judge": (
        [{"kind": "pair_ranker", "name": "some/ranker", "max_length": 320}, {"training": SCORER_TRAINING, "max_length": 320}],
        {"seed_pairs", "reward_model", "seed_responses", "preference_pairs", "evaluation"},
    ),
    "judge": ({"kind": "pretrained", "name": "some/model", "max_length": 320}, {"seed_pairs", "judge_model"}),
    # The file leaves the judge out, so it is trained like the scorer.
    "scorer.training.epochs": (2, {"reward_model", "judge_model"}),
    "judge.training.epochs": (2, {"judge_model"}),
    "judge.max_length": (99, {"judge_model", "evaluation"}),
    "evaluation.instruction_samples": (2, {"instruction_following"}),
    "judge.server": ({"url": "http://127.0.0.1:1/v1", "model": "m"}, {"evaluation", "prompt_diversity"}),
    "seed_data.scorer_limit": (9, {"seed_pairs", "verifiable_instructions"}),
    "seed_data.verifiable_limit": (9, {"seed_pairs", "verifiable_instructions"}),
    "seed_data.judge_limit": (9, {"seed_pairs", "verifiable_instructions"}),
    "engine.threads": (2, set()),
    "engine.shard_rows": (5, set()),
    "checks.min_win_rate": (0.9, set()),
    "checks.min_sigmoid_argument": (-2.0, set()),
    "automation.target_iterations": (2, set()),
    "gate.maximum": ({"mean_repetition": 0.5}, {"promotion"}),
    "publishing.license": ("apache-2.0", {"published_dataset", "published_model"}),
    "benchmarks.tasks": (["six_more"], {"benchmark_scores"}),
    "benchmarks.batch_size": (2, set()),
    "benchmarks.mt_bench": ("/question.jsonl", {"benchmark_answers"}),
    "storage.artifacts": ("memory://x", set()),
    "max_iterations": (5, set()),
}  # fmt: skip


def changed(base, setting, value):
    # Through JSON, so that sections which the file shares by an alias become separate.
    settings = place = json.loads(json.dumps(base))
    if ", " in setting:
        return settings | dict(zip(setting.split(", "), value, strict=True))
    *sections, last = setting.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return settings


def versions_with(home, settings):
    _, services = build(load_settings(write_settings(home / "settings.yaml", settings)), home)
    graph = services.graph
    return {key.to_user_string(): graph.get(key).code_version for key in graph.materializable_asset_keys}


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    home, base = tmp_path_factory.mktemp("stale"), yaml.safe_load((HOME / "settings.yaml").read_text())
    cases = {"": base} | {name: changed(base, name, value) for name, (value, _) in CASES.items()}
    return {name: versions_with(home, settings) for name, settings in cases.items()}


@pytest.mark.parametrize("setting", CASES)
def test_a_setting_makes_exactly_the_assets_stale_that_it_decides(versions, setting):
    stale = {asset for asset, version in versions[setting].items() if version != versions[""].get(asset)}
    assert stale == CASES[setting][1]


def test_right_answers_that_stay_decide_the_improver_alone(tmp_path):
    """Only a verifier lets them stay."""
    base = yaml.safe_load((HOME / "settings.yaml").read_text())
    base = changed(base, "scorer.kind", "verifier")
    before, after = (
        versions_with(tmp_path, changed(base, "response_improver.keep_right_answers", keeps)) for keeps in (False, True)
    )
    assert {asset for asset, version in after.items() if version != before[asset]} == {"response_improver"}
