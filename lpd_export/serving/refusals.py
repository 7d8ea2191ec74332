"""Refusals in OpenAI's form: a status, a sentence, and which parameter was wrong.

Knows how mistakes, full queues and faults are told to a client. Does not know a request's meaning.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lpd_export.errors import NumericalError, UserError
from lpd_export.serving.batching import QueueFullError, StoppingError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII, so that half of a character in what a client sent is no fault of ours."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class RefusedError(HTTPException):
    """A request that is answered with a sentence instead of images."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        seconds: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.seconds = seconds
        """After which to try again."""

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> AsciiJSONResponse:
        """The whole answer."""
        headers = {} if self.seconds is None else {"Retry-After": str(self.seconds)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return AsciiJSONResponse(self.body(), self.status, headers)


def refusal(error: Exception, param: str | None = None, wrong: bool = False) -> RefusedError:
    """How an exception of the queue or the pipeline is told.

    Args:
        error: the exception.
        param: which parameter it is about.
        wrong: whether a mistake is the client's; while images are made it is the bundle's or the
            machine's, but for numbers that a setting took out of range.
    """
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, QueueFullError):
        return RefusedError(429, str(error), code="queue_full", seconds=error.seconds)
    if isinstance(error, StoppingError):
        return RefusedError(503, str(error), code="stopping", seconds=1)
    if isinstance(error, UserError):
        wrong = wrong or isinstance(error, NumericalError)
        return RefusedError(400 if wrong else 500, str(error), param)
    return RefusedError(500, "a fault of lpd-export, not of the request: the server's log has more")
