"""What is found of packages, GPUs, memory, disk and the hub, however broken they are."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lpd_export.machine.facts import Gpu, Hub, Package, look, reach_hub, read_free_disk, read_memory

# --------------------------------------------------------------------------------------- packages


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("import ctypes; ctypes.CDLL('libnvinfer.so.99')", "OSError: libnvinfer.so.99: cannot"),
        ("import tensorrt_bindings_that_are_gone", "No module named 'tensorrt_bindings_that_are_"),
        ("import os; os.abort()", "it crashed with SIGABRT"),
        ("import sys; print('hello'); sys.exit(3)", "SystemExit: 3"),
        ("import os; print('hello'); os._exit(3)", "it exited"),
        ("def broken(", "SyntaxError: "),
    ],
)
def test_a_broken_package_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, problem: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    found = look({"tensorrt"}).packages["tensorrt"]
    assert found.problem is not None
    assert found.problem.startswith(problem)
    assert "tensorrt" not in sys.modules


def test_a_package_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("import time; time.sleep(1000)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("lpd_export.machine.facts.IMPORT_SECONDS", 0.5)
    found = look({"tensorrt"}).packages["tensorrt"]
    assert found.problem == "it did not answer in 0.5 s"


def test_what_a_package_prints_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("__version__ = '11.0'; print('[TRT] hello', end='')")
    monkeypatch.syspath_prepend(tmp_path)
    assert look({"tensorrt"}).packages["tensorrt"] == Package("11.0")


def test_a_leftover_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert look({"tensorrt"}).packages["tensorrt"] == Package()


def test_the_folder_one_is_in_is_not_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "polygraphy.py").write_text("raise ValueError('a script of the user')")
    monkeypatch.chdir(tmp_path)
    assert look({"polygraphy"}).packages["polygraphy"].problem is None


# ------------------------------------------------------------------------------------------- GPUs


def write_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_what_nvidia_smi_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_smi(
        tmp_path,
        monkeypatch,
        "echo 'NVIDIA H100 80GB HBM3, 81559, 9.0, 580.95.05'\n"
        "echo 'NVIDIA Old, [N/A], [Not Supported], 580.95.05'",
    )
    facts = look({"nvidia"})
    assert facts.gpus == (
        Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, "9.0"),
        Gpu("NVIDIA Old", None, None),
    )
    assert facts.driver == "580.95.05"
    assert facts.gpu_problem is None
    write_smi(tmp_path, monkeypatch, "echo 'No devices were found'; exit 6")
    assert "(No devices were found): " in (look({"nvidia"}).gpu_problem or "")
    monkeypatch.setattr("lpd_export.machine.facts.DRIVER_SECONDS", 0.2)
    write_smi(tmp_path, monkeypatch, "exec sleep 100")
    assert "does not answer" in (look({"nvidia"}).gpu_problem or "")


# -------------------------------------------------------------------------------- memory and disk


def test_disk_of_a_folder_to_be_made(tmp_path: Path) -> None:
    assert read_free_disk(tmp_path / "a" / "b")
    assert read_free_disk(tmp_path / ("a" * 300))


def test_memory_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 6000 kB\n")
    assert read_memory(tmp_path, tmp_path) == (8000 << 10, 6000 << 10)
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert read_memory(tmp_path, tmp_path) == (8000 << 10, 6000 << 10)
    (tmp_path / "memory.max").write_text("4000000\n")
    assert read_memory(tmp_path, tmp_path) == (4000000, 1500000)


# ----------------------------------------------------------------------------------- the hub


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_server() as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        started = time.perf_counter()
        hub = reach_hub(0.5)
        assert time.perf_counter() - started < 20
    assert hub.endpoint == endpoint
    assert hub.problem is not None


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    started = time.perf_counter()
    hub = reach_hub(60)
    assert time.perf_counter() - started < 20
    assert "ConnectError" in (hub.problem or "")
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    assert reach_hub(5).problem


def test_a_name_look_up_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: released.wait(60))
    monkeypatch.setattr(constants, "ENDPOINT", "http://some.host")
    started = time.perf_counter()
    assert reach_hub(0.5) == Hub("http://some.host", "no answer in 0.5 s")
    assert time.perf_counter() - started < 20
    released.set()


@pytest.mark.parametrize(
    ("status", "problem"),
    [("200 OK", None), ("404 Not Found", None), ("503 Busy", "it answers with HTTP status 503")],
)
def test_a_hub_that_answers(
    monkeypatch: pytest.MonkeyPatch, status: str, problem: str | None
) -> None:
    script = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print(server.getsockname()[1], flush=True)\n"
        "while True:\n"
        "    connection, _ = server.accept()\n"
        "    connection.recv(9999)\n"
        f"    connection.sendall(b'HTTP/1.1 {status}\\r\\nContent-Length: 0\\r\\n\\r\\n')\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            assert reach_hub(5) == Hub(endpoint, problem)
        finally:
            server.kill()


def test_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in (reach_hub(5).problem or "")
