"""A server for tests: in a thread of this process, on a free port, stopped at the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import httpx2

from lpd_export.serving.making import InProcess
from lpd_export.serving.request import ServeRequest
from lpd_export.serving.server import Server, listen


class Running(NamedTuple):
    """A server and how to reach it."""

    server: Server
    url: str

    def client(self, **settings: object) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **settings)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """In the block a model works at something else, and everything else waits."""
        begun, end = threading.Event(), threading.Event()

        def work(_: object) -> None:
            begun.set()
            assert end.wait(60)

        queue = self.server.models[name].queue
        queue.call(work)
        assert begun.wait(60)
        try:
            yield
        finally:
            end.set()


@contextlib.contextmanager
def running(request: ServeRequest) -> Iterator[Running]:
    """A server that is ready."""
    said: list[str] = []
    server = Server(request, InProcess(request), said.append)
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.run_models(listener)))
        thread.start()
        try:
            until(lambda: any(line.startswith("ready") for line in said))
            yield Running(server, said[0].removeprefix("listening on "))
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive()


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.005)
