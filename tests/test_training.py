"""Training on the nano model: the losses are what the formulas say, and nothing half-made is left."""

import json
import math
import os
from pathlib import Path

import dagster as dg
import pytest
import torch

from resources.common import progress
from resources.models.chat import load_tokenizer, prompt_text
from resources.models.device import told_by_driver, torch_dtype, trains_in_bfloat16
from resources.settings.machine import Engine, RayCluster
from resources.settings.training import PreferenceTraining, SimPO, Training, TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint
from resources.training.trainer import Trainer, TrainingError
from tests.nano import seed_rows

ROWS = seed_rows()[:8]
LORA = {"rank": 4, "alpha": 8}
SFT = Training(learning_rate=1e-3, batch_size=4, micro_batch_size=4, max_length=400, lora=LORA, scheduler="constant",
               warmup_ratio=0)  # fmt: skip
PAIRED = PreferenceTraining(**SFT.model_dump(), max_prompt_length=200, max_completion_length=150)
SIMPO = SimPO(beta=2.5, gamma=1.25)
EXAMPLES = [([{"role": "user", "content": row["prompt"]}], row["answer"]) for row in ROWS]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def pairs(rows=ROWS, **changes):
    finished = {"chosen_finish_reason": "stop", "rejected_finish_reason": "stop"}
    return [
        {
            "prompt": user(row["prompt"]),
            "chosen": assistant(row["answer"]),
            "rejected": assistant("I do not know that."),
        }
        | finished
        | changes
        for row in rows
    ]


@pytest.fixture
def trainer(tmp_path):
    return Trainer(
        engine=Engine(threads=1, dtype="float32"),
        random_seed=1,
        processes=TrainingProcesses(),
        states=str(tmp_path / "training"),
    )


def mean_log_probability(model, tokenizer, messages, answer):
    """Average log-probability of an answer and its end-of-turn token, computed from the logits by hand."""
    prompt = tokenizer(prompt_text(tokenizer, messages), add_special_tokens=False).input_ids
    whole = torch.tensor([[*prompt, *tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids]])
    with torch.no_grad():
        log_probabilities = model(whole).logits.log_softmax(-1)
    terms = [log_probabilities[0, place - 1, whole[0, place]].item() for place in range(len(prompt), whole.shape[1])]
    return sum(terms) / len(terms)


def test_the_simpo_loss_is_the_papers_formula(tmp_path, trainer, nano_checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nano_checkpoint.weights)
    tokenizer = load_tokenizer(nano_checkpoint.weights)
    losses = []
    for pair in pairs()[:4]:
        chosen, rejected = (
            mean_log_probability(model, tokenizer, pair["prompt"], pair[side][0]["content"])
            for side in ("chosen", "rejected")
        )
        losses.append(math.log1p(math.exp(-(SIMPO.beta * (chosen - rejected) - SIMPO.gamma))))
    summary = trainer.train("preference", nano_checkpoint, pairs()[:4], PAIRED, tmp_path, SIMPO)
    assert summary.history[0]["loss"] == pytest.approx(sum(losses) / 4, abs=1e-3)


def test_golden_numbers_of_the_simpo_loss():
    """-log sigmoid(beta (a - b) - gamma), by hand: beta 2, gamma 1.6, a -1, b -2 -> log(1 + e^-0.4)."""
    from trl.experimental.cpo import CPOTrainer

    class Loss:
        alpha, beta, simpo_gamma, loss_type, label_smoothing = 0.0, 2.0, 1.6, "simpo", 0.0
        accelerator = type("Accelerator", (), {"device": "cpu"})

    loss, chosen, rejected = CPOTrainer.cpo_loss(Loss, torch.tensor([-1.0]), torch.tensor([-2.0]))
    assert loss.item() == pytest.approx(0.513015, abs=1e-6)
    assert (chosen.item(), rejected.item()) == (-2.0, -4.0)


