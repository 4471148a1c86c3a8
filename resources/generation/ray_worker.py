"""One worker on a Ray cluster: a copy of the model that asks for requests as it has room for them."""

import enum
import logging
import logging.handlers
import queue
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from resources.common.errors import FinalError
from resources.generation.engine import Completion, GenerationEngine, Request, Requests
from resources.settings.method import Sampling

logger = logging.getLogger("synpo.generation")


class Wants(enum.Enum):
    """What a worker without requests asks for."""

    MORE = "further requests for the call of the engine that is under way; none ends the call"
    CALL = "requests for another call of the engine"


# A line of the worker's log, finished completions, a wish, or what ended the work.
News = logging.LogRecord | list[Completion] | Wants | Exception


class RayWorker:
    """An engine in a process of Ray. The engine works in a thread of its own, so that it never waits for the network.

    `total` and `longest` are of the requests of all workers together.
    """

    def __init__(
        self,
        name: str,
        open_engine: Callable[[], GenerationEngine],
        weights: str,
        sampling: Sampling,
        total: int,
        longest: int,
    ) -> None:
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._shares: queue.SimpleQueue[list[Request]] = queue.SimpleQueue()
        self._requests = ArrivingRequests(self._ask, total, longest)
        everything = logging.getLogger("synpo")
        everything.setLevel(logging.INFO)
        everything.addHandler(logging.handlers.QueueHandler(self._news))
        threading.Thread(target=self._work, args=(name, open_engine, weights, sampling), daemon=True).start()

    def exchange(self, share: list[Request] | None) -> list[News]:
        """Takes the requests that the worker asked for, None if it did not ask, and waits for its next news."""
        if share is not None:
            self._shares.put(share)
        news = [self._news.get()]
        while not self._news.empty():
            news.append(self._news.get())
        return news

    def _work(self, name: str, open_engine: Callable[[], GenerationEngine], weights: str, sampling: Sampling) -> None:
        import ray

        node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        logger.info(f"{name} runs on node {node}.")
        try:
            if not Path(weights).is_dir():
                raise FinalError(
                    f"The weights {weights} do not exist on node {node} of the Ray cluster: every node needs the files of the "
                    "home at the same path, so put the home on a file system that all nodes share."
                )
            engine = open_engine()
            while True:
                for completions in engine.generate(self._requests, sampling):
                    if completions:
                        self._news.put(completions)
                self._requests.wait_for_more()
        # Not every error survives the way to another machine; its text does.
        except FinalError as error:
            self._news.put(FinalError(str(error)))
        except Exception as error:
            self._news.put(RuntimeError(f"{name} failed on node {node}.\n{''.join(traceback.format_exception(error))}"))

    def _ask(self, wish: Wants) -> list[Request]:
        self._news.put(wish)
        return self._shares.get()


class ArrivingRequests(Requests):
    """Requests that are fetched while an engine iterates over them; to the engine they look like all there are.

    Each iteration serves one call of the engine. It ends when there is nothing more to fetch for now; further requests,
    of a worker that died, are then another iteration.
    """

    def __init__(self, fetch: Callable[[Wants], list[Request]], total: int, longest: int) -> None:
        """Takes a function that fetches requests, and number and greatest length of the requests of all workers."""
        self._fetch, self._total, self.longest = fetch, total, longest
        self._kept: list[Request] = []

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Request]:
        shortest = self.longest
        while share := self._kept or self._fetch(Wants.MORE):
            # Engines rely on "longest first": a batch has as many rows as its first prompt allows.
            longer = len(share[0].token_ids) > shortest
            self._kept = share if longer else []
            if longer:
                return
            shortest = len(share[-1].token_ids)
            yield from share

    def wait_for_more(self) -> None:
        """Returns when there are requests for another call of the engine."""
        self._kept = self._kept or self._fetch(Wants.CALL)
