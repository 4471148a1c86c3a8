"""Generation on the nano model: seeds, shards, resuming after a kill."""

import dataclasses
import errno
import json
import logging
import random
import shutil

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resources.generation.completions
import resources.generation.transformers_engine
import resources.storage.files
from resources.common.errors import FinalError
from resources.common.progress import Progress
from resources.generation.few_rows import MOST_ROWS, multiply_few_rows_faster
from resources.generation.growing_cache import growing_cache
from resources.generation.language_model import LanguageModel
from resources.generation.transformers_engine import RowSampler, _mixed, uniform_numbers
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.storage.shards import checksum

PROMPTS = [(f"prompt-{n}", [{"role": "user", "content": f"Tell me about topic {n} " + "please " * (n % 5)}])
           for n in range(24)]  # fmt: skip
SAMPLING = Sampling(temperature=0.8, top_k=40, max_new_tokens=16)


def model(shards, **engine):
    return LanguageModel(
        shards=str(shards), engine=Engine(**{"threads": 1, "dtype": "float32"} | engine), random_seed=1
    )


def test_rows_come_back_in_order_with_counts(tmp_path, nano_checkpoint):
    frame, usage = model(tmp_path).answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert frame["id"].to_list() == [row_id for row_id, _ in PROMPTS]
    assert usage.rows == len(PROMPTS)
    assert usage.reused == 0
    assert usage.output_tokens == usage.generated_tokens == frame["output_tokens"].sum()
    assert frame["output_tokens"].max() <= 16
    for row in frame.to_dicts():
        assert (
            row["finish_reason"] == ("length" if row["output_tokens"] == 16 else "stop") or row["output_tokens"] == 16
        )
    assert frame["text"].n_unique() > len(PROMPTS) // 2


def test_a_completion_does_not_depend_on_its_batch(tmp_path, nano_checkpoint):
    together, _ = model(tmp_path / "a").answer(nano_checkpoint, PROMPTS, SAMPLING)
    one_by_one, _ = model(tmp_path / "b", batch_tokens=64).answer(nano_checkpoint, PROMPTS[:6], SAMPLING)
    assert one_by_one["text"].to_list() == together["text"].to_list()[:6]


def test_seed_and_id_decide_the_completion(tmp_path, nano_checkpoint):
    same_prompt = [("a", PROMPTS[0][1]), ("b", PROMPTS[0][1])]
    frame, _ = model(tmp_path / "1").answer(nano_checkpoint, same_prompt, SAMPLING)
    assert frame["text"].n_unique() == 2
    other = LanguageModel(shards=str(tmp_path / "2"), engine=Engine(threads=1, dtype="float32"), random_seed=2)
    assert other.answer(nano_checkpoint, same_prompt, SAMPLING)[0]["text"][0] != frame["text"][0]


def test_greedy_is_the_same_for_all_seeds(tmp_path, nano_checkpoint):
    greedy = SAMPLING.model_copy(update={"temperature": 0.0})
    frame, _ = model(tmp_path).answer(nano_checkpoint, [("a", PROMPTS[0][1]), ("b", PROMPTS[0][1])], greedy)
    assert frame["text"].n_unique() == 1


def test_habits_that_a_model_brings_do_not_count(tmp_path, nano_model, nano_checkpoint):
    directory = tmp_path / "with habits"
    shutil.copytree(nano_model, directory)
    habits = json.loads((directory / "generation_config.json").read_text())
    habits |= {"repetition_penalty": 5.0, "do_sample": True, "top_k": 1, "num_beams": 2}
    (directory / "generation_config.json").write_text(json.dumps(habits))
    checkpoint = dataclasses.replace(nano_checkpoint, weights=str(directory))
    with_habits, _ = model(tmp_path / "a").answer(checkpoint, PROMPTS, SAMPLING)
    assert with_habits.equals(model(tmp_path / "b").answer(nano_checkpoint, PROMPTS, SAMPLING)[0])


def test_finished_work_is_found_again_and_only_the_rest_is_done(tmp_path, nano_checkpoint):
    first, _ = model(tmp_path).answer(nano_checkpoint, PROMPTS[:10], SAMPLING)
    whole, usage = model(tmp_path).answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert usage.reused == 10
    assert usage.generated_tokens == whole["output_tokens"][10:].sum()
    assert whole.head(10).equals(first)


def test_other_settings_never_mix(tmp_path, nano_checkpoint):
    model(tmp_path).answer(nano_checkpoint, PROMPTS[:3], SAMPLING)
    warmer = SAMPLING.model_copy(update={"temperature": 1.2})
    assert model(tmp_path).answer(nano_checkpoint, PROMPTS[:3], warmer)[1].reused == 0
    assert len(list(tmp_path.glob("*/fingerprint.json"))) == 2