def test_the_cpu_loss_of_supervised_training_is_trls(tmp_path, trainer, nano_checkpoint, monkeypatch):
    from trl import SFTTrainer

    import resources.training.cpu_sft

    ours = trainer.train("supervised", nano_checkpoint, EXAMPLES, SFT, tmp_path / "ours")
    monkeypatch.setattr(resources.training.cpu_sft, "CpuSFTTrainer", SFTTrainer)
    theirs = trainer.train("supervised", nano_checkpoint, EXAMPLES, SFT, tmp_path / "theirs")
    assert ours.steps == theirs.steps == 2
    for mine, trl in zip(ours.history, theirs.history, strict=True):
        assert mine["loss"] == pytest.approx(trl["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(trl["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("whose", ["CpuSFTTrainer", "SFTTrainer"])
def test_examples_laid_end_to_end_have_the_loss_of_padded_ones(tmp_path, trainer, nano_checkpoint, monkeypatch, whose):
    import trl

    import resources.training.cpu_sft

    monkeypatch.setattr(resources.training.cpu_sft, "CpuSFTTrainer", vars(resources.training.cpu_sft)[whose])
    rows, collate = [], trl.trainer.sft_trainer.DataCollatorForLanguageModeling.torch_call

    def noting(self, examples):
        rows.append(collate(self, examples))
        return rows[-1]

    monkeypatch.setattr(trl.trainer.sft_trainer.DataCollatorForLanguageModeling, "torch_call", noting)
    histories = []
    for end_to_end in (False, True):
        told = trainer.model_copy(update={"processes": TrainingProcesses(padding_free=end_to_end)})
        made = told.train("supervised", nano_checkpoint, EXAMPLES, SFT, tmp_path / str(end_to_end))
        histories.append([(step["loss"], step["grad_norm"]) for step in made.history])
    assert {len(row["input_ids"]) for row in rows} == {1, SFT.micro_batch_size}
    for padded, laid in zip(*histories, strict=True):
        assert laid == pytest.approx(padded, rel=1e-3)


def test_examples_are_laid_end_to_end_where_attention_reads_each_by_itself(trainer):
    flash = trainer.engine.model_copy(update={"attention": "flash_attention_2"})
    with_flash = trainer.model_copy(update={"engine": flash})
    told = with_flash.model_copy(update={"processes": TrainingProcesses(padding_free=False)})
    assert [one._padding_free() for one in (trainer, with_flash, told)] == [False, True, False]


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_products_in_bfloat16_change_the_loss_little_and_keep_float32_weights(
    tmp_path, trainer, nano_checkpoint, monkeypatch, kind
):
    from safetensors.torch import load_file

    given = (EXAMPLES, SFT) if kind == "supervised" else (pairs()[:8], PAIRED)
    losses = []
    for in_bfloat16 in (False, True):
        monkeypatch.setattr("resources.training.trainer.trains_in_bfloat16", lambda *_, told=in_bfloat16: told)
        made = trainer.train(
            kind, nano_checkpoint, *given, tmp_path / str(in_bfloat16), SIMPO if kind == "preference" else None
        )
        losses.append([step["loss"] for step in made.history])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.005)
    # What a step changed depends on how its machine rounds.
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
    weights = load_file(tmp_path / "True" / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "device", "instructions", "expected"),
    [
        ("auto", "cuda", set(), True), ("float32", "cuda", set(), False), ("auto", "cpu", {"avx2"}, False),
        ("auto", "cpu", {"avx512_bf16"}, True), ("bfloat16", "cpu", {"amx_bf16"}, True),
        ("float32", "cpu", {"avx512_bf16"}, False),
    ],
)  # fmt: skip
def test_only_what_multiplies_bfloat16_fast_uses_it(monkeypatch, dtype, device, instructions, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True), raising=False)
    engine = Engine(dtype=dtype, device=device)
    assert trains_in_bfloat16(engine, device) == expected
    assert (torch_dtype(engine) == torch.bfloat16) == expected
    if device == "cpu" and dtype == "auto":
        # Whose CPUs these are is not known here.
        assert torch_dtype(engine.model_copy(update={"ray": RayCluster()})) == torch.float32


@pytest.mark.parametrize(("told", "expected"), [("7.5", False), ("9.0\n7.5", False), ("8.0\n9.0", True), ("N/A", True)])
def test_gpus_without_bfloat16_compute_in_float32(tmp_path, monkeypatch, told, expected):
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\nprintf '{told}\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told_by_driver.cache_clear()
    engine = Engine(device="cuda")
    assert (torch_dtype(engine) == torch.bfloat16) == trains_in_bfloat16(engine, "cuda") == expected
    # What the workers of a cluster have is not known here.
    assert torch_dtype(engine.model_copy(update={"ray": RayCluster()})) == torch.bfloat16
    assert torch_dtype(Engine(device="cuda", dtype="bfloat16")) == torch.bfloat16
    told_by_driver.cache_clear()


