"""The HTTP API: OpenAI's endpoints for images, what operators look at, and the page.

Knows routes and the shapes of answers. What a request means is in `model`, how images share batches
in `batching`, who may ask how much in `gate`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import Body, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from PIL import Image
from starlette.exceptions import HTTPException

import lpd_export
from lpd_export.bundle.classes import display_name
from lpd_export.schedule.orders import step_of_cell
from lpd_export.serving.batching import Client, Partial
from lpd_export.serving.gate import Gate
from lpd_export.serving.metrics import Meters
from lpd_export.serving.model import Pixels, Plan, ServedModel
from lpd_export.serving.refusals import AsciiJSONResponse, RefusedError, refusal
from lpd_export.serving.schema import EditForm, GenerationRequest, sentence, shown

PAGE = Path(__file__).parent / "page"
SCHEMAS = {
    "/v1/images/generations": GenerationRequest.model_json_schema(),
    "/v1/images/edits": EditForm.model_json_schema(),
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": why}
    for status, why in (
        (400, "The request is wrong: `error.message` says how, `error.param` where."),
        (401, "No API key, or a wrong one."),
        (404, "No such model."),
        (413, "The body is too large."),
        (429, "The queue is full: `Retry-After` says when to try again."),
        (503, "The server is loading or stopping."),
    )
}


class Kind(NamedTuple):
    """An endpoint, as its events and counters are called."""

    event: str
    endpoint: str


GENERATION, EDIT = Kind("image_generation", "generations"), Kind("image_edit", "edits")


def make_app(models: Mapping[str, ServedModel], keys: frozenset[bytes], meters: Meters) -> Gate:
    """The application, behind its gate; the models' queues are started by who runs it."""
    app = FastAPIOffline(
        title="lpd-export",
        version=lpd_export.__version__,
        summary="Images of a class, and edits, in the form of OpenAI's images API.",
        static_url="/docs-files",
        redoc_url=None,
        default_response_class=AsciiJSONResponse,
    )
    add_refusals(app, meters)
    add_images(app, models, meters)
    add_overview(app, models, meters)
    return Gate(app, keys, lambda refused: count(meters, refused))


def count(meters: Meters, refused: RefusedError) -> None:
    meters.refusals.labels(str(refused.status), refused.code or "").inc()


def add_refusals(app: FastAPI, meters: Meters) -> None:
    """Answers every mistake and fault in OpenAI's form."""

    def answer(refused: RefusedError) -> Response:
        count(meters, refused)
        return refused.response()

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        message, param = sentence(error.errors()[0], SCHEMAS[request.scope["path"]])
        return answer(RefusedError(400, message, param))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, RefusedError):
            where = f"{request.method} {shown(request.url.path)}"
            error = RefusedError(error.status_code, f"{where}: {error.detail}")
        return answer(error)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return answer(refusal(error))


def add_overview(app: FastAPI, models: Mapping[str, ServedModel], meters: Meters) -> None:
    """The page, and what operators look at."""

    @app.get("/v1/models", tags=["models"])
    async def list_models() -> Response:
        """The bundles that are served."""
        found = [model.description() for model in models.values()]
        return AsciiJSONResponse({"object": "list", "data": found})

    @app.get("/v1/models/{name}", tags=["models"], responses={404: REFUSALS[404]})
    async def show_model(name: str) -> Response:
        """A bundle and the names of its classes."""
        model = pick(models, name)
        names = model.manifest.class_names
        return AsciiJSONResponse(model.description() | {"class_names": names})

    @app.get("/health", tags=["operation"])
    async def health() -> Response:
        """Whether the process answers."""
        return AsciiJSONResponse({"status": "alive"})

    @app.get("/ready", tags=["operation"], responses={503: REFUSALS[503]})
    async def ready() -> Response:
        """Whether every bundle is loaded and requests are taken."""
        loaded = {name: model.ready for name, model in models.items()}
        whole = all(loaded.values()) and not any(m.queue.stopping for m in models.values())
        return AsciiJSONResponse({"ready": whole, "models": loaded}, 200 if whole else 503)

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE), name="page")


def add_images(app: FastAPI, models: Mapping[str, ServedModel], meters: Meters) -> None:
    """OpenAI's endpoints."""

    @app.post("/v1/images/generations", tags=["images"], responses=REFUSALS)
    async def generations(
        asked: Annotated[GenerationRequest, Body()], request: Request
    ) -> Response:
        """Images of a class; with `stream`, events of unfinished and finished ones."""
        model = pick(models, asked.model)
        plan = await model.plan_generation(asked)
        return await respond(Answer(GENERATION, model, asked, plan, meters), request)

    @app.post("/v1/images/edits", tags=["images"], responses=REFUSALS)
    async def edits(asked: Annotated[EditForm, Form()], request: Request) -> Response:
        """Images that keep a part of one."""
        model = pick(models, asked.model)
        try:
            plan = await model.plan_edit(asked)
        except Exception as error:
            raise refusal(error) from error
        return await respond(Answer(EDIT, model, asked, plan, meters), request)


def pick(models: Mapping[str, ServedModel], name: str | None) -> ServedModel:
    """The model of a name, or the only one.

    Raises:
        RefusedError: if there is none, or several and no name.
    """
    known = ", ".join(models)
    if name is None:
        if len(models) > 1:
            raise RefusedError(400, f"model is missing: it is one of {known}", "model")
        return next(iter(models.values()))
    if name not in models:
        sentence = f"there is no model {shown(name)}: it is one of {known}"
        raise RefusedError(404, sentence, "model", "model_not_found")
    return models[name]


