"""Workers on Ray, real ones: what they make together, and when one is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from PIL import Image
from test_shards import content

from commandline import answer, children, end, mistake, start, wait_for

pytest.importorskip("ray", reason="Ray is not installed: pip install 'lpd-export[ray]'")
pytestmark = [pytest.mark.model, pytest.mark.slow]


def test_a_worker_that_is_killed_leaves_no_gap(small_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    lines = '{"class": "all", "count": 400}\n{"image": "red.png", "box": [0, 0, 8, 8], "count": 9}'
    (tmp_path / "r.jsonl").write_text(lines)
    asked = ["--requests", tmp_path / "r.jsonl", "--format", "tar", "--per-file", 300]
    whole = tmp_path / "whole"
    assert answer("run", small_bundle, *asked, "--out", whole).code == 0
    process = start("run", small_bundle, *asked, "--workers", 2, "--out", tmp_path / "a")
    wait_for(process, "image ")
    workers = [pid for pid, said in children(process.pid).items() if said.startswith("ray::MapW")]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    said = end(process)
    assert said.code == 0, said
    assert content(tmp_path / "a") == content(whole)


def test_an_image_that_fails_in_a_worker(broken_bundle: Path, tmp_path: Path) -> None:
    asked = ["--class", "all", "-n", 2, "--workers", 1]
    said = end(start("run", broken_bundle, *asked, "--out", tmp_path / "a"))
    assert said.code == 2
    assert "error: image 3 (Crane, seed 0, index 3): the logits of step 1 (phase 0" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--trace", "--trace draws where images are made: leave out --workers"),
        ("--device cuda:1", "Ray gives each worker a GPU: --device cuda, not cuda:1"),
        ("--device cuda", "--workers 2 needs 2 GPUs, but Ray has "),
    ],
)
def test_what_workers_cannot_do(
    small_bundle: Path, tmp_path: Path, options: str, message: str
) -> None:
    asked = ["--class", "0", "--workers", 2, "--out", tmp_path / "a"]
    assert message in mistake("run", small_bundle, *asked, *options.split())
    assert not (tmp_path / "a").exists()
