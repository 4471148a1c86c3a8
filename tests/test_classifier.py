"""Where a reward model reads, and in which number format: whatever its pad token, through training, merge and reload."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from resources.models.chat import answer_ids, end_of_turn_id, load_tokenizer, prompt_ids
from resources.models.classifier import silent_id
from resources.scoring.reward_model import RewardModel
from resources.settings.machine import Engine
from resources.settings.training import Lora, Training, TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint
from resources.training.trainer import Trainer

TRAINING = Training(
    learning_rate=0.05, batch_size=4, micro_batch_size=4, epochs=1, max_length=200, lora=Lora(rank=2, alpha=4)
)
WORDS = ["tea", "a kettle", "boil it first", "and then wait for two minutes, or three", "no", "yes!"]
answers = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


def edit(directory, tokenizer=None, **config):
    for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer or {})):
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def end_of_turn(directory):
    return end_of_turn_id(load_tokenizer(str(directory)))


SHAPES = {
    "its own": lambda place: None,
    "the end of turn": lambda place: edit(place, {"pad_token": "<|im_end|>"}, pad_token_id=end_of_turn(place)),
    "another one in the config": lambda place: edit(
        place, pad_token_id=load_tokenizer(str(place)).vocab["<|im_start|>"]
    ),
    "none": lambda place: edit(place, {"pad_token": None}, pad_token_id=None),
    "one outside the vocabulary": lambda place: edit(place, pad_token_id=-1),
}


def composite(place):
    """A Gemma 3 for pictures and text, whose pad token stands in the config of its text model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = load_tokenizer(str(place))
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": end_of_turn_id(tokenizer),
        "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.5,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
              "patch_size": 4}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=5, boi_token_index=6,
                          eoi_token_index=7, pad_token_id=end_of_turn_id(tokenizer))  # fmt: skip
    for file in place.glob("*.safetensors"):
        file.unlink()
    Gemma3ForConditionalGeneration(config).save_pretrained(place)


SHAPES["in a composite config"] = composite


@pytest.fixture(scope="module", params=SHAPES)
def start(request, nano_model, tmp_path_factory):
    place = shutil.copytree(nano_model, tmp_path_factory.mktemp("start") / "model")
    SHAPES[request.param](place)
    return place


def trained(start, place, dtype="float32"):
    engine = Engine(threads=1, device="cpu", dtype=dtype)
    trainer = Trainer(engine=engine, random_seed=1, processes=TrainingProcesses(), states=str(place / "states"))
    rows = [(f"Question {number}?", "yes! " * (number % 3 + 1), "no " * (number % 4 + 1)) for number in range(8)]
    trainer.train(
        "reward", Checkpoint("initial_policy", None, "x", str(start), str(start)), rows, TRAINING, place / "made"
    )
    return place / "made" / "merged", engine


@pytest.fixture(scope="module")
def reward_model(start, tmp_path_factory):
    merged, engine = trained(start, tmp_path_factory.mktemp("trained"))
    return merged, RewardModel(str(merged), engine, 200)


def scores(model, texts):
    return [value for (value,) in model.score([model.read(text, "Tea?", [text]) for text in texts])]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(answers, min_size=2, max_size=5))
def test_a_score_does_not_depend_on_what_else_is_in_the_batch(reward_model, texts):
    _, model = reward_model
    together, alone = scores(model, texts), [scores(model, [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-4)


def test_the_head_reads_the_end_of_turn(reward_model):
    merged, model = reward_model
    tokenizer, user = load_tokenizer(str(merged)), [{"role": "user", "content": "Tea?"}]
    ids = prompt_ids(tokenizer, user) + answer_ids(tokenizer, user, "boil it first")
    assert ids[-1] == end_of_turn_id(tokenizer) != tokenizer.pad_token_id
    with torch.no_grad():
        hidden = model._model.base_model(torch.tensor([ids])).last_hidden_state
    expected = torch.nn.functional.linear(hidden[0, -1].float(), model._model.score.weight).item()
    assert scores(model, ["boil it first", "no", "tea " * 30])[0] == pytest.approx(expected, abs=1e-4)


def test_the_head_is_trained_and_read_in_float32_beside_weights_in_bfloat16(nano_model, tmp_path):
    merged, engine = trained(nano_model, tmp_path, "bfloat16")
    weights = load_file(merged / "model.safetensors")
    head = weights["score.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float()), "it was rounded on its way"
    model = RewardModel(str(merged), engine, 200)
    assert torch.equal(model._model.score.weight, head)
    assert next(model._model.base_model.parameters()).dtype == torch.bfloat16
    found = torch.tensor(scores(model, WORDS))
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("shape", ["another one in the config", "the end of turn", "none"])
def test_a_published_model_is_read_where_it_reads_a_single_answer(classifier, tmp_path, shape):
    """As it was trained: the place that its config leads to, also in a batch."""
    from transformers import AutoModelForSequenceClassification

    published = shutil.copytree(classifier, tmp_path / "published")
    SHAPES[shape](published)
    model = RewardModel(str(published), Engine(threads=1, device="cpu", dtype="float32"), 200)
    plain = AutoModelForSequenceClassification.from_pretrained(published)
    readings = [model.read(text, "Tea?", [text]) for text in WORDS]
    with torch.no_grad():
        alone = [plain(torch.tensor([reading.token_ids])).logits.item() for reading in readings]
    assert [value for (value,) in model.score(readings)] == pytest.approx(alone, abs=1e-4)


def test_no_row_ends_with_the_padding_where_every_special_token_closes_turns(nano_model):
    tokenizer = load_tokenizer(str(nano_model))
    assert silent_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = "<|im_end|>"
    assert silent_id(tokenizer) not in (tokenizer.eos_token_id, end_of_turn_id(tokenizer))
