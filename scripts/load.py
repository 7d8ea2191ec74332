"""A server under load: is every image still run's, and what do requests wait?

    python scripts/load.py engines/demo --batch 4 --out build/load
    python scripts/load.py engines/demo --seconds 10 --turn 2 --clients 8
    python scripts/load.py engines/demo --replicas 2

Starts `lpd-export serve` and measures, in turns with `bench` where it is compared with it: how long
until it is ready; a lone request; the images a second of clients who ask again as soon as they are
answered; mixed requests of all kinds by as many, each image compared with the one that the bundle
makes of the same request alone, while the process's memory is watched; and the latency over the
offered rate, drawn. Prints Markdown, and writes load.json and load.png.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lpd_export import Pipeline
from lpd_export.bench.timing import TOTAL, BundleContender
from lpd_export.runtime.requests import GeneratedImage
from lpd_export.schedule.schedule_file import Schedule

LONE_ROUNDS = 15
WATCH_SECONDS = 0.05
ROUNDS = 3
"""In which server and bench take turns."""
SHARES = (0.25, 0.5, 0.7, 0.85, 0.95, 1.2)
"""Of the images a second of many clients: the offered rates."""
ORDINARY = [{"prompt": str(i), "seed": i} for i in range(4)]
CPU, MADE = "process_cpu_seconds_total", "lpd_batch_images_sum"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


class Asked(NamedTuple):
    """A request, and how the bundle alone makes its images."""

    path: str
    body: dict[str, Any]
    alone: Callable[[Pipeline], list[GeneratedImage]]


class Answered(NamedTuple):
    """An answer, or a refusal."""

    status: int
    seconds: float
    images: list[NDArray[np.uint8]]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--batch", default=4, show_default=True)
@click.option("--threads", type=int, help="Of a CPU.  [default: the physical cores]")
@click.option("--replicas", type=int, help="On Ray Serve; CPU and memory are then not all of it.")
@click.option("--clients", default=64, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="Of mixed requests.")
@click.option("--turn", default=20.0, show_default=True, help="Seconds of everything else at once.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/load"))
def main(
    bundle: Path,
    batch: int,
    threads: int | None,
    replicas: int | None,
    clients: int,
    seconds: float,
    turn: float,
    out: Path,
) -> None:
    """Measures a server of BUNDLE, and fails if an image is not run's."""
    found = measure(bundle, batch, threads, replicas, clients, seconds, turn)
    out.mkdir(parents=True, exist_ok=True)
    (out / "load.json").write_text(json.dumps(found, indent=1))
    draw(found, out / "load.png")
    for line in report(found):
        click.echo(line)
    if found["mixed"]["other_images"] or found["mixed"]["errors"]:
        sys.exit(1)


def measure(
    bundle: Path,
    batch: int,
    threads: int | None,
    replicas: int | None,
    clients: int,
    seconds: float,
    turn: float,
) -> dict[str, Any]:
    """All figures."""
    with (
        served(bundle, batch, threads, replicas) as (url, ready),
        Pipeline.open(bundle, threads=threads) as pipeline,
    ):
        bench = BundleContender("bench", pipeline)
        lone = measure_lone(url, bench)
        many = measure_many(url, bench, batch, clients, turn)
        mixed = asyncio.run(measure_mixed(url, pipeline, clients, seconds))
        offered = [
            asyncio.run(measure_offered(url, many["served"] * share, turn)) for share in SHARES
        ]
    return {
        "bundle": str(bundle),
        "batch": batch,
        "replicas": replicas,
        "clients": clients,
        "ready_seconds": ready,
        "lone": lone,
        "many": many,
        "mixed": mixed,
        "offered": offered,
    }


@contextlib.contextmanager
def served(
    bundle: Path, batch: int, threads: int | None, replicas: int | None
) -> Iterator[tuple[str, float]]:
    """A server in a process of its own: where it is, and after how many seconds it was ready."""
    command = [str(Path(sys.executable).with_name("lpd-export")), "serve", str(bundle)]
    command += ["--port", "0", "--batch", str(batch)]
    for option, value in (("--threads", threads), ("--replicas", replicas)):
        command += [option, str(value)] if value else []
    begun = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        ours = (line for line in process.stderr if line.startswith("lpd-export: "))
        said = list(itertools.islice(ours, 2))
        if len(said) < 2:
            raise click.ClickException("".join(said))
        yield said[0].split(" on ")[1].strip(), time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait(120)


