"""Fuzzes every parser of files from anywhere: each answer must be a result or a sentence.

    python scripts/fuzz.py
    python scripts/fuzz.py --inputs 2000 --target manifest --target recipe

Half of the inputs are made by Hypothesis, from whole files with entries and bytes replaced, half by
libFuzzer through Atheris, which keeps what reaches new branches of the parsers. An answer that is
neither a result nor a sentence, or that takes longer than 5 s or more than 2 GB, is told, and its
input kept in the folder of `--found`; put it in tests/data/fuzz/TARGET when it is mended.
Prints Markdown.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

INSTRUMENTED = (
    "lpd_export",
    "lpd_reference",
    "tomllib",
    "torch._weights_only_unpickler",
    "zipfile",
)
"""The modules whose branches libFuzzer sees."""
DATA = Path(__file__).parents[1] / "tests" / "data" / "fuzz"
"""Whole files, and what was found, by target."""
SLOW_SECONDS = 5
MEMORY = 2 * 2**30
HEADINGS = ("target", "inputs", "inputs a second", "branches, at first", "at last", "found")

Parse = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """A parser, whole files of its format, and what is done to bytes to make them such a file."""

    file: str
    parse: Parse
    seeds: list[bytes]
    wrap: Callable[[bytes], bytes] = bytes
    """So that mutations reach what lies behind a checksum or a length."""


def targets(folder: Path) -> dict[str, Target]:
    """All parsers, with whole files made in `folder`."""
    import numpy as np
    import onnx
    import safetensors.torch
    import torch
    from PIL import Image

    from lpd_export.build.request import read_recipe
    from lpd_export.bulk.requests_file import read_requests
    from lpd_export.bundle.classes import read_names
    from lpd_export.bundle.graph_file import check_graph_file
    from lpd_export.bundle.inspection import class_lines, report_lines
    from lpd_export.bundle.manifest import Bundle, ModelDescription
    from lpd_export.edit_request import EditRequest
    from lpd_export.evaluation.metrics import Moments
    from lpd_export.evaluation.sources import NpzImages, Source
    from lpd_export.evaluation.statistics import Statistics, read_statistics, write_statistics
    from lpd_export.pictures import fit_mask, fit_picture, read_mask, read_picture
    from lpd_export.precision.writer import read_kept_layers
    from lpd_export.runtime.editing import read_token_ids
    from lpd_export.schedule.schedule_file import Schedule
    from lpd_reference import LPD, LPDConfig, load_lpd

    schedule = Schedule.make(4, 5, count=2)
    schedule.save(folder / "schedule.npz")
    npz = (folder / "schedule.npz").read_bytes()
    model = LPD(LPDConfig(dim=64, depth=1, heads=1, grid=2, num_classes=2, vocab_size=4))
    state = {key: weight.half() for key, weight in model.initialize(0).state_dict().items()}
    content = {"model": state, "epoch": 3}
    pth, legacy = io.BytesIO(), io.BytesIO()
    torch.save(content, pth)
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    zipped = pth.getvalue()
    tensors = safetensors.torch.save(state)
    length = 8 + int.from_bytes(tensors[:8], "little")
    ids = io.BytesIO()
    np.save(ids, np.arange(16) % 7)
    dimensions = ModelDescription(**json.loads(whole("manifest.json"))["model"])

    moments = Moments(torch.arange(3.0).double(), torch.eye(3).double())
    write_statistics(folder / "statistics.npz", Statistics(folder, moments, "0" * 64, 9))
    statistics = (folder / "statistics.npz").read_bytes()
    np.savez(folder / "images.npz", arr_0=np.zeros((2, 2, 2, 3), np.uint8), arr_1=np.arange(2))
    images = (folder / "images.npz").read_bytes()

    def see(source: Source) -> None:
        for chunk in source.chunks():
            chunk.pixels()

    def open_bundle(path: Path) -> None:
        bundle = Bundle.open(path.parent)
        list(report_lines(bundle)), list(class_lines(bundle.manifest))

    return {
        "schedule npz": Target("a.npz", Schedule.load, [npz]),
        **{
            f"schedule {name}": Target("a.npz", Schedule.load, [unzip(npz, name)], rezip(npz, name))
            for name in ("orders.npy", "meta.npy")
        },
        "schedule json": Target(
            "a.json",
            lambda path: Schedule.load(path, steps=4),
            [json.dumps(schedule.orders.tolist()).encode()],
        ),
        "recipe": Target("a.toml", read_recipe, [whole("recipe.toml")]),
        "manifest": Target("manifest.json", open_bundle, [whole("manifest.json")], sign),
        "class names": Target(
            "a.json", lambda path: read_names(path, 3), [b'[["a", "\\u00e9"], "b", ["c"]]']
        ),
        "kept layers": Target("a.json", read_kept_layers, [b'{"decode": ["a", "b"]}']),
        "graph": Target(
            "a.onnx",
            lambda path: check_graph_file(path, {"weights.data"}),
            [small_graph(onnx).SerializeToString()],
        ),
        "checkpoint pth": Target("a.pth", load_lpd, [zipped]),
        "checkpoint pickle": Target(
            "a.pth", load_lpd, [unzip(zipped, "data.pkl")], rezip(zipped, "data.pkl")
        ),
        "checkpoint legacy": Target("a.pt", load_lpd, [legacy.getvalue()]),
        "checkpoint safetensors": Target(
            "a.safetensors",
            load_lpd,
            [tensors[8:length]],
            lambda header: struct.pack("<Q", len(header)) + header + tensors[length:],
        ),
        "image": Target(
            "a.png", lambda path: fit_picture(read_picture(path), 16, "crop"), pictures(Image)
        ),
        "mask": Target("a.png", lambda path: fit_mask(read_mask(path), 16, "pad"), pictures(Image)),
        "token ids": Target(
            "a.npy",
            lambda path: read_token_ids(path, dimensions),
            [ids.getvalue()],
        ),
        "requests jsonl": Target("a.jsonl", read_requests, [whole("requests.jsonl")]),
        "requests csv": Target("a.csv", read_requests, [whole("requests.csv")]),
        "record": Target(
            "a.jsonl",
            lambda path: EditRequest(f"{path}:0", outpaint=1).source(),
            [whole("images.jsonl")],
        ),
        "statistics npz": Target("a.npz", read_statistics, [statistics]),
        **{
            f"statistics {name}": Target(
                "a.npz", read_statistics, [unzip(statistics, name)], rezip(statistics, name)
            )
            for name in ("mu.npy", "sigma.npy", "features_sha256.npy", "count.npy")
        },
        "images npz": Target("a.npz", lambda path: see(NpzImages(path)), [images]),
        **{
            f"images {name}": Target(
                "a.npz",
                lambda path: see(NpzImages(path)),
                [unzip(images, name)],
                rezip(images, name),
            )
            for name in ("arr_0.npy", "arr_1.npy")
        },
    }


# ------------------------------------------------------------------------------ whole files


def whole(name: str) -> bytes:
    return (DATA / "whole" / name).read_bytes()


def unzip(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        return members.read(next(n for n in members.namelist() if n.endswith(name)))


def rezip(archive: bytes, name: str) -> Callable[[bytes], bytes]:
    """What puts another content in the place of a member, with the right checksum."""

    def wrap(content: bytes) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
            for member in old.namelist():
                new.writestr(member, content if member.endswith(name) else old.read(member))
        return made.getvalue()

    return wrap


def sign(content: bytes) -> bytes:
    """A manifest with the right checksum, where it can have one."""
    from lpd_export.bundle.manifest import CHECKSUM, checksum

    try:
        values = json.loads(content)
        return json.dumps({CHECKSUM: checksum(values)} | values).encode()
    except (ValueError, TypeError, RecursionError):
        return content


def small_graph(onnx: Any) -> Any:
    """A graph with weights in it, beside it, and in a subgraph."""
    inside = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    beside = onnx.TensorProto(name="x", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    beside.external_data.add(key="location", value="weights.data")
    branch = onnx.helper.make_graph([], "branch", [], [], [inside])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    graph = onnx.helper.make_graph([node], "graph", [], [], [inside, beside])
    return onnx.helper.make_model(graph)


def pictures(image: Any) -> list[bytes]:
    """A small picture in each format that is read, and some modes."""
    from lpd_export.pictures import FORMATS

    seeds = []
    for mode in ("RGB", "RGBA", "P", "I;16"):
        for name in FORMATS:
            buffer = io.BytesIO()
            try:
                image.new(mode, (5, 3), 9).save(buffer, name)
            except (OSError, ValueError):
                continue  # the format has no such mode
            seeds.append(buffer.getvalue())
    return seeds


# ---------------------------------------------------------------------------------- one input


class Answers:
    """Asks a parser, and keeps each kind of answer that is neither a result nor a sentence once."""

    def __init__(self, target: Target, folder: Path, found: Path, inputs: int = 0) -> None:
        self.target = target
        self.left = inputs
        self.begun = time.monotonic()
        self.path = folder / target.file
        self.found = found
        self.known: set[str] = set()

    def ask(self, content: bytes) -> str:
        """What was wrong with the answer to an input; empty if nothing was."""
        from lpd_export.errors import UserError
        from lpd_reference import CheckpointError

        self.path.write_bytes(self.target.wrap(content))
        begun, what = time.monotonic(), ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.target.parse(self.path)
        except (UserError, CheckpointError):
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} in {last.name} of {Path(last.filename).name}"
        if time.monotonic() - begun > SLOW_SECONDS:
            what = what or f"no answer in {SLOW_SECONDS} s"
        if what and what not in self.known:
            self.known.add(what)
            self.found.mkdir(parents=True, exist_ok=True)
            (self.found / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
            print(f"FOUND: {what}", file=sys.stderr, flush=True)
        self.left -= 1
        if self.left == 0:
            print(f"SECONDS: {time.monotonic() - self.begun:.2f}", file=sys.stderr, flush=True)
        return what


# ----------------------------------------------------------------------------------- engines

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**70,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\0",
    "\x1b[0m",
    "\ud800",
    "a" * 300,
    [],
    [1],
    [[]],
    {},
    {"x": {}},
)
"""What entries of JSON are replaced by."""
BYTES = (b"", b"\0", b"\xff", b"\xff" * 8, b"\0" * 8, b"9" * 5000, b"[" * 3000, b"\x7f\xff\xff\xff")
"""What bytes are replaced by."""


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """A whole file with one to three entries, or runs of bytes, replaced."""
    try:
        tree = json.loads(seed)
    except ValueError:
        tree = None
    content = seed
    if isinstance(tree, dict | list) and chance.random() < 0.8:
        tree = copy.deepcopy(tree)
        for _ in range(chance.randint(1, 3)):
            parents = list(containers(tree))
            parent = chance.choice(parents)
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                continue
            key, change = chance.choice(keys), chance.random()
            if change < 0.7:
                parent[key] = copy.deepcopy(chance.choice(VALUES))
            elif change < 0.85:
                del parent[key]
            elif isinstance(parent, dict):
                parent[str(chance.choice(VALUES))] = parent[key]
            else:
                parent.append(copy.deepcopy(parent[key]))
        return json.dumps(tree).encode()
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(content) + 1)
        end = min(len(content), start + chance.choice((0, 0, 1, 2, 4, 8, 64, len(content))))
        new = chance.choice((*BYTES, bytes([chance.randrange(256)]), content[start:end] * 2))
        content = content[:start] + new + content[end:]
    return content


def containers(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield tree
        for entry in list(tree.values()) if isinstance(tree, dict) else tree:
            yield from containers(entry)


def run_hypothesis(answers: Answers, inputs: int, seed: int) -> None:
    """Asks inputs that Hypothesis makes."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    made = st.builds(
        mutated, st.sampled_from(answers.target.seeds), st.randoms(use_true_random=False)
    )

    @seeded(seed)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(made, made, made, st.binary(max_size=200)))
    def ask(content: bytes) -> None:
        answers.ask(content)

    ask()


