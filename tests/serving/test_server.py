"""The server's socket."""

from __future__ import annotations

import contextlib
import socket

from lpd_export.serving.server import listen


def test_an_answer_waits_for_no_confirmation() -> None:
    """Nagle's algorithm held the body of each answer back for 40 ms."""
    with (
        contextlib.closing(listen("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
        contextlib.closing(listener.accept()[0]) as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
