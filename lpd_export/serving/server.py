"""The process that serves: its socket, its models' queues, and how it ends.

Knows uvicorn and signals. A first signal lets what has begun be finished, a second one does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from PIL import Image

from lpd_export.errors import UserError
from lpd_export.serving.app import make_app
from lpd_export.serving.batching import Makers
from lpd_export.serving.making import InProcess
from lpd_export.serving.metrics import Meters
from lpd_export.serving.model import ServedModel
from lpd_export.serving.request import ServeRequest

MOST_CONNECTIONS = 4096
MOST_PIXELS = 2**24
"""Of an uploaded picture, 4096 x 4096: read, each takes 12 bytes or so for a moment."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def serve(request: ServeRequest, say: Callable[[str], None]) -> None:
    """Serves until a signal comes; then what has begun is finished.

    Args:
        request: what was asked.
        say: told where it listens, and when it is ready.

    Raises:
        UserError: if the request is wrong, the address is taken or a bundle cannot be run here.
    """
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    with (
        contextlib.closing(listen(request.host, request.port)) as listener,
        makers_of(request) as makers,
    ):
        asyncio.run(Server(request, makers, say).run_models(listener))


@contextlib.contextmanager
def makers_of(request: ServeRequest) -> Iterator[Makers]:
    """Where batches are made: in this process, or by replicas.

    Raises:
        UserError: if Ray is wanted, but is missing or has too little.
    """
    bundles = list(request.check().values())
    if not request.on_ray:
        yield InProcess(request)
        return
    from lpd_export.serving.replicas import cluster

    with cluster(request, bundles) as found:
        yield found


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: if it cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from error
    # Of its connections too: an answer's body would wait 40 ms for the client to confirm its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Server(uvicorn.Server):
    """uvicorn's server with models behind it, which load while it already answers.

    Args:
        request: what was asked.
        makers: where batches are made.
        say: as `serve` takes it.

    Raises:
        UserError: if the request is wrong.
    """

    def __init__(self, request: ServeRequest, makers: Makers, say: Callable[[str], None]) -> None:
        bundles, keys, meters = request.check(), request.keys(), Meters()
        self._makers = makers
        self.models = {
            name: ServedModel(name, bundle, request, makers, meters)
            for name, bundle in bundles.items()
        }
        config = uvicorn.Config(
            make_app(self.models, keys, meters),
            # With httptools, where it is installed, unknown methods would not reach us.
            http="h11",
            access_log=False,
            log_level=logging.WARNING,
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
        )
        super().__init__(config)
        self._say = say

    async def run_models(self, listener: socket.socket) -> None:
        """Serves on a socket until it is stopped.

        Raises:
            UserError: if a bundle cannot be run here.
        """
        host, port = listener.getsockname()[:2]
        self._say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
        for model in self.models.values():
            model.queue.start()
        serving = asyncio.create_task(self.serve(sockets=[listener]))
        opened = [asyncio.wrap_future(model.queue.opened) for model in self.models.values()]
        try:
            for maker in opened:
                await asyncio.wait((serving, maker), return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    break
                maker.result()
            else:
                self._say(f"ready: {', '.join(self.models)}")
        finally:
            if not serving.done() and any(f.done() and f.exception() for f in opened):
                self.stop()
            await serving
        for model in self.models.values():
            await asyncio.to_thread(model.queue.join)

    def stop(self) -> None:
        """Takes no more requests; `serve` returns when the begun ones are answered."""
        self.should_exit = True
        self._makers.stop()
        for model in self.models.values():
            model.queue.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, signals are not raised again: an orderly end is a success."""
        if threading.current_thread() is not threading.main_thread():  # which alone has signals
            yield
            return
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
