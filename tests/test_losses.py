"""The losses of the preference optimisation on the nano model: each is its formula, on exact token ids, and learns."""

import math

import pytest

from resources.models.chat import load_tokenizer, prompt_ids
from resources.settings.machine import Engine
from resources.settings.training import DPO, ORPO, CPOSimPO, SimPO, TrainingProcesses
from resources.training.losses import loss_module, pairs_text, sigmoid_argument
from resources.training.trainer import Trainer
from tests.nano import seed_rows
from tests.test_training import PAIRED, mean_log_probability, pairs

LOSSES = [SimPO(beta=2.5, gamma=1.25), DPO(beta=0.3), ORPO(beta=0.4), CPOSimPO(beta=2.5, gamma=1.25, alpha=0.7)]


@pytest.fixture
def train(tmp_path, nano_checkpoint):
    def train(loss, rows, kind="preference", **changes):
        trainer = Trainer(
            engine=Engine(threads=1, dtype="float32"),
            random_seed=1,
            processes=TrainingProcesses(),
            states=str(tmp_path / "states"),
        )
        training = PAIRED.model_copy(update=changes)
        return trainer.train(kind, nano_checkpoint, rows, training, tmp_path / "out", loss)

    return train


def simpo(chosen, rejected, beta, gamma):
    return math.log1p(math.exp(gamma - beta * (chosen - rejected)))


def orpo(chosen, rejected):
    odds_chosen, odds_rejected = (math.exp(side) / (1 - math.exp(side)) for side in (chosen, rejected))
    return math.log1p(odds_rejected / odds_chosen)


def test_the_formulas_on_numbers_worked_out_by_hand():
    assert simpo(-1.0, -2.0, 2.0, 1.6) == pytest.approx(0.5130153)
    # Probabilities 1/2 and 1/4 have the odds 1 and 1/3.
    assert orpo(math.log(0.5), math.log(0.25)) == pytest.approx(math.log(4 / 3))