def test_a_model_that_scales_its_logits_learns_by_its_own_loss(tmp_path, trainer, nano_model, monkeypatch):
    from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM
    from trl import SFTTrainer

    import resources.training.cpu_sft

    shape = AutoModelForCausalLM.from_pretrained(nano_model).config.to_dict()
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    config = GraniteConfig(
        **{name: shape[name] for name in (*names, "eos_token_id", "pad_token_id")}, logits_scaling=8.0
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    load_tokenizer(str(nano_model)).save_pretrained(tmp_path / "granite")
    granite = Checkpoint("initial_policy", None, "granite", str(tmp_path / "granite"), str(tmp_path / "granite"))
    ours = trainer.train("supervised", granite, EXAMPLES, SFT, tmp_path / "ours")
    monkeypatch.setattr(resources.training.cpu_sft, "CpuSFTTrainer", SFTTrainer)
    theirs = trainer.train("supervised", granite, EXAMPLES, SFT, tmp_path / "theirs")
    assert [entry["loss"] for entry in ours.history] == pytest.approx(
        [entry["loss"] for entry in theirs.history], abs=1e-4
    )


def test_only_the_answer_is_learned(tmp_path, trainer, nano_checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nano_checkpoint.weights)
    tokenizer = load_tokenizer(nano_checkpoint.weights)
    total = count = 0.0
    for messages, answer in EXAMPLES[:4]:
        tokens = len(tokenizer(answer).input_ids) + 1
        total -= mean_log_probability(model, tokenizer, messages, answer) * tokens
        count += tokens
    summary = trainer.train("supervised", nano_checkpoint, EXAMPLES[:4], SFT, tmp_path)
    assert summary.history[0]["loss"] == pytest.approx(total / count, abs=1e-3)


@pytest.mark.parametrize("lora", [LORA, None])
def test_training_changes_the_weights_that_generate(tmp_path, trainer, nano_checkpoint, lora):
    from safetensors.torch import load_file

    training = SFT.model_copy(
        update={"learning_rate": 0.1, "lora": lora and Training.model_validate(SFT.model_dump()).lora}
    )
    trainer.train("supervised", nano_checkpoint, EXAMPLES, training, tmp_path)
    before = load_file(Path(nano_checkpoint.weights) / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-3 for name in before)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() == (lora is not None)
    assert load_tokenizer(str(tmp_path / "merged")).chat_template
    assert len((tmp_path / "trainer_log.jsonl").read_text().splitlines()) == 2


def test_last_layers_only(tmp_path, trainer, nano_checkpoint):
    from safetensors.torch import load_file

    lora = SFT.lora.model_copy(update={"last_layers": 1})
    trainer.train("supervised", nano_checkpoint, EXAMPLES, SFT.model_copy(update={"lora": lora}), tmp_path)
    adapted = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapted
    assert all(".layers.1." in name for name in adapted)


def test_the_merged_copy_equals_base_plus_adapter(tmp_path, trainer, nano_checkpoint):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    training = PAIRED.model_copy(update={"learning_rate": 0.05})
    trainer.train("preference", nano_checkpoint, pairs(), training, tmp_path, SIMPO)
    base = AutoModelForCausalLM.from_pretrained(nano_checkpoint.weights)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(20)[None]
    assert torch.allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-3)


def test_long_sides_are_cut_before_the_trainer_and_empty_ones_left_out(tmp_path, trainer, nano_checkpoint):
    rows = pairs(ROWS[:3])
    rows[0]["rejected"] = assistant("  ")
    rows[1]["chosen"] = assistant("word " * 2000)
    rows[2]["prompt"] = user("word " * 2000)
    summary = trainer.train("preference", nano_checkpoint, rows, PAIRED, tmp_path, SIMPO)
    assert (summary.examples, summary.dropped, summary.truncated) == (2, 1, 2)
    assert all(math.isfinite(entry["loss"]) for entry in summary.history)


def test_nothing_to_train_on_is_said(tmp_path, trainer, nano_checkpoint):
    with pytest.raises(TrainingError, match=r"None of the 1 examples can be trained on.*training\.max_length"):
        trainer.train("supervised", nano_checkpoint, [(user("x " * 900), "y")], SFT, tmp_path)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, trainer, nano_checkpoint, nano_model):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in nano_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(weights | {name: weights[name] * float("nan")}, broken / "model.safetensors", metadata={"format": "pt"})
    start = Checkpoint("initial_policy", None, "broken", str(broken), str(broken))
    with pytest.raises(TrainingError, match=r"The training loss became nan at step 1.*training\.learning_rate"):
        trainer.train("preference", start, pairs(), PAIRED, tmp_path / "out", SIMPO)
    assert not (tmp_path / "out" / "merged").exists()


