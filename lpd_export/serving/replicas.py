"""Batches made by replicas on Ray Serve, on this machine or a cluster.

A replica is an actor with a pipeline of its own, on a GPU, or on its part of the cores. Ray starts
them, watches them and replaces those that die. The requests stay here until their images are: what
a replica that died had begun goes to another. Knows Ray; what waits, and for whom, is `batching`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.formats import BACKENDS
from lpd_export.machine.cluster import cores, import_ray, ray_session
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import GeneratedImage, ImageRequest
from lpd_export.schedule.schedule_file import Schedule
from lpd_export.serving.batching import (
    AbandonedError,
    Client,
    Job,
    Maker,
    Partial,
    Result,
    StoppingError,
)
from lpd_export.serving.making import PipelineMaker
from lpd_export.serving.request import ServeRequest

MOST_LOST = 3
"""Replicas that a batch may lose one after the other: it may be what ends them."""
HEALTH_SECONDS = 1.0
"""Between two looks of Ray at a replica."""
LOOK_SECONDS = 0.1
"""Between two looks at replicas that load."""
log = logging.getLogger("lpd_export.serving")


class LostError(Exception):
    """Replica after replica died at the same work."""


class FaultError(Exception):
    """What went wrong in a replica, with its traceback there."""


class Row(NamedTuple):
    """An image as a replica is told of it."""

    request: ImageRequest
    """With its order, so that the schedule's need not be sent."""
    partial_steps: list[int]


class Shown(NamedTuple):
    """A partial image of a row."""

    row: int
    partial: Partial


class Answer(NamedTuple):
    """The last that a replica says of its work."""

    result: object = None
    error: Exception | None = None


class Replica:
    """A bundle's pipeline in an actor; what its methods give ends with an `Answer`."""

    def __init__(self, bundle: Path, batch: int, device: str | None, threads: int | None) -> None:
        def load() -> PipelineMaker:
            return PipelineMaker(Pipeline.open(bundle, device=device, threads=threads), batch)

        self._thread = ThreadPoolExecutor(1)  # the pipeline's
        self._maker = self._thread.submit(load).result()

    async def make(self, rows: list[Row], schedule: Schedule) -> AsyncIterator[object]:
        """The images of a batch; it is abandoned after the step when the call is cancelled."""
        client = Client()

        def work(tell: Callable[[object], None]) -> list[GeneratedImage]:
            jobs = [
                Job(row.request, schedule, client, partial(show, tell, number), row.partial_steps)
                for number, row in enumerate(rows)
            ]
            return self._maker.make(jobs)

        try:
            async for event in self._done(work):
                yield event
        finally:
            client.left = True

    async def call(self, task: Callable[[Pipeline], object]) -> AsyncIterator[object]:
        """What a task comes to."""
        async for event in self._done(lambda tell: self._maker.call(task)):
            yield event

    async def _done(
        self, work: Callable[[Callable[[object], None]], object]
    ) -> AsyncIterator[object]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[object] = asyncio.Queue()

        def tell(event: object) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            try:
                tell(Answer(work(tell)))
            except UserError as error:
                tell(Answer(error=error))
            except Exception as error:
                # As text: not every exception can be sent.
                tell(Answer(error=FaultError("".join(traceback.format_exception(error)))))

        self._thread.submit(run)
        while not isinstance(event := await events.get(), Answer):
            yield event
        yield event


def show(tell: Callable[[object], None], row: int, event: object) -> None:
    assert isinstance(event, Partial)
    tell(Shown(row, event))


class ReplicaMaker:
    """A `Maker` whose batches are made by replicas; of as many threads as there are replicas.

    Args:
        ray: the module.
        handle: of the deployment.
    """

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle
        self._running: dict[Any, Sequence[Job]] = {}

    def make(self, jobs: Sequence[Job]) -> list[GeneratedImage]:
        """As `Maker` says; if the replica dies, another makes them."""
        schedule = jobs[0].schedule
        one = replace(schedule, orders=schedule.orders[:1])

        def arguments() -> tuple[list[Row], Schedule]:
            return [
                Row(
                    replace(job.request, order=job.request.order_of(job.schedule)),
                    [step for step in job.partial_steps if step > job.shown],
                )
                for job in jobs
            ], one

        found: list[GeneratedImage] = self._ask("make", arguments, jobs)
        return found

    def call(self, task: Callable[[Pipeline], Result]) -> Result:
        """As `Maker` says; if the replica dies, another does it."""
        done: Result = self._ask("call", lambda: (task,), ())
        return done

    def left(self) -> None:
        """Cancels what nobody waits for."""
        for response, jobs in list(self._running.items()):
            if abandoned(jobs):
                response.cancel()

    def close(self) -> None:
        """Forgets the replicas."""
        self._handle.shutdown()

    def _ask(
        self, method: str, arguments: Callable[[], tuple[Any, ...]], jobs: Sequence[Job]
    ) -> Any:
        """The result that a replica answers; partial images are delivered.

        Raises:
            UserError, FaultError: what it answers instead.
            AbandonedError: if nobody waits for the jobs any more.
            LostError: if replicas died, one after the other.
        """
        for _ in range(MOST_LOST):
            response = self._handle.options(method_name=method, stream=True).remote(*arguments())
            self._running[response] = jobs
            if abandoned(jobs):
                response.cancel()
            try:
                for event in response:
                    if isinstance(event, Answer):
                        break
                    job = jobs[event.row]
                    job.shown = event.partial.step
                    job.deliver(event.partial)
            except (self._ray.exceptions.RayError, CancelledError) as error:
                if abandoned(jobs):
                    raise AbandonedError from None
                if isinstance(error, self._ray.exceptions.RayTaskError):
                    raise
                why = (str(error) or type(error).__name__).splitlines()[0]
                log.warning("a replica was lost, and another does its work: %s", why)
            else:
                if event.error is not None:
                    raise event.error
                return event.result
            finally:
                del self._running[response]
        raise LostError(f"{MOST_LOST} replicas, one after the other, died at the same work")