def run_atheris(answers: Answers, inputs: int, seed: int, corpus: Path) -> None:
    """Asks inputs that libFuzzer makes; ends the process."""
    import atheris

    corpus.mkdir()
    for content in answers.target.seeds:
        (corpus / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
    longest = max(map(len, answers.target.seeds))
    options = [f"-atheris_runs={inputs}", f"-seed={seed + 1}", f"-max_len={2 * longest + 4096}"]
    options += ["-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], answers.ask)
    atheris.Fuzz()


def fuzz_here(name: str, inputs: int, seed: int, found: Path) -> None:
    """Fuzzes one target in this process, which it ends."""
    import atheris

    memory = Path("/dev/shm")  # every input is a file, and a disk would be most of the time
    place = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        # NumPy and torch are not instrumented: their branches are not the parsers'.
        import numpy as np  # noqa: F401
        import torch

        del sys.modules["torch._weights_only_unpickler"]
        with atheris.instrument_imports(include=list(INSTRUMENTED), enable_loader_override=False):
            import torch._weights_only_unpickler as unpickler

            torch.serialization._weights_only_unpickler = unpickler
            target = targets(Path(folder))[name]
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        answers = Answers(target, Path(folder), found, inputs)
        run_hypothesis(answers, inputs // 2, seed)
        run_atheris(answers, answers.left, seed, Path(folder) / "corpus")


# -------------------------------------------------------------------------------------- all


def fuzz(name: str, inputs: int, seed: int, found: Path) -> list[str]:
    """Fuzzes a target in a process of its own: the cells of its row."""
    done = subprocess.run(
        [
            *(sys.executable, __file__, "--here", "--target", name, "--inputs", str(inputs)),
            *("--seed", str(seed), "--found", str(found / name.replace(" ", "-"))),
        ],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = done.stderr.decode(errors="replace")
    branches = re.findall(r"cov: (\d+)", said)
    seconds = re.findall(r"^SECONDS: (\S+)", said, re.MULTILINE)
    if not branches or not seconds:
        raise click.ClickException(f"{name} ended with {done.returncode}: {said[-3000:]}")
    kinds = re.findall(r"^FOUND: (.*)", said, re.MULTILINE)
    rate = inputs / float(seconds[0])
    return [name, str(inputs), f"{rate:.0f}", branches[0], branches[-1], "; ".join(kinds) or "-"]


@click.command()
@click.option("--inputs", default=100_000, show_default=True, help="In all.")
@click.option("--target", "names", multiple=True, help="A parser alone; may be repeated.")
@click.option("--seed", default=0, show_default=True)
@click.option("--found", default="runs/fuzz", show_default=True, help="Where inputs are kept.")
@click.option("--here", is_flag=True, hidden=True)
def main(inputs: int, names: tuple[str, ...], seed: int, found: str, here: bool) -> None:
    """Prints a row for every parser; ends with 1 if anything was found."""
    if here:
        fuzz_here(names[0], inputs, seed, Path(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        known = targets(Path(folder))
    for name in names:
        if name not in known:
            raise click.ClickException(f"there is no target {name!r}: there are {', '.join(known)}")
    chosen = list(names or known)
    click.echo(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    begun, anything = time.monotonic(), False
    for name in chosen:
        cells = fuzz(name, inputs // len(chosen), seed, Path(found))
        click.echo(f"| {' | '.join(cells)} |")
        anything |= cells[-1] != "-"
    click.echo(
        f"\n{inputs // len(chosen) * len(chosen)} inputs in {time.monotonic() - begun:.0f} s"
    )
    sys.exit(anything)


if __name__ == "__main__":
    main()
