"""What is left of an update where the weights are read in bfloat16: small steps vanish, and the user is told."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from resources.settings.machine import Engine
from resources.settings.training import Lora, Training, TrainingProcesses
from resources.storage.files import file_sha256
from resources.training.rounding import LOWER_HALF, round_saved_weights, rounded_at_random
from resources.training.surviving import surviving_update
from resources.training.trainer import Trainer

ROWS = [([{"role": "user", "content": f"Question {number}?"}], "yes " * 3) for number in range(8)]
TRAINING = Training(learning_rate=1e-2, batch_size=8, micro_batch_size=8, epochs=2, max_length=200, warmup_ratio=0.0)


def written(place, weights):
    place.mkdir()
    save_file({"layer.weight": weights}, place / "model.safetensors")
    return place


@pytest.mark.parametrize(("step", "share", "changed"), [(0.25, 1.0, 1.0), (2.0**-10, 0.0, 0.0), (2.0**-7, 1.0, 1.0)])
def test_steps_below_half_the_distance_of_two_numbers_vanish(tmp_path, step, share, changed):
    """Between 1 and 2 the numbers of bfloat16 are 2^-7 apart."""
    weights = torch.full((4, 4), 1.0)
    start, trained = written(tmp_path / "start", weights), written(tmp_path / "trained", weights + step)
    left = surviving_update(start, trained, None, torch.bfloat16)
    assert (left.share, left.changed_weights) == (share, changed)
    assert surviving_update(start, trained, None, torch.float32).share == 1.0
    assert surviving_update(start, start, None, torch.float32) is None


def trained(place, start, dtype, **changes):
    engine = Engine(threads=1, device="cpu", dtype=dtype)
    trainer = Trainer(engine=engine, random_seed=1, processes=TrainingProcesses(), states=str(place / "states"))
    return trainer.train("supervised", start, ROWS, TRAINING.model_copy(update=changes), place / "made")


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4)])
def test_an_update_is_whole_in_float32(tmp_path, nano_checkpoint, lora):
    left = trained(tmp_path, nano_checkpoint, "float32", lora=lora).surviving
    assert left.share == pytest.approx(1, abs=1e-3)
    assert left.changed_weights > 0.95


def test_the_measure_of_an_adapter_is_that_of_the_difference_of_the_weights(tmp_path, nano_checkpoint):
    left = trained(tmp_path, nano_checkpoint, "float32", lora=Lora(rank=2, alpha=4)).surviving
    start = tmp_path / "start"
    start.mkdir()
    before = load_file(f"{nano_checkpoint.weights}/model.safetensors")
    save_file({name: tensor.clone() for name, tensor in before.items()}, start / "model.safetensors")
    assert dataclasses.astuple(left) == pytest.approx(
        dataclasses.astuple(surviving_update(start, tmp_path / "made" / "merged", None, torch.float32)), abs=1e-3
    )


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=50), st.integers(0, 99))
def test_a_number_is_rounded_to_one_of_its_two_neighbours_and_stays_if_it_is_one(numbers, seed):
    exact = torch.tensor(numbers)
    found = rounded_at_random(exact, torch.Generator().manual_seed(seed))
    assert found.dtype == torch.bfloat16
    nearest = exact.bfloat16()
    assert torch.equal(rounded_at_random(nearest.float(), torch.Generator().manual_seed(seed)), nearest)
    # Towards zero and away from it.
    lower = (exact.view(torch.int32) & -LOWER_HALF).view(torch.float32)
    upper = ((exact.view(torch.int32) & -LOWER_HALF) + LOWER_HALF).view(torch.float32)
    assert bool(((found.float() == lower) | (found.float() == upper)).all())


@pytest.mark.parametrize("share", [0.03, 0.5, 0.9])
def test_what_is_rounded_at_random_is_right_on_average(share):
    """Between 1 and 2 the numbers of bfloat16 are 2^-7 apart."""
    exact = torch.full((100_000,), 1 + share * 2.0**-7)
    up = (rounded_at_random(exact, torch.Generator().manual_seed(1)) > 1).float().mean().item()
    assert up == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("changes", [{"lora": Lora(rank=2, alpha=4), "learning_rate": 3e-5}, {"learning_rate": 1e-5}])
def test_a_small_update_is_kept_in_bfloat16(tmp_path, nano_checkpoint, monkeypatch, changes):
    """As much of it as in float32, where to the nearest next to nothing would be left."""
    start = dataclasses.replace(nano_checkpoint, weights=str(in_bfloat16(nano_checkpoint, tmp_path / "start")))
    left = trained(tmp_path / "at random", start, "bfloat16", **changes).surviving
    assert left.share == pytest.approx(1, abs=0.15)
    again = trained(tmp_path / "again", start, "bfloat16", **changes)
    assert again.surviving == left
    files = [tmp_path / name / "made/merged/model.safetensors" for name in ("at random", "again")]
    assert file_sha256(files[0]) == file_sha256(files[1])
    assert not (tmp_path / "again/made/exact").exists()
    monkeypatch.setattr("resources.training.rounding.rounded_at_random", lambda numbers, _: numbers.bfloat16())
    assert trained(tmp_path / "nearest", start, "bfloat16", **changes).surviving.share < 0.2


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}])
def test_a_model_with_tied_weights_that_are_saved_twice_stays_tied(tmp_path, nano_model, shards):
    """As with FSDP, whose pieces of a tensor have addresses of their own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nano_model)
    exact, rounded = tmp_path / "exact", tmp_path / "rounded"
    twice = model.state_dict() | {"lm_head.weight": model.lm_head.weight.detach().clone()}
    model.save_pretrained(exact, state_dict=twice, **shards)
    round_saved_weights(exact, rounded, random_seed=1)
    found = {name: tensor for file in rounded.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], model.lm_head.weight.bfloat16())
    for index in rounded.glob("*.index.json"):
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(each.nbytes for each in found.values())
    assert len(list(rounded.glob("*.index.json"))) == len(shards)
    read = AutoModelForCausalLM.from_pretrained(rounded)
    assert read.dtype == torch.bfloat16
    assert read.lm_head.weight is read.model.embed_tokens.weight