def test_subsets_are_random_and_repeatable(trainer):
    subset = trainer._subset(list(range(100)), 10)
    assert len(subset) == 10
    assert subset == sorted(subset)
    assert subset == trainer._subset(list(range(100)), 10)
    assert subset != list(range(10))


def test_the_progress_line_has_count_rate_and_time_left(tmp_path, trainer, nano_checkpoint, said, monkeypatch):
    # Each step takes longer than it may be silent.
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.002)
    trainer.train("supervised", nano_checkpoint, EXAMPLES, SFT, tmp_path)
    said = [line for line in said if not line.startswith("Merging")]
    first = next(place for place, line in enumerate(said) if line.startswith("Step 1 of 2, loss "))
    assert all(line.startswith("Step ") for line in said[first:])
    assert said[-1].startswith("Step 2 of 2, loss ")
    assert said[-1].endswith("s/step, 0 s left.")
    assert "reward" not in said[-1]
    assert json.loads((tmp_path / "trainer_log.jsonl").read_text().splitlines()[0])["step"] == 1


def test_the_progress_line_of_preferences_has_accuracy_and_gap(tmp_path, trainer, nano_checkpoint, said):
    summary = trainer.train("preference", nano_checkpoint, pairs(), PAIRED, tmp_path / "out", SIMPO)
    logged = summary.history[1]
    accuracy, gap = logged["rewards/accuracies"], logged["rewards/margins"] / 2.5
    assert f"loss {logged['loss']:.3f}, reward accuracy {accuracy:.0%}, gap {gap:+.3f} nats per token, " in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("most", "steps"), [(50, [1, 2, 3, 4, 5]), (2, [3, 5])])
def test_the_loss_is_observed_while_it_trains(tmp_path, trainer, nano_checkpoint, monkeypatch, most, steps):
    """The UI plots what is observed; of a long training, evenly chosen steps."""
    monkeypatch.setattr("resources.training.live.MOST_OBSERVATIONS", most)
    training, summaries = PAIRED.model_copy(update={"epochs": 2.5}), []

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["0001"]))
    def model_checkpoint():
        summaries.append(trainer.train("preference", nano_checkpoint, pairs(), training, tmp_path / "out", SIMPO))

    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([model_checkpoint], instance=instance, partition_key="0001")
        records = instance.fetch_observations(dg.AssetKey("model_checkpoint"), limit=99).records
    observed = [(record.partition_key, record.event_log_entry.asset_observation.metadata) for record in records[::-1]]
    assert [(key, shown["step"].value) for key, shown in observed] == [("0001", step) for step in steps]
    logged = {entry["step"]: entry for entry in summaries[0].history}
    for _, shown in observed:
        for name in ("loss", "rewards/margins", "rewards/accuracies"):
            assert shown[name].value == pytest.approx(logged[shown["step"].value][name])
    assert summaries[0].tracked is None


def test_each_side_ends_as_it_was_written(nano_checkpoint):
    """The trainer gets exactly the ids that generation uses: one end of turn, and none on an answer that was cut."""
    from resources.models.chat import prompt_ids
    from resources.training.rows import ExactTokenIds, preference_row

    tokenizer = load_tokenizer(nano_checkpoint.weights)
    # A tokenizer whose EOS is not the end-of-turn token and whose BOS nobody writes: both would be added by TRL.
    tokenizer.eos_token = tokenizer.bos_token = "<|endoftext|>"
    (pair,) = pairs(ROWS[:1], rejected_finish_reason="length")
    row, cut = preference_row(tokenizer, pair, PAIRED)
    assert cut == 0
    laid_out = ExactTokenIds().tokenize_row(row)
    prompt = prompt_ids(tokenizer, pair["prompt"])
    chosen = tokenizer(ROWS[0]["answer"] + "<|im_end|>").input_ids
    assert laid_out["chosen_input_ids"] == prompt + chosen
    assert laid_out["chosen_labels"] == [-100] * len(prompt) + chosen
    assert laid_out["rejected_input_ids"] == prompt + tokenizer("I do not know that.").input_ids
    assert laid_out["prompt_input_ids"] == prompt