def test_a_shard_with_a_flipped_bit_is_set_aside_and_its_rows_are_made_anew(tmp_path, nano_checkpoint, said):
    prompts, draw = PROMPTS[:8], random.Random(0)
    undisturbed, _ = model(tmp_path / "whole", shard_rows=8).answer(nano_checkpoint, prompts, SAMPLING)
    (shard,) = tmp_path.glob("whole/*/*.parquet")
    content = shard.read_bytes()
    for _ in range(100):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        assert checksum(damaged) != shard.stem
    for name, broken in (("flipped", bytes(damaged)), ("cut", content[:-9]), ("empty", b"")):
        shard.write_bytes(broken)
        again, usage = model(tmp_path / "whole", shard_rows=8).answer(nano_checkpoint, prompts, SAMPLING)
        assert again.equals(undisturbed), name
        assert usage.reused == 0
        assert any("is not as it was written here, as where a disk damages it" in line for line in said)
        said.clear()
        assert shard.read_bytes() == content
        assert shard.with_suffix(".damaged").exists()


def test_equal_rows_are_generated_once_and_are_not_reused_ones(tmp_path, nano_checkpoint):
    model(tmp_path).answer(nano_checkpoint, PROMPTS[:1], SAMPLING)
    twice, usage = model(tmp_path).answer(nano_checkpoint, [*PROMPTS[:2], *PROMPTS[:2]], SAMPLING)
    assert twice[:2].equals(twice[2:])
    assert (usage.rows, usage.reused, usage.generated_tokens) == (4, 2, twice["output_tokens"][1])


def test_a_full_disk_is_said_and_keeps_what_is_finished(tmp_path, nano_checkpoint, monkeypatch):
    first, _ = model(tmp_path).answer(nano_checkpoint, PROMPTS[:5], SAMPLING)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resources.storage.files.os, "fsync", full)
    with pytest.raises(FinalError, match=rf"A disk is full .* device: '{tmp_path}/.*\.parquet'.*`synpo clean`"):
        model(tmp_path).answer(nano_checkpoint, PROMPTS, SAMPLING)
    monkeypatch.undo()
    whole, usage = model(tmp_path).answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert usage.reused == 5
    assert whole.head(5).equals(first)


def test_writing_stops_at_a_stop_text(tmp_path, nano_checkpoint):
    from synpo_assets.method.templates import generator_instruction

    asked = [(str(n), generator_instruction(["pan", "oil", "heat"])) for n in range(12)]
    sampling = SAMPLING.model_copy(update={"stop": ["<question>"], "max_new_tokens": 30})
    frame, _ = model(tmp_path).answer(nano_checkpoint, asked, sampling)
    stopped = frame.filter(pl.col("text").str.contains("<question>"))
    assert stopped.height > 0
    assert stopped["text"].str.ends_with("<question>").all()
    assert (stopped["finish_reason"] == "stop").all()


def test_a_stop_text_that_begins_in_the_prompt_is_none(tmp_path, nano_checkpoint):
    whole, _ = model(tmp_path / "a").answer(nano_checkpoint, PROMPTS, SAMPLING)
    first = whole["text"][0][0]
    # The template writes a line end before an answer.
    stop = f"\n{first}"
    sampling = SAMPLING.model_copy(update={"stop": [stop]})
    stopped, _ = model(tmp_path / "b").answer(nano_checkpoint, PROMPTS, sampling)
    assert 0 < whole["text"].str.starts_with(first).sum() < whole.height
    parts = [text.partition(stop) for text in whole["text"]]
    assert stopped["text"].to_list() == [before + found for before, found, _ in parts]


def test_a_prompt_beyond_the_context_is_refused_with_the_setting(tmp_path, nano_checkpoint):
    too_long = [("long", [{"role": "user", "content": "word " * 3000}])]
    with pytest.raises(FinalError, match=r"exceed the model's context of 1024 tokens: lower sampling\.max_new_tokens"):
        model(tmp_path).answer(nano_checkpoint, too_long, SAMPLING)


def test_the_fingerprint_says_what_the_shards_are_of(tmp_path, nano_checkpoint):
    model(tmp_path).answer(nano_checkpoint, PROMPTS[:2], SAMPLING)
    (description,) = tmp_path.glob("*/fingerprint.json")
    what = json.loads(description.read_text())
    assert what["checkpoint"] == nano_checkpoint.sha
    assert what["sampling"] == SAMPLING.model_dump()


def frequencies(sampling, probabilities, draws=4000):
    import torch

    sampler = RowSampler(sampling, torch.arange(draws), 1, Progress(1, "tokens", logging.getLogger()))
    logits = torch.tensor(probabilities).log().repeat(draws, 1) * (sampling.temperature or 1)
    chosen = sampler(torch.zeros(draws, 1), logits).argmax(-1)
    return [(chosen == token).float().mean().item() for token in range(len(probabilities))]


