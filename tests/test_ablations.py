"""Ablations of the paper: each is one line of the settings, and changes the data or the training."""

import math

import dagster as dg
import polars as pl
import pytest

from resources.models.chat import load_tokenizer
from resources.settings.files import load_settings
from resources.settings.machine import Engine
from resources.settings.settings import Settings
from resources.settings.training import TrainingProcesses
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.tables import ParquetTables
from resources.training.trainer import Trainer
from synpo_assets.cli.estimate import expected_work
from synpo_assets.graph.history import metadata_of
from synpo_assets.graph.partitions import ITERATIONS
from synpo_assets.graph.presentation import table_output
from synpo_assets.method.keywords import Keywords, training_keywords
from synpo_assets.stages.optimization import model_checkpoint
from tests.nano import nano_settings, seed_rows, write_settings
from tests.test_loop import pairs
from tests.test_training import SIMPO, mean_log_probability
from tests.test_training import pairs as training_pairs


def changed(tmp_path, nano_model, section, **changes) -> Settings:
    """The nano settings with a section changed."""
    settings = nano_settings(nano_model)
    settings[section] = settings.get(section, {}) | changes
    return load_settings(write_settings(tmp_path / "settings.yaml", settings))


@pytest.fixture
def train_second(tmp_path, nano_model):
    """Makes M_2 of two pairs of iteration 1 and three of iteration 2; returns its metadata, its manifest and its rows."""

    def train_second(settings: Settings):
        from resources.models.model_source import fetch_initial_policy

        store = CheckpointStore(str(tmp_path / "checkpoints"))
        trained_on = []

        class Recorder(Trainer):
            def preference(self, start, pairs, *arguments):
                trained_on.append(pairs)
                return super().preference(start, pairs, *arguments)

        @dg.asset(io_manager_key="checkpoints")
        def initial_policy(context: dg.AssetExecutionContext):
            return store.adopt(context, *fetch_initial_policy(settings.initial_policy, False))

        @dg.asset(name="policy", partitions_def=ITERATIONS, io_manager_key="checkpoints")
        def entering(initial_policy):
            return initial_policy

        @dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
        def preference_history(context: dg.AssetExecutionContext):
            return table_output(context, pairs(1, 2))

        @dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
        def preference_pairs(context: dg.AssetExecutionContext):
            return table_output(context, pairs(2, 3))

        resources = {
            "checkpoints": store, "tables": ParquetTables(str(tmp_path / "tables")), "settings": settings,
            "trainer": Recorder(
                engine=settings.engine, random_seed=1, processes=settings.training_processes,
                states=str(tmp_path / "training"),
            ),
        }  # fmt: skip
        assets = [entering, preference_history, preference_pairs, model_checkpoint]
        with dg.DagsterInstance.ephemeral() as instance:
            dg.materialize([initial_policy], instance=instance, resources=resources)
            dg.materialize([initial_policy, *assets], instance=instance, resources=resources, partition_key="0002",
                           selection=assets)  # fmt: skip
            made = store.current("model_checkpoint", "0002")
            return metadata_of(instance, "model_checkpoint", "0002"), made.manifest, trained_on[0]

    return train_second


@pytest.mark.parametrize(("accumulate", "iterations"), [(True, [1, 1, 2, 2, 2]), (False, [2, 2, 2])])
def test_accumulate_decides_which_pairs_are_trained_on(tmp_path, nano_model, train_second, accumulate, iterations):
    metadata, manifest, rows = train_second(changed(tmp_path, nano_model, "policy", accumulate=accumulate))
    names = [f"preference_pairs[{number:04d}]" for number in sorted(set(iterations))]
    assert [row["iteration"] for row in rows] == iterations
    assert list(manifest["trained_on"]) == names
    assert metadata["pairs_by_iteration"] == {str(n): iterations.count(n) for n in sorted(set(iterations))}
    assert ("0001" in metadata["trained_on"]) == accumulate


@pytest.mark.parametrize(("accumulate", "times"), [(True, 2), (False, 1)])
def test_the_estimate_knows_whether_pairs_accumulate(tmp_path, nano_model, accumulate, times):
    settings = changed(tmp_path, nano_model, "policy", accumulate=accumulate,
                       training=nano_settings(nano_model)["policy"]["training"] | {"max_examples": None})  # fmt: skip
    seed = pl.DataFrame({"split": ["train", "held_out"], "prompt": ["a b"] * 2, "answer": ["c d"] * 2})
    (work,) = [item for item in expected_work(settings, seed, 0) if item.asset == "model_checkpoint"]
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


@pytest.mark.parametrize("lora", [SIMPO.lora, None])
def test_the_dpo_loss_is_the_formula_with_the_start_as_reference(tmp_path, nano_checkpoint, lora):
    """The second step's loss, by hand: the model after one step against the start, log-probabilities summed."""
    from transformers import AutoModelForCausalLM

    one = SIMPO.model_copy(update={"loss": "dpo", "beta": 0.3, "lora": lora, "learning_rate": 1e-2})
    trainer = Trainer(
        engine=Engine(threads=1), random_seed=1, processes=TrainingProcesses(), states=str(tmp_path / "s")
    )
    data = training_pairs()[:4]
    first = trainer.preference(nano_checkpoint, data, one, tmp_path / "one", print)
    two = trainer.preference(nano_checkpoint, data, one.model_copy(update={"epochs": 2}), tmp_path / "two", print)
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
        losses.append(math.log1p(math.exp(-one.beta * (ratios["chosen"] - ratios["rejected"]))))
    assert two.history[1]["loss"] == pytest.approx(sum(losses) / 4, abs=2e-3)
    assert abs(two.history[1]["loss"] - math.log(2)) > 0.01


def test_dpo_adds_no_end_to_an_answer_that_was_cut(tmp_path, nano_checkpoint, monkeypatch):
    from resources.training.dpo import DPOTrainer

    batches = []
    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda self, model, inputs, **options: (
        batches.append(inputs) or sum(p.sum() for p in model.parameters() if p.requires_grad)))  # fmt: skip
    trainer = Trainer(
        engine=Engine(threads=1), random_seed=1, processes=TrainingProcesses(), states=str(tmp_path / "s")
    )
    (pair,) = training_pairs(seed_rows()[:1], rejected_finish_reason="length")
    trainer.preference(nano_checkpoint, [pair], SIMPO.model_copy(update={"loss": "dpo"}), tmp_path / "out", print)
    tokenizer = load_tokenizer(nano_checkpoint.weights)
    expected = [pair["chosen"][0]["content"] + "<|im_end|>", "I do not know that."]
    for row, answer in enumerate(expected):
        completion = batches[0]["input_ids"][row][batches[0]["completion_mask"][row].bool()]
        assert completion.tolist() == tokenizer(answer).input_ids
