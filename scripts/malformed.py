"""A thousand requests that make no sense: none may be a fault of the server, and none may hang.

    python scripts/malformed.py engines/demo --requests 1000

Bodies are drawn by hypothesis: right ones with a wrong value, JSON of any shape, JSON that is none,
forms with damaged pictures, and bytes that are not even HTTP. Fails at the first answer with a
status of 500 or more, at an error that is not in OpenAI's form, and at one that takes too long;
hypothesis then shows the smallest request that does it. Prints how often each status was answered.
"""

from __future__ import annotations

import io
import json
import socket
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click
import httpx2
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from load import EDITS, GENERATIONS, served
from lpd_export.serving.schema import EditForm, GenerationRequest

MOST_SECONDS = 20
"""That a request without sense may take; a few of them are right by chance, and make images."""
HANGS_UP = "hangs up"
"""What a server may answer to what is not HTTP."""

FIELDS = sorted(GenerationRequest.model_fields)
FORM_FIELDS = sorted(EditForm.model_fields)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats()
TEXTS = st.text(max_size=30) | st.sampled_from(["", "\0", "\ud800", "none", "NaN", "1e999", "٣"])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


class Http(NamedTuple):
    """A request as a client sends it."""

    method: str
    path: str
    parts: dict[str, Any]


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, NaN and half characters too."""
    return json.dumps(value).encode()


def json_request(content: bytes, kind: str = "application/json") -> Http:
    return Http("POST", GENERATIONS, {"content": content, "headers": {"content-type": kind}})


@st.composite
def nearly_right(draw: st.DrawFn) -> Http:
    """A right request in which a few fields have any value."""
    body = {"prompt": "0", "seed": 0}
    wrong = draw(st.dictionaries(st.sampled_from(FIELDS) | TEXTS, JSON, min_size=1, max_size=4))
    return json_request(as_json(body | wrong))


@st.composite
def damaged_json(draw: st.DrawFn) -> Http:
    """JSON that is none, or is more than anybody reads."""
    whole = as_json({"prompt": "0", "n": 1})
    content = draw(
        st.binary(max_size=60)
        | st.integers(0, len(whole) - 1).map(lambda end: whole[:end])
        | st.sampled_from(
            [
                b"[" * 60_000,
                b'{"a":' * 10_000,
                b'{"prompt":"0","n":' + b"9" * 5000 + b"}",
                b'{"prompt":"0","prompt":1}',
                b'{"prompt":"' + b"x" * 70_000 + b'"}',
                b"\xef\xbb\xbf{}",
                b'"\\ud800"',
            ]
        )
    )
    kinds = ["application/json", "application/json; charset=utf-16", "text/plain", "", "a/b/c"]
    return json_request(content, draw(st.sampled_from(kinds)))


@st.composite
def forms(draw: st.DrawFn) -> Http:
    """Pictures and masks, whole or damaged, beside fields of any text."""
    buffer = io.BytesIO()
    side = draw(st.integers(1, 9))
    mode = draw(st.sampled_from(["RGB", "RGBA", "L", "P", "1"]))
    kind = draw(st.sampled_from(["PNG", "GIF", "BMP", "TIFF"] if mode != "RGBA" else ["PNG"]))
    Image.fromarray(np.full((side, side, 3), 7, np.uint8)).convert(mode).save(buffer, kind)
    whole = buffer.getvalue()
    damaged = st.binary(max_size=40) | st.integers(0, len(whole)).map(lambda end: whole[:end])
    names = st.sampled_from(["image", "mask", "image[]", "other"])
    files = draw(st.dictionaries(names, st.just(whole) | damaged, max_size=3))
    chosen = st.sampled_from([name for name in FORM_FIELDS if name not in ("image", "mask")])
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    values = texts | st.sampled_from(["0,0,1,1", "0,0,4,4", "1", "-1", "true", "1e5", "9" * 400])
    data = draw(st.dictionaries(chosen, values, max_size=4))
    parts: dict[str, Any] = {"data": data, "files": files or {"image": whole}}
    if draw(st.booleans()):
        kinds = ["multipart/form-data", "multipart/form-data; boundary=x", "multipart/mixed"]
        content_type = draw(st.sampled_from([*kinds, "application/x-www-form-urlencoded"]))
        parts = {"content": draw(st.binary(max_size=99)), "headers": {"content-type": content_type}}
    return Http("POST", EDITS, parts)


@st.composite
def elsewhere(draw: st.DrawFn) -> Http:
    """Methods and paths that are not there."""
    text = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), max_size=30)
    place = draw(
        st.sampled_from([GENERATIONS, EDITS, "/v1/models/", "/page/", "/docs-files/", "/"])
    )
    method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "NONSENSE"]))
    return Http(method, place + draw(text | st.just("../../etc/passwd")), {})


NOT_HTTP = st.binary(min_size=1, max_size=80) | st.sampled_from(
    [
        b"POST " + GENERATIONS.encode() + b" HTTP/1.1\r\nHost: x\r\n" + rest
        for rest in (
            b"Content-Length: -1\r\n\r\n",
            b"Content-Length: 99999999999999999999999999\r\n\r\n",
            b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
            b"Content-Type: application/json\r\nContent-Length: 40\r\n\r\n{}",
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
            b"A: " + b"b" * 100_000 + b"\r\n\r\n",
        )
    ]
)
REQUESTS = st.one_of(
    nearly_right(),
    JSON.map(as_json).map(json_request),
    damaged_json(),
    forms(),
    elsewhere(),
    NOT_HTTP,
)


def ask(client: httpx2.Client, request: Http | bytes) -> str:
    """The status of an answer, which must be none of 500 and an error in OpenAI's form."""
    if isinstance(request, bytes):
        return ask_in_bytes(str(client.base_url), request)
    try:
        answer = client.request(request.method, request.path, **request.parts)
    except httpx2.RemoteProtocolError:
        return HANGS_UP
    except (httpx2.InvalidURL, httpx2.LocalProtocolError):
        return "not sent"
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and request.method != "HEAD":
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, answer.text
        assert error["message"], answer.text
    return str(answer.status_code)


def ask_in_bytes(url: str, content: bytes) -> str:
    """The status of the answer to what need not be HTTP, after which nothing more is sent."""
    place = urlsplit(url)
    address = (place.hostname or "", place.port or 80)
    with socket.create_connection(address, timeout=MOST_SECONDS) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(4096)
        except ConnectionError:
            return HANGS_UP
    if not said:
        return HANGS_UP
    status = said.split()[1].decode("ascii")
    assert status < "500", said
    return status


def fuzz(url: str, requests: int) -> Counter[str]:
    """Asks for so many things; how often each status was answered.

    Raises:
        AssertionError: for a fault, with the smallest request that shows it.
    """
    statuses: Counter[str] = Counter()
    with httpx2.Client(base_url=url, timeout=MOST_SECONDS) as client:

        @settings(
            max_examples=requests,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(REQUESTS)
        def check(request: Http | bytes) -> None:
            statuses[ask(client, request)] += 1

        check()
        assert client.get("/ready").status_code == 200
    return statuses


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--requests", default=1000, show_default=True)
def main(bundle: Path, requests: int) -> None:
    """Asks a server of BUNDLE for nonsense."""
    with served(bundle, batch=4, threads=None) as (url, _):
        statuses = fuzz(url, requests)
    for status, times in sorted(statuses.items()):
        click.echo(f"{status}: {times}")


if __name__ == "__main__":
    main()
