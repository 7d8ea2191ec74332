"""The command line: reads what the user typed, shows progress, and says how it went.

Does the talking and nothing else; each command hands its work to one function below. Results go
to standard output, everything else to standard error. A user's mistake is one line and exit
code 2; an interruption is exit code 130.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from lpd_export.build.recipes import named_recipe
from lpd_export.build.request import CHOICES, BuildRequest
from lpd_export.errors import Interrupted, UserError
from lpd_export.strict_json import strict_json

EXIT_FAILED = 1
"""A verification that did not pass."""
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
DEAF_SECONDS = 1
"""After a Ctrl-C, so that the next does not stop the cleaning up before it begins."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `lpd-export`; ends the process."""
    # A polite kill or a closed terminal is answered like Ctrl-C: nothing half-written is left.
    interrupt = interrupter()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # What nohup or a script's `&` have us ignore stays ignored.
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, interrupt)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = say_warning
            commands.main(arguments, prog_name="lpd-export", standalone_mode=False)
    except UserError as error:
        fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_MISTAKE)
    except click.ClickException as error:
        fail(error.format_message().rstrip("."), hint=help_hint(error))
    except Interrupted as stopped:
        click.echo(f"lpd-export: {stopped}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.Abort:
        click.echo("lpd-export: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if error.filename is None:
            # Standard output is full or closed: what it still holds cannot go there either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = f"use {error.filename}" if error.filename else "write the result"
        fail(f"cannot {what}: {error.strerror or error}")


def say_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line for the user, without the place in the code that it comes from."""
    click.echo(f"lpd-export: {message}", err=True)


def interrupter() -> Callable[[int, object], None]:
    """A signal handler like Python's for Ctrl-C, deaf to those that an impatient user adds."""
    last = -math.inf

    def interrupt(number: int, frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > DEAF_SECONDS:
            last = now
            raise KeyboardInterrupt

    return interrupt


def fail(message: str, hint: str = "") -> None:
    """Says in one line what was wrong, and exits."""
    one_line = " ".join(message.split())
    click.echo(f"lpd-export: error: {one_line}{hint}", err=True)
    sys.exit(EXIT_MISTAKE)


def help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see `{context.command_path} --help`)" if context else ""


class CommandGroup(click.Group):
    """Lists commands in the order they are written in, which is the order of use."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lpd-export")
def commands() -> None:
    """Exports LPD image generators to ONNX, and generates images with them.

    \b
    Example:
      lpd-export build engines/demo.toml
      lpd-export run engines/demo --class heart --out hearts
    """


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
    )(function)


def print_json(result: Any) -> None:
    """Strict JSON: what is not a number is null."""
    click.echo(strict_json(result))


# ------------------------------------------------------------------------------------ build


@commands.command()
@click.argument("recipe", required=False)
@click.option("--res", type=int, help="Resolution in pixels; 256 alone means the published lpd-l.")
@click.option("--model", help="Published model: lpd-l, lpd-xl or lpd-xxl.")
@click.option("--steps", type=int, help="Steps an image; by default the published number.")
@click.option("--checkpoint", metavar="FILE|hf:ORG/NAME", help="LPD weights.")
@click.option("--tokenizer", metavar="FILE|hf:ORG/NAME/FILE", help="VQ tokenizer weights.")
@click.option("--heads", type=int, help="Attention heads, if not the model's width / 64.")
@click.option(
    "--classes",
    metavar="FILE.json",
    help="Class names: a JSON list. By default classes.json beside the checkpoint, or ImageNet's.",
)
@click.option(
    "--schedule",
    metavar="FILE",
    help="Schedule: an .npz of `schedule make`, or a JSON list of orders with --steps.",
)
@click.option("--orders", type=int, help="Orders to make for the schedule.  [default: 64]")
@click.option("--repulsion", type=int, help="Repulsion threshold of these orders.")
@click.option("--cfg", type=float, help="Guidance scale to recommend in the bundle.")
@click.option(
    "--guidance",
    type=click.Choice(CHOICES["guidance"]),
    help="How guidance grows over the tokens.  [default: linear]",
)
@click.option(
    "--precision",
    type=click.Choice(CHOICES["precision"]),
    help="Of weights and activations.  [default: fp32]",
)
@click.option(
    "--keep-layers",
    metavar="FILE.json",
    help="INT8: leave these layers in higher precision, as found by `verify --bisect`.",
)
@click.option(
    "--backend",
    type=click.Choice(CHOICES["backend"]),
    help="What runs the bundle.  [default: onnxruntime]",
)
@click.option(
    "--max-batch",
    type=int,
    help="Largest batch.  [default: any for onnxruntime, 8 for engines]",
)
@click.option("--workspace", type=int, metavar="MIB", help="Engines: scratch memory of a kernel.")
@click.option("--optimization-level", type=int, metavar="0-5", help="Engines: how long to search.")
@click.option("--timing-cache", metavar="FILE", help="TensorRT: kernel timings to use and add to.")
@click.option(
    "--version-compatible", is_flag=True, default=None, help="TensorRT: for later versions too."
)
@click.option(
    "--hardware-compatible", is_flag=True, default=None, help="TensorRT: for Ampere and later."
)
@click.option(
    "--compute-capability",
    multiple=True,
    metavar="8.9",
    help="TensorRT-RTX: a GPU to compile for; may be repeated.",
)
@click.option(
    "--weight-stripped",
    is_flag=True,
    default=None,
    help="Engines without weights, filled from the ONNX files when they are loaded.",
)
@click.option(
    "--random-weights", is_flag=True, default=None, help="A full-size model without a checkpoint."
)
@click.option("--seed", type=int, help="Of the orders and of random weights.  [default: 0]")
@click.option(
    "--out",
    metavar="DIR",
    help="The bundle.  [default: engines/MODEL-RES-PRECISION, or the recipe's name beside it]",
)
@click.option("--force", is_flag=True, default=None, help="Replace the bundle if there is one.")
@json_option
def build(recipe: str | None, as_json: bool, **options: Any) -> None:
    """Makes a bundle from a checkpoint, from a RECIPE's settings, or from both.

    RECIPE is a TOML file, or the name of one that comes with lpd-export, such as lpd-xl-512 or
    lpd-l-256-int8.

    Options override the recipe's settings. The architecture and the resolution are read off the
    weights; a --res of another grid resizes the model's positions.

    \b
    Examples:
      lpd-export build --res 256
      lpd-export build --checkpoint lpd_l_256.pth --tokenizer vq_ds16_c2i.pt
      lpd-export build --model lpd-l --res 512 --random-weights --out engines/test
      lpd-export build --res 256 --precision fp16 --backend tensorrt-rtx
      lpd-export build lpd-xl-512
      lpd-export build engines/demo.toml --force
    """
    settings = named_recipe(recipe) if recipe else {}
    settings |= {name: value for name, value in options.items() if value not in (None, ())}
    request = BuildRequest(**settings)
    with stages() as (report, advance):
        report("loading torch and onnx")
        from lpd_export.build.build import build as build_bundle

        out = build_bundle(request, report, advance)
    if as_json:
        from lpd_export.bundle.manifest import Bundle

        print_json({"bundle": str(out), "manifest": dataclasses.asdict(Bundle.open(out).manifest)})
    else:
        click.echo(f"{out}: {folder_size(out) / 1e6:.0f} MB")


@contextlib.contextmanager
def stages() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """Shows the current stage with a clock on a terminal, a line for each elsewhere.

    Gives two functions: one to begin a stage, and one to tell how far TensorRT's builder is.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(stderr_of_its_own())
        console = Console(stderr=True)
        if not console.is_terminal:
            yield lambda stage: click.echo(stage, err=True), lambda stage, step, steps: None
            return
        progress = stack.enter_context(Progress(*columns, console=console))

        def finish() -> None:
            for task in progress.tasks:
                progress.update(task.id, total=1, completed=1, detail="")

        def report(stage: str) -> None:
            finish()
            progress.add_task(stage, total=None, detail="")

        def advance(stage: str, step: int, steps: int) -> None:
            progress.update(progress.tasks[-1].id, detail=f": {stage} {step} of {steps}")

        yield report, advance
        finish()


@contextlib.contextmanager
def stderr_of_its_own() -> Iterator[None]:
    """Leads sys.stderr past file descriptor 2, which is the log's while TensorRT compiles."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(AttributeError, OSError):  # closed, or not a file
            encoding, errors = sys.stderr.encoding, sys.stderr.errors
            another = os.fdopen(os.dup(sys.stderr.fileno()), "w", 1, encoding, errors)
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(another)))
        yield


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -------------------------------------------------------------------------------------- run


@commands.command()
@click.argument("bundle", type=click.Path())
@click.argument("more_classes", nargs=-1, metavar="")
@click.option(
    "--class",
    "classes",
    multiple=True,
    metavar="NAME|ID ...",
    help="What to draw: names or numbers; `all` is every class, `none` no class.",
)
@click.option("-n", "count", type=int, default=1, show_default=True, help="Images a class.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same images.")
@click.option("--cfg", type=float, help="Guidance scale.  [default: the bundle's]")
@click.option(
    "--guidance",
    type=click.Choice(CHOICES["guidance"]),
    help="How guidance grows over the tokens.  [default: the bundle's]",
)
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, help="Draw among the K most probable tokens.")
@click.option("--top-p", type=float, help="Draw among the fewest tokens of probability P together.")
@click.option("--batch", type=int, help="Images generated together.  [default: up to 4]")
@click.option("--schedule", metavar="FILE", help="Instead of the bundle's own.")
@click.option("--steps", type=int, help="With a --schedule that is a JSON list of orders.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where ONNX Runtime runs the graphs; engines run on a GPU.  [default: cpu]",
)
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option("--save-tokens", metavar="FILE.npy", help="Also save the token ids [images, cells].")
@click.option(
    "--trace", is_flag=True, help="Also save each image after each of its steps, in DIR/trace."
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in the same folder.")
@click.option("--out", metavar="DIR", required=True, help="New folder for the images.")
@json_option
def run(
    bundle: str,
    classes: tuple[str, ...],
    more_classes: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Generates images: a PNG each, a contact sheet, and images.jsonl.

    With --trace one sees how the steps fill an image in: it is decoded after each of them, cells
    that are not there yet left blank.

    \b
    Examples:
      lpd-export run engines/demo --class heart clock -n 4 --out images
      lpd-export run engines/lpd-l-256-fp32 --class 207 "red panda" --seed 1 --out images
      lpd-export run engines/demo --class heart --trace --out steps
    """
    from lpd_export.run import TRACES, RunRequest, generate_images

    request = RunRequest(
        bundle=Path(bundle),
        classes=[*classes, *more_classes],
        **(options | {"out": Path(options["out"])}),
    )
    with image_progress() as (report, advance):
        result = generate_images(request, report, advance)
    if as_json:
        print_json(result.as_json())
    else:
        steps = f"; steps in {request.out / TRACES}" if request.trace else ""
        click.echo(
            f"{result.made} image{'s' * (result.made != 1)} in {result.seconds:.1f} s, written to "
            f"{request.out}; contact sheet {result.contact_sheet}{steps}"
        )


@contextlib.contextmanager
def image_progress() -> Iterator[tuple[Callable[[str], None], Callable[..., None]]]:
    """Shows which image and which step is being made, on a terminal; stages alone elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lpd_export.run import Advance

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: click.echo(stage, err=True), tell_each_tenth()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def report(stage: str) -> None:
            progress.update(task, description=stage)

        def show(advance: Advance) -> None:
            progress.update(
                task,
                description=advance.describe(),
                total=advance.all_images,
                completed=advance.images_done,
            )

        yield report, show


def tell_each_tenth() -> Callable[[Any], None]:
    """Progress for a log: a line whenever another tenth of the images is done."""
    told = 0

    def advance(advance: Any) -> None:
        nonlocal told
        tenths = int(10 * advance.images_done / advance.all_images)
        if tenths > told:
            told = tenths
            click.echo(advance.describe(), err=True)

    return advance


# ----------------------------------------------------------------------------------- verify


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    default="reference",
    show_default=True,
    metavar="reference|OTHER_BUNDLE",
    help="What the bundle is compared with.",
)
@click.option(
    "--checkpoint",
    metavar="FILE|hf:ORG/NAME",
    help="The reference's LPD weights.  [default: those that the bundle was made from]",
)
@click.option(
    "--tokenizer", metavar="FILE|hf:ORG/NAME/FILE", help="The reference's tokenizer, likewise."
)
@click.option("--images", type=int, default=8, show_default=True, help="Images to compare.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of these images.")
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="METRIC=LIMIT",
    help="Another limit than the precision's; may be repeated.",
)
@click.option(
    "--by-layer", is_flag=True, help="Also compare the output of every layer, on the CPU."
)
@click.option("--bisect", is_flag=True, help="INT8: find the fewest layers that must be spared.")
@click.option(
    "--save-phases",
    metavar="PHASE,...|all|none",
    help="Phases to leave for Polygraphy.  [default: a few, and the first that fails]",
)
@click.option(
    "--onnx", is_flag=True, help="Run the ONNX graphs on the CPU, not the engines made of them."
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where ONNX Runtime runs the graphs; engines run on a GPU.  [default: cpu]",
)
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of the report.  [default: BUNDLE-verification]",
)
@json_option
def verify(bundle: Path, thresholds: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compares a bundle with the PyTorch reference, phase by phase and end to end.

    Every phase is run on the same inputs through Polygraphy; whole images are drawn from the same
    random numbers. The exit code is 1 if a threshold of the bundle's precision does not hold.

    \b
    Examples:
      lpd-export verify engines/demo
      lpd-export verify engines/demo-int8 --images 64 --by-layer
      lpd-export verify engines/demo-fp16 --against engines/demo
      lpd-export verify engines/demo-int8 --threshold sequence_kl=0.005 --bisect
    """
    with stages() as (report, _):
        report("loading torch and Polygraphy")
        from lpd_export.accuracy.sides import SidesRequest
        from lpd_export.accuracy.verify import VerifyRequest
        from lpd_export.accuracy.verify import verify as verify_bundle

        names = ("against", "checkpoint", "tokenizer", "device", "threads", "onnx")
        request = VerifyRequest(
            SidesRequest(bundle, **{name: options[name] for name in names}),
            images=options["images"],
            seed=options["seed"],
            thresholds=thresholds,
            by_layer=options["by_layer"],
            bisect=options["bisect"],
            save_phases=options["save_phases"],
            out=options["out"],
        )
        verification = verify_bundle(request, report)
    if as_json:
        print_json(verification.as_json())
    else:
        from rich.console import Console

        from lpd_export.accuracy.report import print_table

        print_table(verification, Console())
        click.echo(f"report: {request.folder / 'report.html'}")
    if not verification.passed:
        sys.exit(EXIT_FAILED)


# --------------------------------------------------------------------------------- schedule


@commands.group(cls=CommandGroup)
def schedule() -> None:
    """Makes, checks and draws generation schedules.

    \b
    Example:
      lpd-export schedule make --res 256 --steps 20 --out orders.npz
    """


@schedule.command()
@click.option("--res", type=int, required=True, help="Resolution in pixels.")
@click.option("--steps", type=int, required=True, help="Steps an image.")
@click.option(
    "--kind",
    type=click.Choice(["locality", "random", "raster"]),
    default="locality",
    show_default=True,
)
@click.option(
    "--repulsion",
    type=int,
    default=2,
    show_default=True,
    help="Cells of a step are further apart than this (Chebyshev distance).",
)
@click.option(
    "--proximity",
    type=float,
    default=1.0,
    show_default=True,
    help="How close to generated cells counts as close.",
)
@click.option("--count", type=int, default=64, show_default=True, help="How many orders.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stride", type=int, default=16, show_default=True, help="Pixels of a cell's side.")
@click.option("--out", metavar="FILE.npz", required=True)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
@json_option
def make(res: int, stride: int, out: str, force: bool, as_json: bool, **settings: Any) -> None:
    """Makes a schedule: group sizes, and many orders to choose from.

    \b
    Example:
      lpd-export schedule make --res 256 --steps 20 --out orders.npz
    """
    from lpd_export.schedule.schedule import Schedule

    if stride < 1 or res < stride or res % stride:
        raise UserError(f"--res {res} is not a multiple of the tokenizer's stride of {stride}")
    refuse_existing(Path(out), force)
    made = Schedule.make(res // stride, **settings)
    made.save(out)
    describe_schedule(out, made, as_json)


@schedule.command()
@click.argument("file")
@click.option("--steps", type=int, help="For a JSON list of orders, which does not say.")
@json_option
def check(file: str, steps: int | None, as_json: bool) -> None:
    """Checks a schedule and describes it.

    \b
    Example:
      lpd-export schedule check orders.npz
      lpd-export schedule check res256_steps20_repulsion2.json --steps 20
    """
    from lpd_export.schedule.schedule import Schedule

    describe_schedule(file, Schedule.load(file, steps=steps), as_json)


@schedule.command()
@click.argument("file")
@click.option("--steps", type=int, help="For a JSON list of orders, which does not say.")
@click.option("--order", type=int, default=0, show_default=True, help="Which of the orders.")
@click.option("--out", metavar="FILE.png", required=True)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
@json_option
def show(file: str, steps: int | None, order: int, out: str, force: bool, as_json: bool) -> None:
    """Draws a schedule: a grid coloured by step, and how the image fills.

    \b
    Example:
      lpd-export schedule show orders.npz --out orders.png
    """
    import numpy as np

    from lpd_export.images import draw_schedule, save_png
    from lpd_export.schedule.schedule import Schedule

    refuse_existing(Path(out), force)
    loaded = Schedule.load(file, steps=steps)
    save_png(np.asarray(draw_schedule(loaded, order)), out)
    if as_json:
        print_json({"file": file, "order": order, "out": out})
    else:
        click.echo(out)


def refuse_existing(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise UserError(f"{out} exists: choose another --out, or replace it with --force")


def describe_schedule(file: str, schedule: Any, as_json: bool) -> None:
    from lpd_export.schedule.schedule import locality_statistics

    statistics = locality_statistics(schedule.orders, schedule.group_sizes)
    if as_json:
        print_json(
            {
                "file": file,
                "kind": schedule.kind,
                "grid": schedule.grid,
                "steps": schedule.steps,
                "orders": schedule.count,
                "repulsion": schedule.repulsion,
                "proximity": schedule.proximity,
                "seed": schedule.seed,
                "group_sizes": schedule.group_sizes.tolist(),
                **dataclasses.asdict(statistics),
            }
        )
        return
    click.echo(
        f"{file}: {schedule.count} {schedule.kind} orders of a {schedule.grid}x{schedule.grid} "
        f"grid in {schedule.steps} steps"
    )
    click.echo("group sizes: " + " ".join(map(str, schedule.group_sizes)))
    if math.isfinite(statistics.isolated_share):
        click.echo(f"cells with no generated neighbour: {100 * statistics.isolated_share:.1f} %")
    if math.isfinite(statistics.group_distance):
        click.echo(
            "mean distance to the nearest cell of the same step: "
            f"{statistics.group_distance:.2f} cells"
        )


# ---------------------------------------------------------------------------------- inspect


@commands.command()
@click.argument("bundle", type=click.Path())
@click.option("--classes", is_flag=True, help="List the classes instead.")
@click.option(
    "--batch", type=int, default=1, show_default=True, help="Say how much memory this batch needs."
)
@json_option
def inspect(bundle: str, classes: bool, batch: int, as_json: bool) -> None:
    """Says what a bundle holds, and verifies every file of it.

    \b
    Example:
      lpd-export inspect engines/demo
      lpd-export inspect engines/demo --classes
      lpd-export inspect engines/lpd-l-256 --batch 8
    """
    from lpd_export.bundle.inspection import class_lines, report_lines
    from lpd_export.bundle.manifest import Bundle

    if batch < 1:
        raise UserError(f"--batch must be at least 1, but it is {batch}")
    opened = Bundle.open(bundle)
    limit = opened.manifest.max_batch
    if limit is not None and batch > limit:
        raise UserError(f"{bundle} takes batches of up to {limit} images, not {batch}")
    if classes:
        if as_json:
            print_json(opened.manifest.class_names)
        else:
            click.echo_via_pager("\n".join(class_lines(opened.manifest)) + "\n")
        return
    opened.files()
    opened.schedule()
    if as_json:
        print_json({"bundle": bundle, "manifest": dataclasses.asdict(opened.manifest)})
    else:
        click.echo("\n".join(report_lines(opened, batch)))


# ----------------------------------------------------------------------------------- doctor


@commands.command()
@json_option
def doctor(as_json: bool) -> None:
    """Says what this machine can build and run, and what to install for the rest.

    \b
    Example:
      lpd-export doctor
    """
    from lpd_export.machine.doctor import examine, report_lines

    diagnosis = examine(Path("engines"))
    if as_json:
        print_json(dataclasses.asdict(diagnosis))
    else:
        for line in report_lines(diagnosis):
            click.echo(line)
