"""The server as clients ask it: OpenAI's own, and plain HTTP where that is not rude enough."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

from commandline import end, mistake, start, wait_for
from lpd_export import Pipeline
from lpd_export.schedule.orders import step_of_cell
from lpd_export.schedule.schedule_file import Schedule
from lpd_export.serving import gate
from lpd_export.serving.request import ServeRequest
from server_process import Running, running, until

pytestmark = pytest.mark.model

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def pipeline(small_bundle: Path) -> Pipeline:
    """A grid of 4x4 cells of 4 pixels, in 4 steps of 1, 3, 5 and 7 cells."""
    return Pipeline.open(small_bundle, threads=1)


@pytest.fixture(scope="module")
def served(small_bundle: Path) -> Iterator[Running]:
    request = ServeRequest((small_bundle,), max_queue=16, batch=4, threads=1)
    with running(request) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def http(served: Running) -> Iterator[httpx2.Client]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def photo(pipeline: Pipeline) -> NDArray[np.uint8]:
    return pipeline.generate([1], seed=8)[0].pixels


def pixels(content: str) -> NDArray[np.uint8]:
    """Of a PNG in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def metric(http: httpx2.Client, name: str) -> float:
    """The sum over all labels."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0] == name)


# ----------------------------------------------------------------------------- images and edits


def test_openai_s_client_gets_the_images_of_a_run(
    client: openai.OpenAI, pipeline: Pipeline
) -> None:
    made = client.images.generate(
        model="small",
        prompt="ice cream",
        n=2,
        size="16x16",
        extra_body={"seed": 2**64 - 1, "cfg": 2.5, "guidance": "constant", "temperature": 0.9}
        | {"top_k": 40, "top_p": 0.9, "index": 1, "details": True},
    )
    settings = {"cfg": 2.5, "guidance": "constant", "temperature": 0.9, "top_k": 40, "top_p": 0.9}
    expected = pipeline.generate([1] * 3, seed=2**64 - 1, **settings)[1:]  # type: ignore[arg-type]
    assert made.data
    assert made.usage
    assert (made.size, made.usage.output_tokens) == ("16x16", 32)
    for given, image in zip(made.data, expected, strict=True):
        assert given.b64_json
        np.testing.assert_array_equal(pixels(given.b64_json), image.pixels)
        told = given.model_dump()
        assert (told["index"], told["seed"]) == (image.index, image.seed)
        assert (told["class_id"], told["class_name"]) == (1, "ice-cream")
        steps = step_of_cell(image.order[None], image.schedule.group_sizes)[0]
        assert told["step_of_cell"] == steps.tolist()


def test_other_steps_and_orders_are_those_of_a_schedule_made_for_them(
    client: openai.OpenAI, pipeline: Pipeline
) -> None:
    for asked, schedule in (
        ({"steps": 6}, Schedule.make(4, 6)),
        ({"order": "raster"}, Schedule.make(4, 4, "raster")),
        ({"steps": 4, "order": "locality"}, None),  # the bundle's own
    ):
        made = client.images.generate(prompt="4", extra_body={"seed": 3} | asked)
        (expected,) = pipeline.generate([4], seed=3, schedule=schedule)
        assert made.data
        np.testing.assert_array_equal(pixels(made.data[0].b64_json or ""), expected.pixels)


def test_a_seed_that_nobody_gave_is_told(client: openai.OpenAI, pipeline: Pipeline) -> None:
    made = client.images.generate(prompt="none", response_format="url")
    again = client.images.generate(prompt="none", response_format="url")
    assert made.data
    assert again.data
    told = made.data[0].model_dump()
    assert told["seed"] != again.data[0].model_dump()["seed"]
    (expected,) = pipeline.generate([None], seed=told["seed"])
    head, content = (made.data[0].url or "").split(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(pixels(content), expected.pixels)


def test_partial_images_are_the_trace(client: openai.OpenAI, pipeline: Pipeline) -> None:
    extra = {"seed": 5, "n": 2}
    events = list(
        client.images.generate(prompt="2", stream=True, partial_images=3, extra_body=extra)
    )
    images = pipeline.generate([2, 2], seed=5)
    for image in images:
        own = [event for event in events if event.model_dump()["index"] == image.index]
        *partial, last = own
        assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
        assert last.type == "image_generation.completed"
        assert [event.model_dump()["partial_image_index"] for event in partial] == [0, 1, 2]
        for event, expected in zip(own, pipeline.trace(image), strict=True):
            np.testing.assert_array_equal(pixels(event.b64_json), expected)


def white(photo: NDArray[np.uint8], where: NDArray[np.bool_]) -> dict[str, Any]:
    return {"image": png(photo), "mask": png(where.astype(np.uint8) * 255)}


def transparent(photo: NDArray[np.uint8], where: NDArray[np.bool_]) -> dict[str, Any]:
    alpha = np.where(where, 0, 255).astype(np.uint8)[..., None]
    black = np.zeros_like(photo)  # what is transparent says it, whatever the colour
    return {"image": png(photo), "mask": png(np.concatenate([black, alpha], 2))}


def transparent_image(photo: NDArray[np.uint8], where: NDArray[np.bool_]) -> dict[str, Any]:
    white = np.where(where[..., None], 255, photo).astype(np.uint8)
    return {"image": png(np.dstack([white, np.where(where, 0, 255).astype(np.uint8)]))}


@pytest.mark.parametrize("way", [white, transparent, transparent_image])
def test_an_edit_is_the_pipeline_s(
    client: openai.OpenAI,
    pipeline: Pipeline,
    photo: NDArray[np.uint8],
    way: Callable[..., dict[str, Any]],
) -> None:
    """OpenAI's masks are transparent where the image changes, ours are white."""
    where = np.zeros((16, 16), np.bool_)
    where[:, 8:] = True
    picture = np.where(where[..., None], 255, photo) if way is transparent_image else photo
    expected = pipeline.edit(picture.astype(np.uint8), where, [3, 3, 3], seed=4, cfg=3)[1:]
    made = client.images.edit(
        prompt="bird",
        n=2,
        extra_body={"seed": 4, "index": 1, "cfg": 3, "details": True},
        **way(photo, where),
    )
    assert made.data
    assert made.usage
    assert made.usage.output_tokens == 16
    for given, image in zip(made.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(given.b64_json or ""), image.pixels)
        new = np.reshape(given.model_dump()["step_of_cell"], (4, 4)) >= 0
        np.testing.assert_array_equal(new, where[::4, ::4])


