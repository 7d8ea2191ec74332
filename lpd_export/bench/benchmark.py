"""Benchmarks a bundle: contenders take turns in one process, and what is found is summed up.

Knows the order of the work. One generation is timed in `timing`, its work counted in `work`; what
is asked is in `request`, and what the user sees in `terminal` and `report`.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from lpd_export.accuracy.reference_side import open_reference
from lpd_export.accuracy.request import REFERENCE, VerifyRequest
from lpd_export.bench.cold import cold_start
from lpd_export.bench.devices import Device, measure_cpu, sheet_of
from lpd_export.bench.floor import floors
from lpd_export.bench.profiling import profile
from lpd_export.bench.report import write_report
from lpd_export.bench.request import BenchRequest
from lpd_export.bench.results import Benchmark, collect
from lpd_export.bench.timing import BundleContender, Contender, ReferenceContender, Seconds
from lpd_export.bench.work import generation_work
from lpd_export.bundle.manifest import Bundle
from lpd_export.progress import Report
from lpd_export.runtime.arrays import HOST
from lpd_export.runtime.pipeline import Pipeline


def bench(request: BenchRequest, report: Report) -> Benchmark:
    """Times a bundle, beside its floor and whatever it is compared with.

    Raises:
        UserError: if something that is needed is missing, damaged or does not fit.
    """
    request.check()
    bundle = Bundle.open(request.bundle)
    manifest = bundle.manifest
    cold, operators = None, {}
    if request.details:
        report("starting processes of their own for a first image")
        cold = cold_start(
            bundle.path, request.batches[0], request.device, request.threads, request.runs
        )
    report("counting operations and bytes")
    work = generation_work(bundle)
    report(f"loading {bundle.path}")
    contenders = open_contenders(request, report)
    ours = contenders[0]
    assert isinstance(ours, BundleContender)
    report("measuring what the device can do")
    device = rates_of(ours.device, request.threads)
    batches = []
    for batch in request.batches:
        least = floors(work, device, batch) if device else {}
        rounds = take_turns(contenders, batch, request, report)
        batches.append(collect(batch, rounds, [each.name for each in contenders], least))
    machine = describe_machine(ours.device, request.threads)
    for each in contenders:
        if isinstance(each, BundleContender):
            each.close()
    del contenders, ours
    gc.collect()
    if request.details:
        report("profiling operators")
        operators = profile(bundle, request.batches[0], request.device, request.threads)
    found = Benchmark(
        bundle=str(request.bundle),
        name=manifest.name,
        precision=manifest.precision,
        backend=manifest.backend,
        steps=len(manifest.phases),
        resolution=manifest.resolution,
        cfg=manifest.cfg,
        runs=request.runs,
        machine=machine,
        device=device,
        disk_bytes=sum(file.size for file in manifest.files.values()),
        batches=batches,
        cold=cold,
        operators=operators,
    )
    if request.out is not None:
        write_report(found, request.out)
    return found


def open_contenders(request: BenchRequest, report: Report) -> list[Contender]:
    """The bundle, then what it is compared with."""
    if request.threads:
        torch.set_num_threads(request.threads)
    pipeline = Pipeline.open(request.bundle, device=request.device, threads=request.threads)
    contenders: list[Contender] = [BundleContender(str(request.bundle), pipeline)]
    for other in request.against:
        if other == REFERENCE:
            asked = VerifyRequest(
                request.bundle, checkpoint=request.checkpoint, tokenizer=request.tokenizer
            )
            reference = open_reference(asked, pipeline.manifest, [], report)
            contenders.append(ReferenceContender(reference.model, reference.tokenizer, pipeline))
        else:
            report(f"loading {other}")
            opened = Pipeline.open(other, device=request.device, threads=request.threads)
            contenders.append(BundleContender(other, opened))
    return contenders


def take_turns(
    contenders: Sequence[Contender], batch: int, request: BenchRequest, report: Report
) -> list[list[Seconds]]:
    """Rounds in which each contender makes a batch once, after one round to warm up.

    Every other round goes backwards, so that none always has the machine after the same one.

    Returns:
        By round, the times of every contender in their order.
    """
    rounds = []
    for number in range(request.runs + 1):
        what = f"round {number} of {request.runs}" if number else "warming up"
        report(f"batch {batch}: {what}")
        order = range(len(contenders))
        times = {
            place: contenders[place].run(batch, request.seed)
            for place in (order if number % 2 else reversed(order))
        }
        rounds.append([times[place] for place in order])
    return rounds[1:]


# ----------------------------------------------------------------------------------- the machine


def rates_of(device: str, threads: int | None) -> Device | None:
    """What the device can do: a CPU is measured; of a GPU its data sheet, if it is known."""
    if device == HOST:
        return measure_cpu(threads)
    return sheet_of(torch.cuda.get_device_name(device))


def describe_machine(device: str, threads: int | None) -> dict[str, Any]:
    """Processor, instruction set, threads, GPU and versions."""
    processor, flags = read_cpuinfo()
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp")
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "instructions": [name for name in known if name in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(device) if device != HOST else None,
        "python": platform.python_version(),
        "lpd-export": version("lpd-export"),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """The processor's name and the instruction sets that it tells; nothing where there is none."""
    if not path.is_file():
        return "", set()
    pairs = (line.partition(":") for line in path.read_text("utf-8").splitlines())
    entries = {key.strip(): value.strip() for key, _, value in pairs}
    return entries.get("model name", ""), set(
        (entries.get("flags") or entries.get("Features") or "").split()
    )
