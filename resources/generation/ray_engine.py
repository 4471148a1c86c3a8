"""Generation on a Ray cluster: a copy of the engine on each worker, and requests for whoever asks for more."""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import math
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import dagster as dg

from resources.common.errors import FinalError
from resources.common.text import one_line
from resources.generation.engine import Completion, GenerationEngine, Request, Requests
from resources.generation.ray_worker import News, RayWorker, Wants
from resources.models.device import dtype_name, prepare_device
from resources.settings.machine import Engine, RayCluster
from resources.settings.method import Sampling
from resources.storage.checkpoint_store import Checkpoint

logger = logging.getLogger("synpo.generation")

# Requests that a worker is given at a time, at most: what it holds beside those that its engine works on.
SHARE = 256
# Nodes of a cluster that grows on demand take minutes to come up.
START_SECONDS = 600
CONNECT_SECONDS = 10
# Requests and completions are small; by default Ray would take a third of the memory for its object store.
OBJECT_STORE_BYTES = 2**27


def worker_settings(engine: Engine, cluster: RayCluster, kind: str) -> Engine:
    """The settings of each worker's engine; `kind` and number format are chosen here, because a worker has no choice."""
    # Ray sets CPUs aside by number only; unasked, each copy would take all of its node.
    threads = engine.threads or math.ceil(cluster.cpus_per_worker)
    chosen = {"kind": kind, "dtype": dtype_name(engine), "threads": threads}
    return engine.model_copy(update={"ray": None, "data_parallel_size": 1} | chosen)


