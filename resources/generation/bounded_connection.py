"""Connections on which an answer takes no longer, and is no larger, than it may be, however its bytes come."""

import contextlib
import threading
import time
from typing import Any

import httpcore2
import httpx2

# What no answer needs: a completion of a million tokens with their ids.
MOST_BYTES = 32_000_000


class _Bounds(threading.local):
    """Of the request that this thread makes: a connection serves one after the other."""

    deadline, size = float("inf"), 0


BOUNDS = _Bounds()


def bound(client: httpx2.Client) -> None:
    """Holds each request of a client to its timeout for reading, as a whole, and its answer to a size."""
    # The library's own timeouts begin anew with each byte, and its hooks see an answer after its headers. It takes no backend
    # from outside, except where one builds its transports, and those of proxies, oneself.
    transports: list[Any] = [client._transport, *filter(None, client._mounts.values())]
    for transport in transports:
        transport._pool._network_backend = _Backend()
    # A few bytes can be unpacked to any number.
    client.headers["accept-encoding"] = "identity"
    client.event_hooks["request"].append(_begin)
    client.event_hooks["response"].insert(0, _refuse_packed)


def _begin(request: httpx2.Request) -> None:
    BOUNDS.deadline, BOUNDS.size = time.monotonic() + request.extensions["timeout"]["read"], 0


def _refuse_packed(response: httpx2.Response) -> None:
    if (encoding := response.headers.get("content-encoding", "").strip().lower()) not in ("", "identity"):
        raise httpx2.DecodingError(f"it is packed as {encoding}, which was not asked for", request=response.request)


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(self, *args: Any, **options: Any) -> httpcore2.NetworkStream:
        return _BoundedStream(super().connect_tcp(*args, **options))


class _BoundedStream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if (left := BOUNDS.deadline - time.monotonic()) > 0:
            with contextlib.suppress(httpcore2.ReadTimeout):
                data = self._stream.read(max_bytes, left)
                BOUNDS.size += len(data)
                if BOUNDS.size > MOST_BYTES:
                    raise httpx2.DecodingError(f"more than {MOST_BYTES:,} bytes")
                return data
        raise httpx2.ReadTimeout("the answer came too slowly")

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **options: Any) -> httpcore2.NetworkStream:
        return _BoundedStream(self._stream.start_tls(*args, **options))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