def test_completions_do_not_depend_on_when_finished_rows_leave_their_batch(tmp_path, nano_checkpoint, monkeypatch):
    sampling, found = Sampling(temperature=0.8, top_k=40, max_new_tokens=40, stop=["</question>", "rs."]), []
    for piece in (1000, 7, 1):
        monkeypatch.setattr("resources.generation.transformers_engine.PIECE", piece)
        answers, _ = model(tmp_path / str(piece)).answer(nano_checkpoint, PROMPTS, sampling)
        found.append(answers)
    assert found[0]["finish_reason"].n_unique() == 2
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [0.5, 0.3, 0.15, 0.05]),
    ({"top_k": 2}, [0.625, 0.375, 0, 0]),
    ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
    ({"top_p": 0.4}, [1, 0, 0, 0]),
    ({"top_k": 1}, [1, 0, 0, 0]),
])  # fmt: skip
def test_sampling_has_the_right_frequencies(options, expected):
    found = frequencies(Sampling(temperature=0.7, max_new_tokens=1, **options), [0.5, 0.3, 0.15, 0.05])
    assert found == pytest.approx(expected, abs=0.03)


def test_random_numbers_are_known_even_and_unrelated():
    """The first output of SplitMix64 for seed 0, as its authors' program prints it; then moments of a million numbers."""
    import torch

    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    assert _mixed(torch.tensor([golden])).item() % (1 << 64) == 0xE220A8397B1DCDAF
    seeds, tokens = torch.arange(2000) << 40, torch.arange(500)
    numbers, later = (uniform_numbers(seeds, step, tokens) for step in (3, 4))
    assert (numbers.min() > 0, numbers.max() < 1) == (True, True)
    assert numbers.mean().item() == pytest.approx(1 / 2, abs=0.002)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.001)
    neighbours = [(numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1]), (numbers, later)]
    for one, other in neighbours:
        pair = torch.stack([one.flatten(), other.flatten()])
        assert torch.corrcoef(pair)[0, 1].item() == pytest.approx(0, abs=0.005)
    # Tokens chosen by top_k have the numbers that they have among all.
    assert torch.equal(uniform_numbers(seeds, 3, torch.tensor([7, 2]).expand(2000, 2)), numbers[:, [7, 2]])
    assert torch.equal(uniform_numbers(seeds[5:6], 3, tokens), numbers[5:6])


def test_bytes_that_are_no_character_are_left_out(tmp_path, nano_checkpoint, monkeypatch):
    """A limit of one token cuts most characters of three bytes in two."""
    real = resources.generation.completions.completion

    def cut(key, input_tokens, token_ids, sampling, tokenizer, ends):
        cut_in_two = tokenizer("語", add_special_tokens=False).input_ids[:1]
        return real(key, input_tokens, [*token_ids, *cut_in_two], sampling, tokenizer, [])

    monkeypatch.setattr(resources.generation.transformers_engine, "completion", cut)
    frame, _ = model(tmp_path).answer(nano_checkpoint, PROMPTS[:4], SAMPLING)
    stored = pl.concat([pl.read_parquet(file) for file in tmp_path.rglob("*.parquet")])
    assert stored["text"].str.contains("\ufffd").all()
    assert not frame["text"].str.contains("\ufffd").any()
    assert (frame["text"].str.len_chars() > 0).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (40, 1), (2, MOST_ROWS), (7,)])
def test_few_rows_are_multiplied_to_the_same_numbers(shape, bias):
    layer, states = torch.nn.Linear(48, 80, bias=bias), torch.randn(*shape, 48)
    expected = layer(states)
    multiply_few_rows_faster(layer)
    found = layer(states)
    assert "forward" in vars(layer)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)


def test_layers_in_other_formats_and_of_other_kinds_multiply_as_they_did():
    class Quantized(torch.nn.Linear):
        pass

    layers = torch.nn.Sequential(
        torch.nn.Linear(8, 8, dtype=torch.bfloat16), Quantized(8, 8), torch.nn.Linear(8, 8, device="meta")
    )
    multiply_few_rows_faster(layers)
    assert not any("forward" in vars(layer) for layer in layers)


@given(st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 99), max_size=3)), min_size=1, max_size=6))
def test_a_cache_with_room_holds_what_transformers_own_holds(steps):
    from transformers import DynamicCache, LlamaConfig

    config, rows = LlamaConfig(num_hidden_layers=1), 3
    ours, theirs = caches = growing_cache(config), DynamicCache(config=config)
    for written, kept in steps:
        new = torch.randn(rows, 2, written, 4)
        for mine, other in zip(*(cache.update(new, -new, 0) for cache in caches), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        # Some rows end.
        if kept:
            for cache in caches:
                cache.reorder_cache(torch.tensor(kept) % rows)
            rows = len(kept)
