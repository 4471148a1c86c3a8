"""Whatever the moment at which generation is killed with -9, what was finished survives: `pytest -n 0 -m slow`."""

import multiprocessing
import random
import signal
import time

import polars as pl
import pytest

from resources.generation.transformers_engine import TransformersEngine
from resources.settings.method import Sampling
from resources.storage.checkpoint_store import Checkpoint
from tests.test_generation import model

pytestmark = pytest.mark.slow

PROMPTS = [(f"prompt-{n}", [{"role": "user", "content": f"Tell me about topic {n} " + "please " * (n % 5)}])
           for n in range(300)]  # fmt: skip
SAMPLING = Sampling(temperature=0.8, top_k=40, max_new_tokens=16)
KILLS = 6
MOST_SHARD_ROWS = 20
# Too few for two prompts: completions come one at a time.
BATCH_TOKENS = 64


def answer_all(nano, shards, shard_rows, completed):
    """The work that is killed; it counts the completions that the engine has finished."""
    generate = TransformersEngine.generate

    def counted(self, requests, sampling):
        for batch in generate(self, requests, sampling):
            completed.value += len(batch)
            yield batch

    TransformersEngine.generate = counted
    answered(nano, shards, shard_rows)


def answered(nano, shards, shard_rows=64, batch_tokens=BATCH_TOKENS):
    checkpoint = Checkpoint("initial_policy", None, "nano", nano, nano)
    language_model = model(shards, shard_rows=shard_rows, batch_tokens=batch_tokens)
    return language_model.answer(checkpoint, PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def undisturbed(nano_model, tmp_path_factory):
    return answered(str(nano_model), tmp_path_factory.mktemp("undisturbed"), batch_tokens=16384)[0]


@pytest.fixture(scope="module")
def processes():
    """Children that have the libraries loaded: a kill then hits the work and not the imports."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["transformers.models.llama.modeling_llama", "tests.test_kill_property"])
    return forkserver


def saved(shards):
    files = sorted(shards.glob("*/*.parquet"))
    return pl.concat([pl.read_parquet(file) for file in files]) if files else pl.DataFrame(schema={"key": pl.UInt64})


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_moment_costs_at_most_one_shard(tmp_path, nano_model, undisturbed, processes, seed):
    moments = random.Random(seed)
    shard_rows = moments.choice([1, 3, 8, MOST_SHARD_ROWS])
    before = saved(tmp_path)
    for _ in range(KILLS):
        completed = processes.Value("i", 0)
        child = processes.Process(target=answer_all, args=(str(nano_model), tmp_path, shard_rows, completed))
        child.start()
        # Mostly in the midst of the work, sometimes while the model is loaded. Counted, for a machine may be slow.
        if moments.random() < 0.8:
            wanted = moments.randint(1, 2 * MOST_SHARD_ROWS)
            while completed.value < wanted:
                assert child.is_alive()
                time.sleep(0.01)
        else:
            time.sleep(moments.uniform(0, 0.6))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it was finished before it could be killed: give it more prompts"
        after = saved(tmp_path)
        assert after["key"].is_unique().all()
        assert before.join(after, on=before.columns, how="anti").is_empty()
        assert completed.value - (after.height - before.height) <= shard_rows
        before = after
    whole, usage = answered(str(nano_model), tmp_path)
    assert 0 < usage.reused == before.height
    assert whole.equals(undisturbed)
