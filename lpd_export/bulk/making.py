"""The images of a plan, made in this process by a pipeline, in the order of their positions.

Does not know where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lpd_export.bulk.folder import Made
from lpd_export.bulk.plan import Plan, Positions, Requests
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import NumericalError
from lpd_export.runtime.pipeline import Pipeline, Progress
from lpd_export.runtime.requests import ImageRequest


def make_images(
    pipeline: Pipeline,
    plan: Plan,
    positions: Positions,
    batch: int,
    keep_going: bool,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Made]:
    """An image for each position, or if `keep_going` why there is none.

    Raises:
        UserError: before the first image, if something is out of range, or the pipeline is not of
            the plan's bundle, which another build replaced.
        NumericalError: naming the image whose logits are not finite.
    """
    Bundle(plan.bundle, pipeline.manifest).check_is(plan.manifest)
    plan.edits.pipeline = pipeline
    order, failures = iter(positions.tolist()), []

    def failed(request: ImageRequest, error: NumericalError) -> None:
        position = next(order)
        told = (
            f"image {position} ({plan.class_name(position)}, seed {request.seed}, index "
            f"{request.index}): {error}"
        )
        if not keep_going:
            raise NumericalError(told) from error
        assert error.step is not None
        failure = {"step": error.step, "phase": error.step - 1, "error": told}
        failures.append(Made(position, None, [], failure))

    images = pipeline.stream(
        Requests(plan, positions),
        batch=batch,
        schedule=plan.schedule,
        progress=progress,
        of_run=(plan.images, plan.guided),
        failed=failed,
    )

    def made() -> Iterator[Made]:
        for image in images:
            yield from failures
            failures.clear()
            position = next(order)
            pixels = plan.finish(position, image.pixels)
            yield Made(position, pixels, image.token_ids.tolist())
        yield from failures

    return made()
