"""`bench --roofline`: what it prints is the arithmetic of what was counted and of a data sheet."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from commandline import answer, mistake
from lpd_export.bench.devices import DATA_SHEETS, Device, sheet_of
from lpd_export.bench.floor import floor
from lpd_export.bench.work import Work, generation_work
from lpd_export.bundle.manifest import Bundle

SLOW = Device("slow", "", 10.0, {"float32": 4.0, "float16": 8.0, "int8": 16.0}, "")


@pytest.mark.parametrize(
    ("operations", "memory", "seconds", "bound"),
    [
        ({"float32": 40}, 20, 10, "compute"),
        ({"float32": 4, "int8": 16}, 10, 2, "compute"),
        ({"float16 x int4": 16}, 10, 2, "compute"),  # unpacked: what the other type costs
        ({"bfloat16": 8}, 10, 2, "compute"),  # a type that it has not
        ({"float32": 4}, 30, 3, "memory"),
        ({}, 30, 3, "memory"),
    ],
)
def test_the_slower_of_computing_and_reading(
    operations: dict[str, int], memory: int, seconds: float, bound: str
) -> None:
    found = floor(Work(Counter(operations), memory), SLOW)
    assert (found.seconds, found.bound) == (seconds, bound)


def test_a_cpu_rounds_what_meets_packed_weights() -> None:
    cpu = Device("cpu", "", 1.0, {"float32": 4.0, "int8": 16.0}, "")
    assert cpu.rate("float32 x int4") == 16
    assert cpu.rate("float32") == cpu.rate("float16") == 4


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_data_sheets_agree_with_themselves(name: str) -> None:
    sheet = DATA_SHEETS[name]
    assert sheet.name == name
    assert sheet.source.startswith("https://")
    rates = sheet.rates
    assert rates["float32"] < rates["bfloat16"] <= rates["float16"] < rates["int8"]
    assert rates["int8"] == pytest.approx(2 * rates["float16"], rel=0.02)


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_found_by_what_they_call_themselves(gpu: str, name: str | None) -> None:
    sheet = sheet_of(gpu)
    assert (sheet and sheet.name) == name


def test_it_prints_what_the_arithmetic_says(small_bundle: Path) -> None:
    said = answer("bench", small_bundle, "--roofline", "h100", "--batch", "1,4", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    sheet = DATA_SHEETS["h100"]
    parts = generation_work(Bundle.open(small_bundle))
    assert [entry["batch"] for entry in found["batches"]] == [1, 4]
    for entry in found["batches"]:
        assert list(entry["parts"]) == list(parts)
        total = 0.0
        for name, work in parts.items():
            images = entry["batch"]
            moved = work.weights + images * (work.caches + work.activations)
            seconds = max(
                images * work.operations["float32"] / sheet.rates["float32"],
                moved / sheet.bandwidth,
            )
            assert entry["parts"][name]["seconds"] == pytest.approx(seconds)
            assert entry["parts"][name]["bytes"] == moved
            total += seconds
        assert entry["seconds"] == pytest.approx(total)
        assert entry["images_a_second"] == pytest.approx(entry["batch"] / total)
    table = answer("bench", small_bundle, "--roofline", "h100").out
    for name in (*parts, "NVIDIA H100 SXM", "3,350 GB/s", sheet.source):
        assert name in table


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--roofline", "h900"], "--roofline 'h900' is not known: it must be one of cpu, a100"),
        (["--roofline", "h100", "--batch", "0"], "--batch must be a whole number from 1"),
        (["--roofline", "h100", "--batch", "1,x"], "whole numbers such as 1,4,16, but it is '1,x'"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    small_bundle: Path, options: list[str], sentence: str
) -> None:
    assert sentence in mistake("bench", small_bundle, *options)