@pytest.mark.parametrize(
    ("asked", "how"),
    [
        ({"box": "0,4,8,16", "order": "random"}, {"box": (0, 4, 8, 16), "order": "random"}),
        ({"outpaint": "4", "paste": "false"}, {"outpaint": 4, "paste": False}),
        ({"box": "0,0,32,8", "fit": "stretch"}, {"box": (0, 0, 32, 8), "fit": "stretch"}),
    ],
)
def test_our_own_ways_to_edit(
    http: httpx2.Client,
    pipeline: Pipeline,
    photo: NDArray[np.uint8],
    asked: dict[str, str],
    how: dict[str, Any],
) -> None:
    if how.get("fit"):
        photo = photo.repeat(2, axis=1)
    (expected,) = pipeline.edit(photo, seed=1, **how)
    data = asked | {"seed": "1", "stream": "true", "partial_images": "1"}
    answer = http.post(EDITS, files={"image": png(photo)}, data=data)
    partial, last = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: ")
    ]
    assert (partial["type"], partial["step"]) == ("image_edit.partial_image", 2)
    assert last["type"] == "image_edit.completed"
    np.testing.assert_array_equal(pixels(last["b64_json"]), expected.pixels)


# ------------------------------------------------------------------------------ shared batches


def test_requests_of_all_kinds_share_a_batch_and_keep_their_images(
    served: Running, http: httpx2.Client, pipeline: Pipeline, photo: NDArray[np.uint8]
) -> None:
    edit = {"files": {"image": png(photo)}, "data": {"box": "0,0,8,8", "seed": "1", "prompt": "1"}}
    asked: list[tuple[str, dict[str, Any]]] = [
        (GENERATIONS, {"json": {"prompt": "0", "seed": 7, "cfg": 1}}),
        (GENERATIONS, {"json": {"prompt": "4", "seed": 8, "top_k": 5, "order": "random"}}),
        (GENERATIONS, {"json": {"prompt": "none", "seed": 9, "cfg": 6, "temperature": 0.5}}),
        (GENERATIONS, {"json": {"prompt": "1", "seed": 1, "steps": 3}}),  # cannot share
        (EDITS, edit),
    ]
    alone = [
        *pipeline.generate([0], seed=7, cfg=1),
        *pipeline.generate([4], seed=8, top_k=5, schedule=Schedule.make(4, 4, "random")),
        *pipeline.generate([None], seed=9, cfg=6, temperature=0.5),
        *pipeline.generate([1], seed=1, schedule=Schedule.make(4, 3)),
        *pipeline.edit(photo, box=(0, 0, 8, 8), seed=1, classes=[1]),
    ]
    batches = metric(http, "lpd_batch_images_count")
    waiting = served.server.models["small"].queue
    with ThreadPoolExecutor(8) as clients:
        with served.busy("small"):
            # The edit's tokens are made first, in front of all batches.
            answers = [clients.submit(http.post, path, **body) for path, body in asked]
            until(lambda: waiting.waiting == 4)
        contents = [answer.result().json()["data"][0]["b64_json"] for answer in answers]
    for content, image in zip(contents, alone, strict=True):
        np.testing.assert_array_equal(pixels(content), image.pixels)
    assert metric(http, "lpd_batch_images_count") - batches <= 3