def test_a_model_that_is_rounded_says_so_and_keeps_what_is_read_in_float32(tmp_path):
    exact, head = tmp_path / "exact", torch.full((1, 4), 1 / 3)
    exact.mkdir()
    whole = {
        "layer.weight": torch.full((4, 4), 1 / 3), "layer.counts": torch.arange(3), "score.weight": head,
        "layer.e_score_correction_bias": head[0].clone(),
    }  # fmt: skip
    save_file(whole, exact / "model.safetensors", {"format": "pt"})
    architecture = {"architectures": ["DeepseekV3ForCausalLM"]}
    (exact / "config.json").write_text(json.dumps({"dtype": "float32", **architecture}))
    (exact / "tokenizer.json").write_text("{}")
    round_saved_weights(exact, tmp_path / "rounded", random_seed=1)
    found = load_file(tmp_path / "rounded" / "model.safetensors")
    assert found["layer.weight"].dtype == torch.bfloat16
    assert torch.equal(found["score.weight"], head)
    assert torch.equal(found["layer.e_score_correction_bias"], head[0])
    assert torch.equal(found["layer.counts"], whole["layer.counts"])
    assert json.loads((tmp_path / "rounded" / "config.json").read_text()) == {"dtype": "bfloat16", **architecture}
    assert (tmp_path / "rounded" / "tokenizer.json").read_text() == "{}"


def in_bfloat16(checkpoint, place):
    """A copy of a checkpoint's weights in numbers of bfloat16, as published ones are."""
    start = shutil.copytree(checkpoint.weights, place)
    weights = load_file(start / "model.safetensors")
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(rounded, start / "model.safetensors", {"format": "pt"})
    return start