def test_a_run_of_one_step_learns_something(tmp_path, trainer, nano_checkpoint):
    training = PAIRED.model_copy(update={"batch_size": 8, "warmup_ratio": 0.1, "scheduler": "cosine"})
    summary = trainer.train("preference", nano_checkpoint, pairs(), training, tmp_path, SIMPO)
    assert summary.steps == 1
    assert summary.history[0]["learning_rate"] > 0


def test_without_a_length_of_its_own_a_side_has_what_the_prompt_leaves(nano_checkpoint):
    from resources.training.rows import preference_row

    tokenizer, pair = load_tokenizer(nano_checkpoint.weights), pairs()[0]
    whole = PAIRED.model_copy(update={"max_length": 400, "max_completion_length": None})
    row, cut = preference_row(tokenizer, pair, whole)
    assert cut == 0
    room = len(row["chosen_ids"]) - 1
    tight = whole.model_copy(update={"max_length": len(row["prompt_ids"]) + room})
    short, cut = preference_row(tokenizer, pair, tight)
    # Nor is the other side closed, though there is room: one closed beside one that is not would teach to end.
    assert (short["chosen_ids"], short["rejected_ids"], cut) == (row["chosen_ids"][:room], row["rejected_ids"][:-1], 1)
    assert row["rejected_ids"][-1] == row["chosen_ids"][-1] == tokenizer.eos_token_id


def test_of_a_pair_for_the_reward_model_both_sides_are_closed_or_neither_is(nano_checkpoint):
    from resources.training.rows import reward_rows

    tokenizer, asked = (
        load_tokenizer(nano_checkpoint.weights),
        [("Name a fruit.", "A pear, " * 9 + "or a plum.", "Pear.")],
    )
    longest = SFT.model_copy(update={"max_length": 400})
    (whole,) = reward_rows(tokenizer, asked, longest).rows
    tight = SFT.model_copy(update={"max_length": len(whole["chosen_ids"]) - 1})
    cut = reward_rows(tokenizer, asked, tight)
    assert (cut.truncated, cut.rows[0]["chosen_ids"]) == (1, whole["chosen_ids"][:-1])
    assert cut.rows[0]["rejected_ids"] == whole["rejected_ids"][:-1]
    # Nothing of it is left, so it counts as dropped.
    dropped = reward_rows(tokenizer, asked, SFT.model_copy(update={"max_length": 1}))
    assert (dropped.rows, dropped.truncated) == ([], 0)


SLOW_BUT_ONE = ["preference", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("supervised", "reward"))]


@pytest.mark.parametrize("kind", SLOW_BUT_ONE)
def test_batches_of_like_length_and_activations_made_twice_change_order_and_memory_alone(
    tmp_path, trainer, nano_checkpoint, monkeypatch, kind
):
    from resources.training import rows, run

    examples = {
        "supervised": EXAMPLES, "preference": pairs(), "reward": [(row["prompt"], row["answer"], "No.") for row in ROWS]
    }[kind] * 4  # fmt: skip
    training = (PAIRED if kind == "preference" else SFT).model_copy(update={"batch_size": 2, "micro_batch_size": 2})
    orders = []

    class Noting(rows.GroupedByLength):
        def _get_train_sampler(self, train_dataset=None):
            sampler = super()._get_train_sampler(train_dataset)
            orders.append([self.train_dataset[place]["length"] for place in sampler])
            return sampler

    def losses(name, by=trainer, **changes):
        chosen = training.model_copy(update=changes)
        loss = SIMPO if kind == "preference" else None
        made = by.train(kind, nano_checkpoint, examples, chosen, tmp_path / name, loss, steps=2)
        return [entry["loss"] for entry in made.history]

    checkpointing = trainer.model_copy(update={"processes": TrainingProcesses(gradient_checkpointing=True)})
    assert losses("again", checkpointing) == pytest.approx(losses("plain"), abs=1e-4)
    monkeypatch.setattr(run, "GroupedByLength", Noting)
    for grouped in (False, True):
        losses(f"grouped {grouped}", group_by_length=grouped)
    at_random, alike = (sum(abs(a - b) for a, b in zip(order[::2], order[1::2], strict=True)) for order in orders)
    assert sorted(orders[0]) == sorted(orders[1])
    assert alike < at_random / 2
