"""Ray, where it is used: imported so that it is quiet, on this machine or on a cluster.

Knows how Ray is started and what it has. Does not know what it is asked to do.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

from lpd_export.errors import UserError
from lpd_export.files import uninterrupted
from lpd_export.runtime.onnxruntime_session import allowed_cores

ANSWER_SECONDS = 5


def import_ray(part: str, needs: str) -> Any:
    """Ray with one of its parts, which says nothing but errors, and nothing to its makers.

    Args:
        part: such as "data".
        needs: begins the sentence that says what to install.

    Raises:
        UserError: if it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray = importlib.import_module("ray")
        importlib.import_module(f"ray.{part}")
    except ImportError as error:
        raise UserError(needs) from error
    for name in ("ray", f"ray.{part}"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray


@contextlib.contextmanager
def ray_session(ray: Any, cpus: int | None) -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, else one of this machine for the block.

    Raises:
        UserError: if the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    # "local", or Ray would join a cluster that somebody else has started on this machine.
    of_machine = {"address": "local", "include_dashboard": False, "num_cpus": cpus}
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdigit():  # Ray itself takes minutes to give up
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else of_machine),
        )
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        if not address:
            raise
        raise UserError(
            f"no Ray answers at RAY_ADDRESS={address}: start it there with `ray start --head`, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it wants a token, or unset RAY_ADDRESS to "
            "use this machine alone"
        ) from error
    try:
        yield
    finally:
        with uninterrupted():
            ray.shutdown()


def cores() -> int:
    """Those that this process may use."""
    return allowed_cores() or os.cpu_count() or 1
