"""On an NVIDIA GPU: each backend in a process of its own, or skipped for what doctor says.

One process cannot be trusted to hold TensorRT and TensorRT-RTX at once. What is checked is in
gpu_checks.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lpd_export.formats import BACKENDS
from lpd_export.machine.doctor import abilities
from lpd_export.machine.facts import Facts, look

CHECKS = Path(__file__).with_name("gpu_checks.py")


@pytest.fixture(scope="module")
def facts() -> Facts:
    return look()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_on_the_gpu(backend: str, facts: Facts) -> None:
    cell = ("fp16", backend, "cuda")
    (ability,) = (a for a in abilities(facts) if (a.precision, a.backend, a.device) == cell)
    if lacks := dict.fromkeys((*ability.build.missing, *ability.run.missing)):
        pytest.skip("; ".join(lacks))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(CHECKS)],
        env=os.environ | {"GPU_BACKEND": backend, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