def test_the_first_loss_is_the_formula(train, nano_checkpoint, tmp_path):
    """Log-probabilities from the logits, one text at a time and without padding."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(nano_checkpoint.weights), load_tokenizer(nano_checkpoint.weights)
    )  # fmt: skip
    sides, of_answers, of_texts = [], [], []
    for pair in (rows := pairs()[:4]):
        texts = [pair[side][0]["content"] for side in ("chosen", "rejected")]
        sides.append([mean_log_probability(model, tokenizer, pair["prompt"], text) for text in texts])
        answer = tokenizer(texts[0] + "<|im_end|>").input_ids
        of_answers.append((sides[-1][0], len(answer)))
        of_texts.append(log_probability(model, prompt_ids(tokenizer, pair["prompt"]) + answer))

    def likelihood(terms):
        """Minus the mean over all tokens of the batch."""
        return -sum(mean * count for mean, count in terms) / sum(count for _, count in terms)

    wanted = {
        "orpo": likelihood(of_texts) + 0.4 * sum(orpo(*side) for side in sides) / 4,
        "cpo_simpo": sum(simpo(*side, 2.5, 1.25) for side in sides) / 4 + 0.7 * likelihood(of_answers),
    }
    for loss in LOSSES[2:]:
        logged = train(loss, rows).history[0]
        assert logged["loss"] == pytest.approx(wanted[loss.kind], abs=2e-3)
        assert logged["rewards/chosen"] == pytest.approx(loss.beta * sum(side[0] for side in sides) / 4, abs=2e-3)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_the_loss_of_one_pair_is_that_of_its_sigmoid_argument(train, loss):
    *_, second = (
        entry for entry in train(loss, pairs()[:1], epochs=2, learning_rate=1e-2).history if "rewards/margins" in entry
    )
    of_pair = math.log1p(math.exp(-sigmoid_argument(loss, second)))
    wanted = {
        "simpo": lambda: of_pair,
        "dpo": lambda: of_pair,
        "orpo": lambda: loss.beta * of_pair + second["nll_loss"],
        "cpo_simpo": lambda: of_pair + loss.alpha * second["nll_loss"],
    }
    assert second["step"] == 2
    assert second["loss"] == pytest.approx(wanted[loss.kind](), abs=2e-3)


def test_with_a_beta_of_nearly_nothing_it_is_fine_tuning_on_the_chosen_answers(train):
    """The control of what rejected answers add."""
    rows = pairs()
    alone = train(CPOSimPO(beta=1e-6, gamma=0.0, alpha=1.0), rows, learning_rate=1e-2, epochs=2)
    chosen = [(row["prompt"], row["chosen"][0]["content"]) for row in rows]
    tuned = train(None, chosen, "supervised", learning_rate=1e-2, epochs=2)
    losses, wanted = ([entry["loss"] for entry in made.history if "loss" in entry] for made in (alone, tuned))
    assert len(wanted) > 2
    assert wanted[-1] < wanted[0] - 0.1
    assert losses == pytest.approx([math.log(2) + loss for loss in wanted], abs=5e-3)


def test_what_a_step_says_of_its_pairs():
    logged = {"loss": 1.0, "rewards/accuracies": 0.625, "rewards/margins": -1.5, "log_odds_chosen": -3.25}
    assert [pairs_text(loss, logged) for loss in LOSSES] == [
        ", reward accuracy 62%, gap -0.600 nats per token",
        ", reward accuracy 62%, gap -5.000 nats per answer since the start",
        ", reward accuracy 62%, gap -3.750 nats per token",
        ", reward accuracy 62%, gap -0.600 nats per token",
    ]
    assert [sigmoid_argument(loss, logged) for loss in LOSSES] == [-2.75, -1.5, -3.25, -2.75]
    assert pairs_text(None, logged) == pairs_text(LOSSES[0], {"loss": 1.0}) == ""
    assert sigmoid_argument(LOSSES[0], {"loss": 1.0}) is None


def test_a_loss_that_states_neither_gap_nor_argument_is_enough(monkeypatch):
    monkeypatch.delattr("resources.training.losses.dpo.gap")
    monkeypatch.delattr("resources.training.losses.dpo.sigmoid_argument")
    logged = {"rewards/accuracies": 0.5, "rewards/margins": -9.0}
    assert pairs_text(LOSSES[1], logged) == ", reward accuracy 50%"
    assert sigmoid_argument(LOSSES[1], logged) is None


def log_probability(model, token_ids):
    """The mean of a text's tokens after the first, and how many these are."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    return logits[range(len(token_ids) - 1), token_ids[1:]].mean().item(), len(token_ids) - 1


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
@pytest.mark.parametrize("lora", [PAIRED.lora, None], ids=["adapter", "full"])
def test_two_steps_change_the_weights_and_log_what_the_report_draws(train, nano_checkpoint, tmp_path, loss, lora):
    from safetensors.torch import load_file

    summary = train(loss, pairs(), lora=lora, learning_rate=1e-2)
    assert summary.steps == 2
    for entry in summary.history[:2]:
        assert all(math.isfinite(entry[name]) for name in ("loss", "rewards/chosen", "rewards/rejected"))
    before = load_file(f"{nano_checkpoint.weights}/model.safetensors")
    after = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-3 for name in before)
    assert loss_module(loss.kind).REWARD_AXIS


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_an_answer_ends_as_it_was_written(train, nano_checkpoint, monkeypatch, loss):
    """One end of turn, none on an answer that was cut, and nothing before the prompt; the prompt is not an answer."""
    batches = []
    trainer_class = loss_module(loss.kind).trainer(loss, PAIRED)[0].__bases__[-1]
    monkeypatch.setattr(trainer_class, "compute_loss", lambda self, model, inputs, **options: (
        batches.append(inputs) or sum(p.sum() for p in model.parameters() if p.requires_grad)))  # fmt: skip
    (pair,) = pairs(seed_rows()[:1], rejected_finish_reason="length")
    train(loss, [pair])
    tokenizer, batch = load_tokenizer(nano_checkpoint.weights), batches[0]
    for row, (side, answer) in enumerate(
        {"chosen": pair["chosen"][0]["content"] + "<|im_end|>", "rejected": "I do not know that."}.items()
    ):
        if loss.kind == "dpo":
            whole, is_answer = batch["input_ids"][row], batch["completion_mask"][row].bool()
            whole, is_answer = (
                whole[batch["attention_mask"][row].bool()],
                is_answer[batch["attention_mask"][row].bool()],
            )
        else:
            whole, is_answer = batch[f"{side}_input_ids"][0], batch[f"{side}_labels"][0] != -100
        assert whole[is_answer].tolist() == tokenizer(answer).input_ids
        assert whole[~is_answer].tolist() == prompt_ids(tokenizer, pair["prompt"])


@pytest.mark.parametrize(
    ("loss", "piece", "lora"), [(LOSSES[0], 1024, PAIRED.lora), (LOSSES[3], 7, None)], ids=["at_once", "in_pieces"]
)
def test_logits_of_completion_tokens_alone_train_as_those_of_all_tokens(
    train, tmp_path, monkeypatch, loss, piece, lora
):
    from safetensors.torch import load_file
    from trl.experimental.cpo import CPOTrainer

    from resources.training import completion_logits

    def trained():
        history = train(loss, pairs(), lora=lora).history
        return history, load_file(tmp_path / "out" / "merged" / "model.safetensors")

    monkeypatch.setattr(completion_logits, "PIECE", piece)
    projected, calls = completion_logits._projected, []
    monkeypatch.setattr(completion_logits, "_projected", lambda *given: calls.append(1) or projected(*given))
    history, weights = trained()
    assert calls
    monkeypatch.setattr(completion_logits.CompletionLogits, "concatenated_forward", CPOTrainer.concatenated_forward)
    own, own_weights = trained()
    logged = {"loss", "nll_loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"}
    for ours, theirs in zip(history, own, strict=True):
        assert {n: ours.get(n) for n in logged} == pytest.approx({n: theirs.get(n) for n in logged}, rel=2e-3, abs=1e-5)
    assert all((weights[name] - own_weights[name]).abs().max() < 2e-5 for name in weights)
