"""Ablations of the paper: each is one line of the settings, and changes the data or the training."""

import dataclasses
import math

import dagster as dg
import polars as pl
import pytest

from resources.models.chat import load_tokenizer
from resources.settings.files import load_settings
from resources.settings.machine import Engine
from resources.settings.settings import Settings
from resources.settings.training import DPO, TrainingProcesses
from resources.training.trainer import Trainer
from synpo_assets.cli.estimate import expected_work, sizes_of
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import table_output
from synpo_assets.graph.services import Services
from synpo_assets.method.keywords import Keywords, training_keywords
from synpo_assets.stages.improver import response_improver
from synpo_assets.stages.optimization import model_checkpoint
from synpo_assets.stages.seed import initial_policy
from tests.nano import active_settings, nano_settings, write_settings
from tests.stand_ins import ITERATIONS, run, services_in, shown
from tests.stand_ins import instance as instance
from tests.test_improver_edits import POLICIES, RecordingTrainer, seed_responses
from tests.test_loop import pairs
from tests.test_training import PAIRED, mean_log_probability
from tests.test_training import pairs as training_pairs


def changed(tmp_path, nano_model, section, **changes) -> Settings:
    """The nano settings with a section changed."""
    settings = nano_settings(nano_model)
    settings[section] = settings.get(section, {}) | changes
    return load_settings(write_settings(tmp_path / "settings.yaml", settings))


@dg.asset(name="policy", partitions_def=ITERATIONS, io_manager_key="checkpoints")
def entering(initial_policy):
    return initial_policy


@dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
def preference_history(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]):
    return table_output(context, services, pairs(1, 2) if iteration_of(context) > 1 else pairs(1, 2).clear())


@dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
def preference_pairs(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]):
    return table_output(context, services, pairs(iteration_of(context), 3))


@pytest.mark.parametrize(("accumulate", "iterations"), [(True, [1, 1, 2, 2, 2]), (False, [2, 2, 2])])
def test_accumulate_decides_which_pairs_are_trained_on(instance, tmp_path, nano_model, accumulate, iterations):
    """M_2 is made of two pairs of iteration 1 and three of iteration 2."""
    trained_on = []

    class Recorder(Trainer):
        def train(self, kind, start, rows, *arguments):
            trained_on.extend(rows)
            return super().train(kind, start, rows, *arguments)

    services = services_in(
        tmp_path / "home", changed(tmp_path, nano_model, "preference_optimization", accumulate=accumulate)
    )
    services = dataclasses.replace(services, trainer=Recorder(**dict(services.trainer)))
    run([initial_policy], instance, services)
    stages = [initial_policy, entering, preference_history, preference_pairs, model_checkpoint]
    run(
        stages,
        instance,
        services,
        "0002",
        selection=["policy", "preference_history", "preference_pairs", "model_checkpoint"],
    )
    manifest = services.checkpoints.current("model_checkpoint", "0002").manifest
    keys = [f"{number:04d}" for number in sorted(set(iterations))]
    assert [row["iteration"] for row in trained_on] == iterations
    assert list(manifest["trained_on"]) == [f"preference_pairs[{key}]" for key in keys]
    measured = recorded(services.metrics, "0002").every("pairs_of_iteration", "model_checkpoint")
    assert [(metric.of, metric.value) for metric in measured] == [(key, iterations.count(int(key))) for key in keys]
    assert ("0001" in shown(instance, "model_checkpoint", "0002")["trained_on"]) == accumulate


@pytest.mark.parametrize(("chosen", "start"), [("initial", "initial_policy"), ("previous", "policy")])
def test_the_settings_choose_what_improver_and_policy_start_from(instance, tmp_path, chosen, start):
    shared = active_settings()
    improver = shared.response_improver.model_copy(update={"init_from": chosen})
    optimization = shared.preference_optimization.model_copy(update={"policy_init": chosen})
    trainer = RecordingTrainer()
    changed = {"response_improver": improver, "preference_optimization": optimization}
    services = dataclasses.replace(services_in(tmp_path, shared.model_copy(update=changed)), trainer=trainer)
    history = [preference_history, preference_pairs]
    for stages in ([seed_responses, response_improver], [*history, model_checkpoint]):
        run([*POLICIES, *stages], instance, services, "0002")
        assert trainer.start.asset == start
        made = services.checkpoints.current(stages[-1].name, "0002").manifest
        assert made["parents"]["start"]["sha"] == trainer.start.sha