def test_a_full_queue_refuses_and_says_when(served: Running, http: httpx2.Client) -> None:
    queue = served.server.models["small"].queue
    with ThreadPoolExecutor(2) as clients:
        with served.busy("small"):
            waits = clients.submit(http.post, GENERATIONS, json={"prompt": "1", "n": 10})
            until(lambda: queue.waiting == 10)
            refused = http.post(GENERATIONS, json={"prompt": "1", "n": 7})
            rest = clients.submit(http.post, GENERATIONS, json={"prompt": "1", "n": 6})
            until(lambda: queue.waiting == 16)
            edit = {"files": {"image": b"of any kind"}, "data": {"box": "0,0,1,1"}}
            assert http.post(EDITS, **edit).status_code == 429  # type: ignore[arg-type]
        assert rest.result().status_code == 200
        assert len(waits.result().json()["data"]) == 10
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    error = refused.json()["error"]
    assert error["message"].startswith("10 images wait, and 16 may: try again in ")
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_dropped(served: Running, stream: bool) -> None:
    queue = served.server.models["small"].queue
    with served.busy("small"):
        body = {"prompt": "1", "n": 3, "stream": stream}
        with served.client() as client, pytest.raises(httpx2.ReadTimeout):
            client.post(GENERATIONS, json=body, timeout=0.3)
        until(lambda: queue.waiting == 0)