def abandoned(jobs: Sequence[Job]) -> bool:
    """Whether there are jobs, and nobody waits for any."""
    return bool(jobs) and all(job.client.left for job in jobs)


# ------------------------------------------------------------------------------------- deploying


@contextlib.contextmanager
def cluster(request: ServeRequest, bundles: Sequence[Bundle]) -> Iterator[Cluster]:
    """Ray with its Serve, for the block; then what was deployed is not there any more.

    Raises:
        UserError: if Ray is not installed, cannot be reached or has too little.
    """
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    if (address := os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS={address} is Ray's client, which cannot stream: start the server on a "
            "machine of the cluster, with RAY_ADDRESS=auto"
        )
    ray = import_ray(
        "serve", "--replicas and --ray need Ray Serve: pip install 'lpd-export[serve-ray]'"
    )
    cpus = max(cores(), (request.replicas or 1) * (request.threads or 1))
    with ray_session(ray, cpus):
        found = Cluster(ray, request, bundles)
        ray.serve.start(proxy_location="Disabled")  # HTTP is ours
        try:
            yield found
        finally:
            found.close()


class Cluster:
    """Where replicas run, and how many of each bundle.

    Args:
        ray: the module, connected.
        request: what was asked.
        bundles: all that share a GPU, or the cores.

    Raises:
        UserError: if Ray has too little for so many replicas.
    """

    def __init__(self, ray: Any, request: ServeRequest, bundles: Sequence[Bundle]) -> None:
        self._ray, self._request, self._sharing = ray, request, len(bundles)
        self._stopped = Event()
        self._applications: list[str] = []
        self._has = ray.cluster_resources()
        for bundle in bundles:
            self._check_resources(bundle)

    def places(self, bundle: Bundle) -> int:
        """How many replicas there are of a bundle: as asked, or one a GPU, or one a machine."""
        if self._request.replicas is not None:
            return self._request.replicas
        if self._on_gpus(bundle):
            return max(1, int(self._has.get("GPU", 0)))
        return len([node for node in self._ray.nodes() if node["Alive"]])

    def open(self, bundle: Bundle, batch: int) -> Maker:
        """Deploys replicas of a bundle, and waits until all are loaded.

        Raises:
            UserError: if they cannot be.
            StoppingError: after `stop`.
        """
        serve, places, threads = self._ray.serve, self.places(bundle), self._threads(bundle)
        application = serve.deployment(Replica, name="replica").options(
            num_replicas=places,
            max_ongoing_requests=1,
            ray_actor_options={
                "num_cpus": (threads or 1) / self._sharing,
                "num_gpus": 1 / self._sharing if threads is None else 0,
            },
            max_constructor_retry_count=1,
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_wait_loop_s=LOOK_SECONDS,
            logging_config={"enable_access_log": False},
        )
        # Several servers may share a cluster.
        name = f"{re.sub('[^A-Za-z0-9_-]', '-', bundle.path.name)}-{uuid.uuid4().hex[:8]}"
        self._applications.append(name)
        arguments = bundle.path.resolve(), batch, self._request.device, threads
        (handle,) = serve.run_many(
            [serve.RunTarget(application.bind(*arguments), name=name, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        while (found := serve.status().applications[name]).status != "RUNNING":
            if found.status == "DEPLOY_FAILED":
                raise UserError(reason(found))
            if self._stopped.wait(LOOK_SECONDS):
                raise StoppingError
        return ReplicaMaker(self._ray, handle)

    def stop(self) -> None:
        """Lets `open` wait no longer."""
        self._stopped.set()

    def close(self) -> None:
        """Ends all replicas."""
        for name in self._applications:
            self._ray.serve.delete(name)

    def _on_gpus(self, bundle: Bundle) -> bool:
        return BACKENDS[bundle.manifest.backend].compiles or self._request.device == "cuda"

    def _threads(self, bundle: Bundle) -> int | None:
        """Of each replica; None on a GPU."""
        if self._on_gpus(bundle):
            return None
        most = max(node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"])
        share = min(self._has.get("CPU", 0) // self.places(bundle), most)
        return self._request.threads or max(1, int(share))

    def _check_resources(self, bundle: Bundle) -> None:
        """Raises UserError if Ray would wait for ever for what it has not."""
        places, threads = self.places(bundle), self._threads(bundle)
        what, wanted = ("GPU", places) if threads is None else ("CPU", places * threads)
        has = self._has.get(what, 0)
        if has < wanted:
            raise UserError(
                f"{places} replicas of {bundle.path} need {wanted} {what}s, but Ray has {has:g}: "
                "give fewer --replicas"
            )


def reason(application: Any) -> str:
    """Why replicas cannot be started, from the tracebacks that Ray gives."""
    said = [application.message, *(each.message for each in application.deployments.values())]
    lines = [line for line in "\n".join(said).splitlines() if line.strip()]
    errors = [
        found[1] for line in lines if (found := re.search(r"lpd_export\.errors\.\w+: (.+)", line))
    ]
    return (errors or [f"no replica can be started: {lines[-1].strip()}"])[0]