@pytest.mark.parametrize(("accumulate", "times"), [(True, 2), (False, 1)])
def test_the_estimate_knows_whether_pairs_accumulate(tmp_path, nano_model, accumulate, times):
    training = nano_settings(nano_model)["preference_optimization"]["training"] | {"max_examples": None}
    settings = changed(tmp_path, nano_model, "preference_optimization", accumulate=accumulate, training=training)
    seed = pl.DataFrame({"split": ["train", "test"], "prompt": ["a b"] * 2, "answer": ["c d"] * 2})
    planned = expected_work(sizes_of(settings, seed, 0))
    (work,) = [work for stage, work in planned if stage is model_checkpoint]
    assert work.in_iteration(2) == times * work.in_iteration(1)


@pytest.mark.parametrize("preset", ["laptop", "single_gpu", "paper_mistral", "paper_llama3"])
@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, (2, 1)),
        ({"keyword_pool": {"keywords_per_set": 2}}, (1, 1)),
        ({"keyword_pool": {"keywords_per_set": 5}}, (4, 1)),
        ({"prompt_generator": {"noise_keywords": 0}}, (3, 0)),
    ],
)
def test_one_line_decides_the_keywords_the_generator_learns_from(tmp_path, preset, changes, counts):
    settings = load_settings(write_settings(tmp_path / "settings.yaml", {"preset": preset} | changes))
    own, noise = settings.keywords_from_seed_prompt, settings.prompt_generator.noise_keywords
    assert (own, noise) == counts
    prompts = [
        "Explain how photosynthesis converts sunlight into chemical energy inside green leaves",
        "Describe which volcanic eruptions destroyed ancient coastal harbours during winter storms",
    ]
    drawn = training_keywords(prompts, Keywords(), own, noise, random_seed=1)
    for prompt, keywords in zip(prompts, drawn, strict=True):
        assert sum(keyword in prompt.lower() for keyword in keywords) == own
        assert len(keywords) == own + noise == settings.keyword_pool.keywords_per_set


@pytest.mark.slow
@pytest.mark.parametrize("lora", [PAIRED.lora, None])
def test_the_dpo_loss_is_the_formula_with_the_start_as_reference(tmp_path, nano_checkpoint, lora):
    """The second step's loss, by hand: the model after one step against the start, log-probabilities summed."""
    from transformers import AutoModelForCausalLM

    one, loss = PAIRED.model_copy(update={"lora": lora, "learning_rate": 1e-2}), DPO(beta=0.3)
    trainer = Trainer(
        engine=Engine(threads=1, dtype="float32"),
        random_seed=1,
        processes=TrainingProcesses(),
        states=str(tmp_path / "s"),
    )
    data = training_pairs()[:4]
    first = trainer.train("preference", nano_checkpoint, data, one, tmp_path / "one", loss)
    longer = one.model_copy(update={"epochs": 2})
    two = trainer.train("preference", nano_checkpoint, data, longer, tmp_path / "two", loss)
    assert first.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    tokenizer = load_tokenizer(nano_checkpoint.weights)
    reference, model = (
        AutoModelForCausalLM.from_pretrained(weights)
        for weights in (nano_checkpoint.weights, tmp_path / "one" / "merged")
    )
    losses = []
    for pair in data:
        ratios = {}
        for side in ("chosen", "rejected"):
            answer = pair[side][0]["content"]
            after, before = (mean_log_probability(m, tokenizer, pair["prompt"], answer) for m in (model, reference))
            ratios[side] = (after - before) * len(tokenizer(answer + "<|im_end|>").input_ids)
        losses.append(math.log1p(math.exp(-loss.beta * (ratios["chosen"] - ratios["rejected"]))))
    assert two.history[1]["loss"] == pytest.approx(sum(losses) / 4, abs=2e-3)
    assert abs(two.history[1]["loss"] - math.log(2)) > 0.01