def measure_lone(url: str, bench: BundleContender) -> dict[str, float]:
    """A request when nobody else asks, in turns with bench: the medians of both, and of their CPU.

    CPU seconds are less disturbed by what else runs on the machine.
    """
    rounds = []
    with httpx2.Client(base_url=url, timeout=600) as client:
        for number in range(-1, LONE_ROUNDS):  # the first of each warms up
            worked, alone = time.process_time(), bench.run(1, 0)[TOTAL]
            worked, before = time.process_time() - worked, metric(client, CPU)
            begun = time.perf_counter()
            client.post(GENERATIONS, json=ORDINARY[number % 4]).raise_for_status()
            answered = time.perf_counter() - begun
            rounds.append((alone, answered, worked, metric(client, CPU) - before))
    names = ("bench", "served", "bench_cpu", "served_cpu")
    return dict(zip(names, map(statistics.median, zip(*rounds[1:], strict=True)), strict=True))


def metric(client: httpx2.Client, name: str) -> float:
    """A figure of the server, the sum over all labels."""
    return figure(client.get("/metrics").text, name)


def figure(text: str, name: str) -> float:
    """The same of what `/metrics` said."""
    lines = text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line))


def measure_many(
    url: str, bench: BundleContender, batch: int, clients: int, turn: float
) -> dict[str, float]:
    """Images a second, and a CPU second, of many clients and of bench at the same batch."""
    bench.run(batch, 0)
    images, seconds = defaultdict[str, float](float), defaultdict[str, float](float)
    for _ in range(ROUNDS):
        begun, worked = time.perf_counter(), time.process_time()
        while time.perf_counter() - begun < turn:
            bench.run(batch, 0)
            for name in ("bench", "bench_cpu"):
                images[name] += batch
        seconds["bench"] += time.perf_counter() - begun
        seconds["bench_cpu"] += time.process_time() - worked
        made, took, worked = asyncio.run(ask_again_and_again(url, clients, turn))
        for name, value in (("served", took), ("served_cpu", worked)):
            images[name] += made
            seconds[name] += value
    return {who: images[who] / seconds[who] for who in images}


async def ask_again_and_again(url: str, clients: int, seconds: float) -> tuple[float, float, float]:
    """Clients who ask again as soon as they are answered: images, seconds and CPU seconds.

    From the end of the first batch to that of the last: images come a batch at a time.
    """
    ends: list[tuple[float, float, float]] = []  # of batches: images made, time, CPU

    async def client(number: int, http: httpx2.AsyncClient) -> None:
        while True:
            (await http.post(GENERATIONS, json=ORDINARY[number % 4])).raise_for_status()

    async def watch(http: httpx2.AsyncClient) -> None:
        start = None
        while True:
            text = (await http.get("/metrics")).text
            made = figure(text, MADE)
            if start is not None and made != start:
                ends.append((made, time.perf_counter(), figure(text, CPU)))
            start = made
            await asyncio.sleep(WATCH_SECONDS)

    async with connection(url) as http:
        asking = [client(number, http) for number in range(clients)]
        await for_seconds(seconds, [watch(http), *asking])
    if len(ends) < 2:
        raise click.ClickException(f"two batches take longer than {seconds:g} s: give more --turn")
    (made, took, worked), last = ends[0], ends[-1]
    return last[0] - made, last[1] - took, last[2] - worked


