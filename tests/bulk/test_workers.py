"""Workers on Ray, real ones: what they make together, and when one is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray that others run, as `ray start --head` starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # No port of 10002 to 19999, which are its workers'; its sockets' paths have 107 bytes at most.
    port = port if port >= 20000 else port + 20000
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block"]
        options = f"--port={port} --num-cpus=2 --include-dashboard=false --temp-dir={folder}"
        process = subprocess.Popen(
            [*command, *options.split(), "--disable-usage-stats"],
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},  # or it leaves a token in the home
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield f"127.0.0.1:{port}"
        finally:
            for pid in children(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def test_a_cluster_that_runs_already(
    small_bundle: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--class", "0", "-n", 30, "--format", "npz"]
    assert answer("run", small_bundle, *asked, "--out", tmp_path / "whole").code == 0
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    end_of_wait = time.monotonic() + 60
    while True:
        said = end(start("run", small_bundle, *asked, "--workers", 2, "--out", tmp_path / "a"))
        if said.code == 0 or time.monotonic() > end_of_wait:
            break
        assert f"no Ray answers at RAY_ADDRESS={cluster}" in said.err, said
    assert said.code == 0, said
    assert content(tmp_path / "a") == content(tmp_path / "whole")


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