# ------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "prompt is missing: A class"),
        ({"prompt": "red pandas"}, "prompt", "there is no class 'red pandas'; did you mean 'red"),
        ({"prompt": "zebra"}, "prompt", "listed by GET /v1/models/small"),
        ({"prompt": "crane"}, "prompt", "the name of several classes: give the number, 2"),
        ({"prompt": "x" * 1001}, "prompt", "at most 1000 characters, but it has 1001"),
        ({"prompt": 3}, "prompt", "prompt must be text in quotes, but it is 3"),
        ({"prompt": "1", "n": 0}, "n", "n must be a whole number from 1 to 10, but it is 0"),
        ({"prompt": "1", "n": "2"}, "n", "from 1 to 10, but it is '2'"),
        ({"prompt": "1", "size": "64x64"}, "size", "size must be 16x16 or auto for small"),
        ({"prompt": "1", "seed": 2**64}, "seed", "from 0 to 2^64 - 1"),
        ({"prompt": "1", "cfg": 1001}, "cfg", "a number from 0 to 1000, but it is 1001"),
        ({"prompt": "1", "top_p": 0}, "top_p", "a number above 0 and at most 1, but it is 0"),
        ({"prompt": "1", "steps": 17}, "steps", "steps must be from 1 to 16 for small"),
        ({"prompt": "1", "quality": "hd"}, "quality", "must be auto or standard, but it is 'hd'"),
        ({"prompt": "1", "output_format": "webp"}, "output_format", "must be png, but it is"),
        ({"prompt": "1", "sede": 1}, "sede", "there is no parameter 'sede': did you mean seed?"),
        ({"prompt": "1", "model": "big"}, "model", "there is no model 'big': it is one of small"),
        ([], None, "the body must be an object"),
    ],
)
def test_mistakes_are_told(http: httpx2.Client, body: Any, param: str | None, words: str) -> None:
    answer = http.post(GENERATIONS, json=body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


def test_openai_s_client_understands_a_mistake(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        client.images.generate(prompt="red pandas")
    assert (told.value.param, told.value.code) == ("prompt", "unknown_class")


@pytest.mark.parametrize(
    ("files", "data", "words"),
    [
        ({}, {"box": "0,0,8,8"}, "image is missing: Any picture"),
        ({"image": b"GIF89a"}, {"box": "0,0,8,8"}, "image: "),
        ({"image": png(np.zeros((9, 9, 3), np.uint8))}, {}, "say what is to be made anew"),
        (
            {"image": png(np.zeros((9, 9, 3), np.uint8))},
            {"box": "0,0,10,8"},
            "not inside the image, which is 9 x 9",
        ),
        ({"image": png(np.zeros((9, 9, 3), np.uint8))}, {"box": "1,2"}, "must be like 16,0,48,32"),
        ({"image": png(np.zeros((9, 9, 3), np.uint8))}, {"n": "x"}, "from 1 to 10, but it is 'x'"),
        (
            {"image": png(np.zeros((9, 9, 3), np.uint8))}
            | {"mask": png(np.zeros((9, 9), np.uint8))},
            {},
            "the mask keeps all of the image",
        ),
    ],
)
def test_mistakes_of_edits_are_told(
    http: httpx2.Client, files: dict[str, bytes], data: dict[str, str], words: str
) -> None:
    answer = http.post(EDITS, files=files or {"other": b""}, data=data)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_bodies_are_bounded(
    served: Running, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_pieces() -> Iterator[bytes]:  # without its length
        yield from [b" " * 4096] * 20

    large = {"content": b" " * (gate.MOST_JSON_BYTES + 1)}
    for body in (large, {"content": in_pieces()}):
        answer = http.post(GENERATIONS, headers={"content-type": "application/json"}, **body)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            413,
            "invalid_request_error",
        )
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        assert slow.recv(99).startswith(b"HTTP/1.1 408 ")


def test_another_site_s_page_may_not_ask(http: httpx2.Client) -> None:
    answer = http.post(GENERATIONS, json={"prompt": "1"}, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403


# ----------------------------------------------------------------------------------- operation


def test_what_operators_and_clients_look_at(client: openai.OpenAI, http: httpx2.Client) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    told = client.models.retrieve("small").model_dump()
    assert (told["resolution"], told["grid"], told["steps"]) == (16, 4, 4)
    assert told["class_names"][0] == ["red panda", "firefox"]
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    assert http.get("/v1/models/nothing").json()["error"]["code"] == "model_not_found"
    refusals = metric(http, "lpd_refusals_total")
    images = metric(http, "lpd_images_total")
    http.post(GENERATIONS, json={"prompt": "zebra"})
    http.post(GENERATIONS, json={"prompt": "1", "n": 3})
    assert metric(http, "lpd_refusals_total") == refusals + 1
    assert metric(http, "lpd_images_total") == images + 3
    for stage in ("queue", "generate", "encode", "total"):
        assert (
            f'lpd_stage_seconds_count{{model="small",stage="{stage}"}}' in http.get("/metrics").text
        )
    described = http.get("/openapi.json").json()["paths"]
    assert {GENERATIONS, EDITS, "/v1/models", "/ready", "/metrics"} < set(described)
    for path in ("/", "/docs"):
        text = http.get(path).text
        assert "<html" in text
        assert "//" not in text.replace("<!-- ", "").replace("// ", ""), f"{path} fetches"


def test_keys_are_asked_for(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# of the team\nfirst\n second \n")
    request = ServeRequest((small_bundle,), api_key=tmp_path / "keys", threads=1)
    with running(request) as served, served.client() as http:
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "first"}):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/metrics").status_code == 401
        assert http.get("/ready").status_code == http.get("/").status_code == 200
        for key in ("first", "second"):
            client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key)
            assert client.images.generate(prompt="1").data


def test_a_model_is_chosen_by_its_folder(
    small_bundle: Path, emoji_bundle: Path, tmp_path: Path
) -> None:
    request = ServeRequest((small_bundle, emoji_bundle), threads=1)
    with running(request) as served, served.client() as http:
        sizes = [
            http.post(GENERATIONS, json={"model": name, "prompt": "0"}).json()["size"]
            for name in ("small", "emoji32")
        ]
        assert sizes == ["16x16", "32x32"]
        answer = http.post(GENERATIONS, json={"prompt": "0"})
        assert answer.json()["error"]["message"] == (
            "model is missing: it is one of small, emoji32"
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-queue", 9], "--max-queue must be a whole number from 10 to 1000000"),
        (["--batch", 0], "--batch must be a whole number"),
        (["--port", 65536], "--port must be a whole number from 0 to 65535"),
        (["--max-wait", -1], "--max-wait must be a number from 0 to 60000"),
        (["--api-key", "missing"], "cannot read missing: No such file"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1 port 8000"),
        (["--device", "cuda:9"], "CUDA"),
        (["{bundle}"], "are both called small: clients choose a model by its folder's name"),
        (["nothing"], "there is no bundle nothing"),
    ],
)
def test_mistakes_of_the_command_are_told(
    small_bundle: Path, arguments: list[Any], words: str
) -> None:
    typed = [str(word).format(bundle=small_bundle) for word in arguments]
    assert words in mistake("serve", small_bundle, *typed)


@pytest.mark.slow
def test_a_polite_kill_lets_what_has_begun_be_finished(emoji_bundle: Path) -> None:
    process = start("serve", emoji_bundle, "--port", 0, "--batch", 2, "--threads", 1)
    url = wait_for(process, "lpd-export: listening on ").split(" on ")[1].strip()
    wait_for(process, "lpd-export: ready: emoji32")
    with httpx2.Client(base_url=url, timeout=120) as http, ThreadPoolExecutor(2) as clients:
        begun = clients.submit(http.post, GENERATIONS, json={"prompt": "1", "n": 10})
        until(lambda: "lpd_batch_images_count{" in http.get("/metrics").text)
        waits = clients.submit(http.post, GENERATIONS, json={"prompt": "1", "n": 10})
        until(lambda: 'lpd_queue_images{model="emoji32"} 1' in http.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert len(begun.result().json()["data"]) == 10
        refused = waits.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
    assert end(process).code == 0
