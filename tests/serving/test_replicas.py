"""Replicas on Ray Serve, real ones: their images, and what is lost when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from test_serving import EDITS, GENERATIONS, metric, pixels, png

from commandline import children, end, mistake, start, wait_for
from lpd_export import Pipeline
from server_process import until

pytest.importorskip("ray.serve", reason="Ray Serve is missing: pip install 'lpd-export[serve-ray]'")
pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def pipeline(emoji_bundle: Path) -> Pipeline:
    return Pipeline.open(emoji_bundle, threads=1)


@pytest.fixture(scope="module")
def served(emoji_bundle: Path) -> Iterator[subprocess.Popen[str]]:
    """A server with two replicas; the last test ends it."""
    process = start("serve", emoji_bundle, "--replicas", 2, "--port", 0, "--batch", 4)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def http(served: subprocess.Popen[str]) -> Iterator[httpx2.Client]:
    url = wait_for(served, "lpd-export: listening on ").split(" on ")[1].strip()
    wait_for(served, "lpd-export: ready: emoji32")
    with httpx2.Client(base_url=url, timeout=120) as client:
        yield client


def replicas(served: subprocess.Popen[str]) -> set[int]:
    """Their processes."""
    found = children(served.pid).items()
    return {pid for pid, said in found if said.startswith("ray::ServeReplica:emoji32")}


def busy(served: subprocess.Popen[str], replica: int) -> bool:
    """Whether it makes images: Ray then calls the process after the method that runs."""
    return ":replica.handle_request" in children(served.pid).get(replica, "")


def test_the_images_are_those_of_a_run(http: httpx2.Client, pipeline: Pipeline) -> None:
    made = http.post(GENERATIONS, json={"prompt": "3", "seed": 1, "n": 3, "cfg": 2.5}).json()
    for given, image in zip(made["data"], pipeline.generate([3] * 3, seed=1, cfg=2.5), strict=True):
        np.testing.assert_array_equal(pixels(given["b64_json"]), image.pixels)

    photo = pipeline.generate([1], seed=8)[0].pixels
    made = http.post(EDITS, files={"image": png(photo)}, data={"box": "0,0,16,32", "seed": "1"})
    (image,) = pipeline.edit(photo, box=(0, 0, 16, 32), seed=1)
    np.testing.assert_array_equal(pixels(made.json()["data"][0]["b64_json"]), image.pixels)

    streamed = {"prompt": "2", "seed": 5, "stream": True, "partial_images": 2}
    lines = http.post(GENERATIONS, json=streamed).text.split('"b64_json": "')[1:]
    (image,) = pipeline.generate([2], seed=5)
    trace = [*pipeline.trace(image)]
    steps = len(trace)
    shown = [trace[round(steps / 3) - 1], trace[round(2 * steps / 3) - 1], image.pixels]
    for line, picture in zip(lines, shown, strict=True):
        np.testing.assert_array_equal(pixels(line.split('"')[0]), picture)


def test_what_nobody_waits_for_is_abandoned(http: httpx2.Client) -> None:
    begun = metric(http, "lpd_batch_images_sum")
    body = {"prompt": "1", "n": 8, "steps": 64}
    with pytest.raises(httpx2.ReadTimeout):
        http.post(GENERATIONS, json=body, timeout=0.3)
    until(lambda: metric(http, "lpd_clients_left_total") == 1)
    http.post(GENERATIONS, json={"prompt": "1", "n": 8})
    assert metric(http, "lpd_batch_images_sum") - begun == 8


def test_replicas_that_are_killed_lose_no_request(
    served: subprocess.Popen[str], http: httpx2.Client, pipeline: Pipeline
) -> None:
    first, last = before = sorted(replicas(served))
    begun = metric(http, "lpd_batch_images_count")
    with ThreadPoolExecutor(8) as clients:
        asked = [{"prompt": str(i % 5), "seed": i, "n": 5} for i in range(8)]
        answers = [clients.submit(http.post, GENERATIONS, json=body) for body in asked]
        until(lambda: metric(http, "lpd_batch_images_count") > begun and busy(served, first))
        os.kill(first, signal.SIGKILL)
        until(lambda: metric(http, "lpd_batch_images_count") > begun + 3)  # by the one that is left
        until(lambda: busy(served, last))
        os.kill(last, signal.SIGKILL)
        assert not all(answer.done() for answer in answers)
        for number, answer in enumerate(answers):
            expected = pipeline.generate([number % 5] * 5, seed=number)
            for given, image in zip(answer.result().json()["data"], expected, strict=True):
                np.testing.assert_array_equal(pixels(given["b64_json"]), image.pixels)
    until(lambda: len(replicas(served) - {*before}) == 2)


def test_a_polite_kill_lets_what_has_begun_be_finished(
    served: subprocess.Popen[str], http: httpx2.Client
) -> None:
    begun = metric(http, "lpd_batch_images_count")
    body = {"prompt": "1", "n": 10}
    with ThreadPoolExecutor(5) as clients:
        first = clients.submit(http.post, GENERATIONS, json=body)
        until(lambda: metric(http, "lpd_batch_images_count") > begun)
        others = [clients.submit(http.post, GENERATIONS, json=body) for _ in range(4)]
        until(lambda: metric(http, "lpd_queue_images") >= 25)  # batches pass until the signal comes
        served.send_signal(signal.SIGTERM)
        assert len(first.result().json()["data"]) == 10
        answers = [other.result().json() for other in others]
        refused = [answer["error"]["code"] for answer in answers if "error" in answer]
        assert set(refused) == {"stopping"}
        assert all(len(answer["data"]) == 10 for answer in answers if "data" in answer)
    said = end(served)
    assert said.code == 0
    # What had not begun when a replica was killed, Ray hands to another by itself.
    lost = [line.split(":")[0] for line in said.err.splitlines()]
    assert lost == ["a replica was lost, and another does its work"] * len(lost)
    until(lambda: not children(served.pid))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replicas", 0], "--replicas must be a whole number"),
        (["--ray", "--device", "cuda:1"], "Ray gives each replica a GPU: --device cuda, not cuda"),
    ],
)
def test_what_cannot_be_asked(emoji_bundle: Path, arguments: list[object], words: str) -> None:
    assert words in mistake("serve", emoji_bundle, *arguments)


def test_ray_that_is_missing_or_silent(emoji_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "no Ray answers at RAY_ADDRESS=127.0.0.1:1" in mistake("serve", emoji_bundle, "--ray")
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert "pip install 'lpd-export[serve-ray]'" in mistake("serve", emoji_bundle, "--ray")