async def for_seconds(seconds: float, clients: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Lets clients ask for so long; then they leave, whatever they wait for.

    Raises:
        Exception: what ended one of them before.
    """
    tasks = [asyncio.create_task(client) for client in clients]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def connection(url: str) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(base_url=url, timeout=600, limits=limits)


# ------------------------------------------------------------------------------- mixed requests


def mixed_requests(pipeline: Pipeline) -> list[Asked]:
    """Requests that differ in everything that they may."""
    manifest = pipeline.manifest
    side, classes = manifest.resolution, manifest.model.num_classes
    own = pipeline.choose_schedule(None)
    photo = pipeline.generate([classes - 1], seed=99)[0].pixels
    uploaded = {"image": png(photo)}
    asked = []
    for seed in range(6):
        label = (7 * seed) % classes
        name = str(label)
        for more in (
            {},
            {"cfg": 1.0},
            {"cfg": 5.0, "guidance": "constant"},
            {"temperature": 0.7, "top_k": 50},
            {"top_p": 0.9},
        ):
            asked.append(generation({"prompt": name, "seed": seed} | more, label))
        asked.append(generation({"prompt": "none", "seed": seed, "n": 3}, None))
        streamed = {"prompt": name, "seed": seed, "stream": True, "partial_images": 2}
        asked.append(generation(streamed, label))
        box = (0, 0, side // 2, side // 2 + seed)
        form = {"prompt": name, "seed": str(seed), "box": ",".join(map(str, box))}

        def edit(
            pipeline: Pipeline,
            label: int = label,
            seed: int = seed,
            box: tuple[int, int, int, int] = box,
        ) -> list[GeneratedImage]:
            return pipeline.edit(photo, box=box, classes=[label], seed=seed)

        asked.append(Asked(EDITS, {"data": form, "files": uploaded}, edit))
    kind = own.kind if own.kind != "foreign" else "locality"
    fewer = Schedule.make(own.grid, max(own.steps // 2, 1), kind)
    body = {"prompt": "0", "seed": 1, "steps": fewer.steps}
    return [*asked, generation(body, 0, fewer)]


def generation(body: dict[str, Any], label: int | None, schedule: Schedule | None = None) -> Asked:
    """Of a JSON body: its settings are those of the pipeline."""
    names = ("seed", "cfg", "guidance", "temperature", "top_k", "top_p")
    settings = {name: body[name] for name in names if name in body}

    def alone(pipeline: Pipeline) -> list[GeneratedImage]:
        return pipeline.generate([label] * body.get("n", 1), schedule=schedule, **settings)

    return Asked(GENERATIONS, {"json": body}, alone)


def png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


async def ask(http: httpx2.AsyncClient, asked: Asked) -> Answered:
    """Asks once; of a stream only the finished images count."""
    begun = time.perf_counter()
    answer = await http.post(asked.path, **asked.body)
    seconds = time.perf_counter() - begun
    if answer.status_code != 200:
        return Answered(answer.status_code, seconds, [])
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(e.split("data: ")[1]) for e in answer.text.split("\n\n") if e]
        data = [event for event in events if event["type"].endswith(".completed")]
    else:
        data = answer.json()["data"]
    contents = [base64.b64decode(image["b64_json"]) for image in data]
    images = [np.asarray(Image.open(io.BytesIO(content))) for content in contents]
    return Answered(200, seconds, images)


async def measure_mixed(
    url: str, pipeline: Pipeline, clients: int, seconds: float
) -> dict[str, Any]:
    """Many clients with requests of all kinds; every image compared, the memory watched."""
    requests = mixed_requests(pipeline)
    expected = [[image.pixels for image in each.alone(pipeline)] for each in requests]
    answers: list[tuple[int, Answered]] = []
    memory: list[float] = []
    turn = itertools.count()

    async def client(http: httpx2.AsyncClient) -> None:
        while True:
            number = next(turn) % len(requests)
            answer = await ask(http, requests[number])
            answers.append((number, answer))
            if answer.status == 429:
                await asyncio.sleep(1)

    async def watch(http: httpx2.AsyncClient) -> None:
        while True:
            text = (await http.get("/metrics")).text
            name = "process_resident_memory_bytes "
            memory.extend(float(li.split()[1]) for li in text.splitlines() if li.startswith(name))
            await asyncio.sleep(max(seconds / 60, 0.1))

    async with connection(url) as http:
        await for_seconds(seconds, [watch(http), *(client(http) for _ in range(clients))])
    good = [(number, answer) for number, answer in answers if answer.status == 200]
    other = sum(
        not np.array_equal(made, wanted)
        for number, answer in good
        for made, wanted in zip(answer.images, expected[number], strict=True)
    )
    half = len(memory) // 2
    return {
        "requests": len(good),
        "kinds": len({number for number, _ in good}),
        "of_kinds": len(requests),
        "images": sum(len(answer.images) for _, answer in good),
        "other_images": other,
        "refused": sum(answer.status == 429 for _, answer in answers),
        "errors": sum(answer.status not in (200, 429) for _, answer in answers),
        "memory_mb": [round(value / 1e6, 1) for value in memory],
        "memory_growth": statistics.mean(memory[half:]) / statistics.mean(memory[half // 2 : half])
        - 1
        if half > 1
        else None,
    }


async def measure_offered(url: str, rate: float, seconds: float) -> dict[str, float]:
    """Clients who come when they come, so many a second: what they wait."""
    chance = np.random.default_rng(0)
    waits: list[float] = []
    refused = 0

    async def client(number: int, http: httpx2.AsyncClient) -> None:
        nonlocal refused
        begun = time.perf_counter()
        answer = await http.post(GENERATIONS, json=ORDINARY[number % 4])
        if answer.status_code == 200:
            waits.append(time.perf_counter() - begun)
        else:
            refused += 1

    async with connection(url) as http, asyncio.TaskGroup() as clients:
        stop = time.perf_counter() + seconds
        for number in itertools.count():
            clients.create_task(client(number, http))
            await asyncio.sleep(chance.exponential(1 / rate))
            if time.perf_counter() > stop:
                break
    p50, p99 = np.percentile(waits, [50, 99])
    return {"rate": rate, "requests": len(waits), "refused": refused, "p50": p50, "p99": p99}


# -------------------------------------------------------------------------------------- telling


def report(found: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    lone, many, mixed = found["lone"], found["many"], found["mixed"]
    bound = 1.15 * lone["bench"] + 0.01
    growth = mixed["memory_growth"]
    yield "| | server | bench | |"
    yield "|---|---|---|---|"
    yield f"| ready after | {found['ready_seconds']:.2f} s | | |"
    yield (
        f"| a lone request | {1e3 * lone['served']:.0f} ms | {1e3 * lone['bench']:.0f} ms | "
        f"{lone['served'] / bound:.2f} of 1.15 times bench's + 10 ms |"
    )
    yield (
        f"| CPU of it | {1e3 * lone['served_cpu']:.0f} ms | {1e3 * lone['bench_cpu']:.0f} ms | "
        f"{lone['served_cpu'] / lone['bench_cpu']:.3f} |"
    )
    yield (
        f"| {found['clients']} clients, batch {found['batch']} | {many['served']:.2f} images a "
        f"second | {many['bench']:.2f} | {many['served'] / many['bench']:.3f} |"
    )
    yield (
        f"| CPU of it | {many['served_cpu']:.2f} images a CPU second | {many['bench_cpu']:.2f} | "
        f"{many['served_cpu'] / many['bench_cpu']:.3f} |"
    )
    yield (
        f"| mixed requests | {mixed['requests']}, {mixed['kinds']} of {mixed['of_kinds']} kinds; "
        f"{mixed['images']} images, {mixed['other_images']} other than run's, "
        f"{mixed['refused']} refused, {mixed['errors']} errors | | |"
    )
    told = "too short to tell" if growth is None else f"{100 * growth:+.1f} % over the second half"
    yield f"| memory | {mixed['memory_mb'][-1]:.0f} MB | | {told} |"
    yield ""
    yield "| offered, images a second | answered | refused | p50 s | p99 s |"
    yield "|---|---|---|---|---|"
    for row in found["offered"]:
        yield (
            f"| {row['rate']:.2f} | {row['requests']} | {row['refused']} | {row['p50']:.2f} | "
            f"{row['p99']:.2f} |"
        )


def draw(found: dict[str, Any], path: Path) -> None:
    """Latency over the offered rate."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: Sequence[dict[str, float]] = found["offered"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in ("p99", "p50"):
        axes.plot([row["rate"] for row in rows], [row[name] for row in rows], "o-", label=name)
    axes.axvline(
        found["many"]["served"], color="grey", linestyle=":", label=f"{found['clients']} clients"
    )
    axes.set(xlabel="offered images a second", ylabel="seconds until the answer", yscale="log")
    axes.set_title(f"{found['bundle']}, batch {found['batch']}")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