# ---------------------------------------------------------------------------------------- answers


class Answer:
    """The answer to one request for images, on its way."""

    def __init__(
        self,
        kind: Kind,
        model: ServedModel,
        asked: GenerationRequest | EditForm,
        plan: Plan,
        meters: Meters,
    ) -> None:
        self.model, self.client, self.started = model, Client(), time.monotonic()
        self._kind, self._asked, self._plan, self._meters = kind, asked, plan, meters
        self._stages = {
            stage: meters.stages.labels(model.name, stage) for stage in ("queue", "encode", "total")
        }
        self._created = int(time.time())

    @property
    def streamed(self) -> bool:
        return bool(self._asked.stream)

    def submit(self) -> None:
        """Puts the images into the queue.

        Raises:
            RefusedError: if they are not taken.
        """
        partials = (self._asked.partial_images or 0) if self.streamed else 0
        try:
            self._events = self.model.submit(self._plan, partials, self.client)
        except Exception as error:
            raise refusal(error) from error

    async def events(self) -> AsyncIterator[tuple[int, dict[str, Any] | None, dict[str, Any]]]:
        """Each image's number, what is known of it if it is unfinished, and its content."""
        missing, partials = len(self._plan.requests), [0] * len(self._plan.requests)
        while missing:
            number, event = await self._events.get()
            if isinstance(event, Exception):
                raise refusal(event)
            if isinstance(event, Partial):
                known = {"partial_image_index": partials[number], "step": event.step}
                partials[number] += 1
                yield number, known, await self._content(number, event.pixels)
                continue
            missing -= 1
            self._stages["queue"].observe(event.waited)
            yield number, None, await self._content(number, event.image.pixels)
            self._meters.images.labels(self.model.name, self._kind.endpoint).inc()
        self._stages["total"].observe(time.monotonic() - self.started)

    async def _content(self, number: int, pixels: Pixels) -> dict[str, Any]:
        begun = time.monotonic()
        encoded = await asyncio.to_thread(encode, pixels, self._plan.finish)
        self._stages["encode"].observe(time.monotonic() - begun)
        request, schedule = self._plan.requests[number], self._plan.schedule
        as_url = self._asked.response_format == "url"
        content: dict[str, Any] = {
            "url" if as_url else "b64_json": f"data:image/png;base64,{encoded}"
            if as_url
            else encoded,
            "index": request.index,
            "seed": request.seed,
            "class_id": request.label,
            "class_name": display_name(self.model.manifest.class_names, request.label),
        }
        if self._asked.details:
            steps = step_of_cell(request.order_of(schedule)[None], schedule.group_sizes)[0]
            if request.given is not None:
                steps[request.given >= 0] = -1
            content["step_of_cell"] = steps.tolist()
        return content

    def common(self) -> dict[str, Any]:
        """What OpenAI's answers and events say of all images."""
        side = self.model.manifest.resolution
        return {"size": f"{side}x{side}", "background": "opaque", "output_format": "png"}

    def usage(self, images: int) -> dict[str, Any]:
        """Tokens: a class each, and the cells that were drawn."""
        drawn = sum(
            len(self.model.schedule.orders[0]) if r.given is None else int((r.given < 0).sum())
            for r in self._plan.requests[:images]
        )
        return {
            "input_tokens": images,
            "input_tokens_details": {"text_tokens": images, "image_tokens": 0},
            "output_tokens": drawn,
            "total_tokens": images + drawn,
        }

    async def whole(self) -> Response:
        """All images in one answer."""
        data: list[dict[str, Any]] = [{} for _ in self._plan.requests]
        async for number, _, content in self.events():
            data[number] = content
        common = {"created": self._created, "data": data, "usage": self.usage(len(data))}
        return AsciiJSONResponse(self.common() | common)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events, each image's as they come."""
        try:
            async for _, known, content in self.events():
                about = {"created_at": self._created, "quality": "auto", **self.common()}
                if known is None:
                    event, about["usage"] = f"{self._kind.event}.completed", self.usage(1)
                else:
                    event, about = f"{self._kind.event}.partial_image", about | known
                yield server_sent(event, {"type": event} | about | content)
        except RefusedError as refused:
            count(self._meters, refused)
            yield server_sent("error", {"type": "error"} | refused.body())
        finally:
            self.leave()

    def leave(self) -> None:
        """Drops what is still to be made; after a whole answer there is nothing."""
        self.model.queue.leave(self.client)


def server_sent(event: str, content: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(content, allow_nan=False)}\n\n".encode("ascii")


def encode(pixels: Pixels, finish: Callable[[Pixels], Pixels]) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(finish(pixels)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


async def respond(answer: Answer, request: Request) -> Response:
    """Answers, or drops the request when its client leaves."""
    answer.submit()
    if answer.streamed:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(answer.stream(), media_type="text/event-stream", headers=headers)
    whole, gone = asyncio.create_task(answer.whole()), asyncio.create_task(leaving(request))
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            answer._meters.left.labels(answer.model.name).inc()
            return Response(status_code=499)  # nobody reads it
        return whole.result()
    finally:
        answer.leave()
        for task in (whole, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, RefusedError):
                await task


async def leaving(request: Request) -> None:
    """Until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