class RayEngine:
    """Answers with workers of a Ray cluster; one that is lost leaves its unfinished requests to the others.

    Each worker calls `open_engine`.
    """

    def __init__(
        self, checkpoint: Checkpoint, engine: Engine, cluster: RayCluster, open_engine: Callable[[], GenerationEngine]
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise FinalError("engine.ray needs the package ray, which is not installed: pip install 'synpo[ray]'.")
        if engine.data_parallel_size:
            raise FinalError("engine.data_parallel_size is not read with engine.ray: state engine.ray.workers instead.")
        if cluster.address is None:
            prepare_device(engine)
        self._checkpoint, self._cluster, self._open_engine = checkpoint, cluster, open_engine
        self._gpus = (engine.tensor_parallel_size or 1) if engine.device == "cuda" else 0

    def generate(self, requests: Requests, sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes requests on all workers side by side and yields completions as they come back."""
        with connected(self._cluster):
            import ray

            cpus = self._cluster.cpus_per_worker
            # Not what is free at the moment: an earlier call's workers may just be leaving. Workers that find no room wait.
            resources = ray.cluster_resources()
            workers = self._cluster.workers or _room(resources, cpus, self._gpus)
            needs = f"{cpus:g} CPUs and {self._gpus} GPUs"
            has = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
            logger.info(f"Ray workers: {workers}, each with {needs}; the cluster has {has}.")
            # Spread: otherwise Ray fills one node before it takes the next.
            actor = ray.remote(num_cpus=cpus, num_gpus=self._gpus, scheduling_strategy="SPREAD")(RayWorker)

            def start(name: str) -> Any:
                weights = self._checkpoint.weights
                return actor.remote(name, self._open_engine, weights, sampling, len(requests), requests.longest)

            call = _Call(requests, start)
            try:
                yield from call.completions(workers, f"each needs {needs}")
            finally:
                call.end()


@contextlib.contextmanager
def connected(cluster: RayCluster) -> Iterator[None]:
    """Connects this process to a Ray cluster, or to a Ray of this machine that is started for the purpose.

    On Linux, Ray has the kernel end what it starts here when this process ends, even if this process is killed with -9;
    only two idle helpers may then last for another minute.
    """
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        if cluster.address is None:
            # A token for this process only; without one, Ray would write one into the user's home.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            # A short path: it is part of the names of sockets, which have at most 107 characters.
            place = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
            )
            # After the directory: what is entered last is left first, and Ray writes there until it is shut down.
            stack.callback(ray.shutdown, wait_for_processes=True)
            # Logical CPUs: as many as were asked for, be they there or not.
            cpus = max(os.cpu_count() or 1, math.ceil((cluster.workers or 1) * cluster.cpus_per_worker))
            ray.init(
                "local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=place,
                **quiet,
            )
        else:
            _knock(cluster.address)
            stack.callback(ray.shutdown)
            try:
                ray.init(cluster.address, **quiet)
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise dg.Failure(
                    f"The Ray cluster at engine.ray.address = {cluster.address} could not be joined. Ray says: "
                    f"{_in_one_line(error)} Ray and Python must have the same versions everywhere; `host:port` and "
                    "`auto` work on nodes of the cluster only, from elsewhere use ray://host:10001; a cluster with token "
                    "authentication needs RAY_AUTH_MODE=token and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token."
                ) from None
        yield


def _knock(address: str) -> None:
    """Checks that something listens at an address: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise dg.Failure(
            f"Nothing answers at engine.ray.address = {address} ({error}): is the Ray cluster running there? The port of "
            "`ray start --head` is 6379; that of ray:// is 10001."
        ) from None


def _room(resources: dict[str, float], cpus: float, gpus: int) -> int:
    """The number of workers that a cluster can hold; at least one, which may have to wait for a node."""
    by_cpus = int(resources.get("CPU", 0) / cpus)
    return max(1, min(by_cpus, int(resources.get("GPU", 0) / gpus)) if gpus else by_cpus)


def _in_one_line(error: Exception) -> str:
    """What Ray says, without its colours, line breaks and marks below lines of code."""
    # The cause stands at the end, behind a traceback.
    return one_line(re.sub(r"\x1b\[\d+m|\^+", "", str(error)), 10_000)


@dataclasses.dataclass(eq=False)
class _Worker:
    """A worker as its driver sees it."""

    actor: Any
    outstanding: dict[int, Request] = dataclasses.field(default_factory=dict)
    is_up: bool = False


class _Call:
    """One call of `RayEngine.generate`: who has which requests."""

    def __init__(self, requests: Requests, start: Callable[[str], Any]) -> None:
        self._waiting: Iterator[Request] = iter(requests)
        self._number_waiting = self._unfinished = len(requests)
        self._start = start
        self._said: set[str] = set()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._pending: dict[concurrent.futures.Future[list[News]], _Worker] = {}
        self._started = self._lost_in_a_row = 0

    def completions(self, workers: int, needs: str) -> Iterator[list[Completion]]:
        """Yields an empty list when the first copy of the model is loaded, then completions as they come back."""
        from ray.exceptions import RayError

        for _ in range(workers):
            self._add()
        is_loaded = False
        while self._unfinished and self._pending:
            patience = None if any(worker.is_up for worker in self._workers) else START_SECONDS
            done, _ = concurrent.futures.wait(self._pending, patience, concurrent.futures.FIRST_COMPLETED)
            if not done:
                raise dg.Failure(
                    f"No worker of the Ray cluster could start within {START_SECONDS} s: {needs}, and no node has as much to "
                    "spare. Lower engine.ray.cpus_per_worker or engine.tensor_parallel_size, or wait for other jobs."
                )
            for future in done:
                worker = self._pending.pop(future)
                try:
                    news = future.result()
                except RayError as error:
                    self._replace(worker, error, limit=2 * workers)
                    continue
                worker.is_up = True
                for item in news:
                    if isinstance(item, list):
                        yield self._finished(worker, item)
                    elif item is Wants.MORE and not is_loaded:
                        is_loaded = True
                        yield []
                self._answer(worker, news)
            while self._idle and self._number_waiting:
                self._send(self._idle[0], self._share(self._idle.pop(0)))

    def end(self) -> None:
        """Ends all workers."""
        import ray

        for worker in self._workers:
            ray.kill(worker.actor)

    def _add(self) -> None:
        self._started += 1
        worker = _Worker(self._start(f"Worker {self._started}"))
        self._workers.append(worker)
        self._send(worker, None)

    def _send(self, worker: _Worker, share: list[Request] | None) -> None:
        worker.outstanding |= {request.key: request for request in share or []}
        self._pending[worker.actor.exchange.remote(share).future()] = worker

    def _finished(self, worker: _Worker, completions: list[Completion]) -> list[Completion]:
        first = [completion for completion in completions if worker.outstanding.pop(completion.key, None)]
        self._unfinished -= len(first)
        self._lost_in_a_row = 0
        return first

    def _answer(self, worker: _Worker, news: list[News]) -> None:
        """Says what a worker said, and gives it what it asked for."""
        for item in news:
            if isinstance(item, Exception):
                raise item
            # All workers say the same of the engine.
            if isinstance(item, logging.LogRecord) and item.getMessage() not in self._said:
                self._said.add(item.getMessage())
                logging.getLogger(item.name).handle(item)
        if news[-1] is Wants.CALL:
            self._idle.append(worker)
        else:
            self._send(worker, self._share(worker) if news[-1] is Wants.MORE else None)

    def _share(self, worker: _Worker) -> list[Request]:
        """As many requests as are a worker's part of all that is unfinished."""
        part = math.ceil(self._unfinished / sum(other.is_up for other in self._workers))
        number = max(0, min(SHARE, self._number_waiting, part - len(worker.outstanding)))
        self._number_waiting -= number
        return _longest_first(itertools.islice(self._waiting, number))

    def _replace(self, worker: _Worker, error: Exception, limit: int) -> None:
        """Gives the requests of a lost worker back, to be answered next, and starts another worker."""
        import ray

        # It may live on where only the network between was lost.
        ray.kill(worker.actor)
        self._workers.remove(worker)
        reason = _in_one_line(error)
        self._lost_in_a_row += 1
        if self._lost_in_a_row > limit:
            raise dg.Failure(
                f"{self._lost_in_a_row} workers on the Ray cluster were lost one after the other, and none finished a prompt in "
                f"between; the last: {reason} Finished shards are kept: run it again when the cluster is well."
            )
        logger.info(f"A worker was lost; the {len(worker.outstanding)} prompts it had go to others. Ray says: {reason}")
        self._waiting = itertools.chain(_longest_first(worker.outstanding.values()), self._waiting)
        self._number_waiting += len(worker.outstanding)
        self._add()


def _longest_first(requests: Iterable[Request]) -> list[Request]:
    return sorted(requests, key=lambda request: len(request.token_ids), reverse=True)
