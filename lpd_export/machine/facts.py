"""What this machine has: packages, GPUs and their driver, memory, disk, and the hub.

Knows how to find each of them out, whatever state it is in. Does not know what any of it is needed
for. Nothing is imported into the asking process: each package is tried in a process of its own,
which it may break, hang or crash.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "polygraphy": ("polygraphy",),
}
"""By module what pip calls it; the first is the one to install."""
IMPORT_SECONDS = 60
"""For one package; torch takes seconds, from a cold network disk many."""
DRIVER_SECONDS = 15


# -------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class Package:
    """A Python package: neither version nor problem if it is not installed."""

    version: str | None = None
    problem: str | None = None
    """Why it cannot be imported."""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    memory: int | None = None
    """Bytes in all."""
    capability: str | None = None
    """Compute capability, as "8.9"."""


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, or what HF_ENDPOINT names in its place."""

    endpoint: str
    problem: str | None = None
    """Why nothing can be fetched from it."""


@dataclass(frozen=True)
class Facts:
    """What there is on a machine; by default nothing."""

    packages: Mapping[str, Package] = field(default_factory=dict)
    """By module, those of PACKAGES."""
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str | None = None
    """Why a GPU that is there cannot be used by any program."""
    driver: str | None = None
    driver_cuda: str | None = None
    """The newest CUDA version that the driver runs."""
    torch_cuda: str | None = None
    """The CUDA version that torch is built for; none if it is a CPU build."""
    torch_gpu_problem: str | None = "torch is not installed"
    providers: tuple[str, ...] = ()
    """ONNX Runtime's execution providers, usable or not."""
    cuda_provider_problem: str | None = "ONNX Runtime is not installed"
    """Why ONNX Runtime's CUDA provider does not load."""
    rtx_capabilities: tuple[str, ...] = ()
    """The compute capabilities that TensorRT-RTX compiles for."""


# ---------------------------------------------------------------------------------- looking


def look(subjects: Collection[str] | None = None) -> Facts:
    """The facts of this machine that these subjects tell, by default all; see SUBJECTS."""
    chosen = [name for name in SUBJECTS if subjects is None or name in subjects]
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = dict(zip(chosen, pool.map(_look_at, chosen), strict=True))
    facts: dict[str, Any] = {"packages": {}}
    for name, told in found.items():
        package = told.pop("package", None)
        if package is not None:
            facts["packages"][name] = Package(**package)
        # What torch says of GPUs is what will be used, in its order.
        facts |= {key: value for key, value in told.items() if key != "gpus" or value}
    facts["gpus"] = tuple(Gpu(**gpu) for gpu in facts.get("gpus", ()))
    for key in ("providers", "rtx_capabilities"):
        facts[key] = tuple(facts.get(key, ()))
    return Facts(**facts)


def _look_at(subject: str) -> dict[str, Any]:
    if subject == "nvidia":
        return _ask_driver()
    if subject in sys.modules:
        return SUBJECTS[subject]()
    return _ask_process(subject)


def _ask_process(subject: str) -> dict[str, Any]:
    """What a process that looks at one subject tells, whatever becomes of it."""
    told: dict[str, Any] = {}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lpd_export.machine.facts", subject],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_SECONDS,
            stdin=subprocess.DEVNULL,
            # It imports from where this process would.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        )
        errors = done.stderr
        if done.returncode == 0:
            told = json.loads(done.stdout.splitlines()[-1])
            problem = None
        elif done.returncode < 0:
            problem = f"it crashed with {signal.Signals(-done.returncode).name}"
        else:
            problem = _short(errors.strip().splitlines()[-1] if errors.strip() else "it exited")
    except subprocess.TimeoutExpired:
        errors, problem = "", f"it did not answer in {IMPORT_SECONDS} s"
    except (OSError, ValueError, IndexError) as error:
        errors, problem = "", _short(f"it could not be tried: {error}")
    if subject == "cuda_provider":
        # The reason is in ONNX Runtime's log alone.
        reason = re.search(r"with error: (.*)", errors) or re.search(r"\w\] (.*)", errors)
        refused = told.get("refused") and (_short(reason[1]) if reason else "it does not say why")
        return {"cuda_provider_problem": problem or told.get("problem") or refused or None}
    if problem and subject in PACKAGES:
        return {"package": {"version": _installed_version(subject), "problem": problem}}
    return told


def _try_package(
    module: str, more: Callable[[Any], dict[str, Any]] = lambda imported: {}
) -> dict[str, Any]:
    """Imports a package and tells its version, or why that fails, and what `more` finds."""
    try:
        imported = importlib.import_module(module)
        # A folder that pip left behind imports as an empty namespace.
        if getattr(imported, "__file__", None) is None:
            return {"package": {}}
        version = str(getattr(imported, "__version__", None) or _installed_version(module) or "?")
        return {"package": {"version": version}} | more(imported)
    except ModuleNotFoundError as error:
        if error.name == module:
            return {"package": {}}
        problem = _short(str(error))
    except (Exception, SystemExit) as error:
        problem = _short(f"{type(error).__name__}: {error}")
    return {"package": {"version": _installed_version(module), "problem": problem}}


def _installed_version(module: str) -> str | None:
    for name in PACKAGES[module]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _facts_of_torch(torch: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"torch_cuda": torch.version.cuda, "gpus": []}
    try:
        if torch.version.cuda is None:
            raise RuntimeError("it is a CPU build")
        torch.cuda.init()  # unlike is_available it says why not
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            told["gpus"].append(
                {
                    "name": properties.name,
                    "memory": properties.total_memory,
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
        return told | {"torch_gpu_problem": None}
    except Exception as error:
        return told | {"torch_gpu_problem": _short(str(error))}


def _facts_of_onnxruntime(onnxruntime: Any) -> dict[str, Any]:
    return {"providers": onnxruntime.get_available_providers()}


def _facts_of_tensorrt_rtx(tensorrt_rtx: Any) -> dict[str, Any]:
    members = tensorrt_rtx.ComputeCapability.__members__
    names = (re.fullmatch(r"SM(\d+)(\d)", member) for member in members)
    known = sorted((int(name[1]), int(name[2])) for name in names if name)
    return {"rtx_capabilities": [f"{major}.{minor}" for major, minor in known]}


def _try_cuda_provider() -> dict[str, Any]:
    """Runs a graph of one node through CUDA, torch's libraries at hand as in a real run."""
    try:
        with contextlib.suppress(Exception):
            importlib.import_module("torch")
        onnxruntime = importlib.import_module("onnxruntime")
        from onnx import TensorProto, helper

        wanted = "CUDAExecutionProvider"
        if wanted not in onnxruntime.get_available_providers():
            return {"problem": "this ONNX Runtime is built without CUDA"}
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "try", [x], [y])
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=[wanted])
        if wanted not in session.get_providers():
            return {"refused": True}
        session.run(None, {"x": importlib.import_module("numpy").ones(1, "float32")})
        return {}
    except Exception as error:
        return {"problem": _short(str(error))}


def _try_driver_library() -> dict[str, Any]:
    """The newest CUDA version of the driver, which needs no GPU to say it."""
    import ctypes

    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    version = ctypes.c_int()
    try:
        if ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version)):
            return {}
    except (OSError, AttributeError):
        return {}
    return {"driver_cuda": f"{version.value // 1000}.{version.value % 1000 // 10}"}


def _ask_driver() -> dict[str, Any]:
    """What nvidia-smi tells of the GPUs, or why it does not although there is one."""
    fields = "name,memory.total,compute_cap,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return {"gpu_problem": "nvidia-smi does not answer: restart the machine or its driver"}
    except OSError:
        if not _has_nvidia_hardware():
            return {}
        return {
            "gpu_problem": "there is an NVIDIA GPU, but no nvidia-smi: install NVIDIA's driver (in "
            "a container: start it with the GPU)"
        }
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    if done.returncode or not rows:
        said = (done.stdout + done.stderr).strip().splitlines() or ["it says nothing"]
        return {"gpu_problem": f"nvidia-smi finds no GPU ({_short(said[0])}): install its driver"}
    return {
        "driver": rows[0][3],
        "gpus": [
            {
                "name": name,
                "memory": int(memory) << 20 if memory.isdecimal() else None,
                "capability": capability if re.fullmatch(r"\d+\.\d+", capability) else None,
            }
            for name, memory, capability, _ in rows
        ],
    }


def _has_nvidia_hardware() -> bool:
    """Whether Linux lists a display device of NVIDIA's, driver or not."""

    def content(path: Path) -> str:
        with contextlib.suppress(OSError):
            return path.read_text(encoding="ascii").strip()
        return ""

    return any(
        content(device / "vendor") == "0x10de" and content(device / "class").startswith("0x03")
        for device in Path("/sys/bus/pci/devices").glob("*")
    )


SUBJECTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "nvidia": _ask_driver,
    "driver_library": _try_driver_library,
    "torch": partial(_try_package, "torch", _facts_of_torch),
    "onnxruntime": partial(_try_package, "onnxruntime", _facts_of_onnxruntime),
    "cuda_provider": _try_cuda_provider,
    "tensorrt": partial(_try_package, "tensorrt"),
    "tensorrt_rtx": partial(_try_package, "tensorrt_rtx", _facts_of_tensorrt_rtx),
    "polygraphy": partial(_try_package, "polygraphy"),
}
"""What can be looked at, and how; what comes later wins."""


def _short(text: str) -> str:
    return textwrap.shorten(text, 240, placeholder=" ...")


def reach_hub(timeout: float) -> Hub:
    """Asks the hub once, for `timeout` seconds at most."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return Hub(constants.ENDPOINT, "HF_HUB_OFFLINE is set, so that nothing is fetched")
    problem: list[str | None] = [f"no answer in {timeout:g} s"]

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=timeout).status_code
            problem[0] = f"it answers with HTTP status {status}" if status >= 500 else None
        # The HTTP client under huggingface_hub changes with its version, and its errors with it.
        except Exception as error:
            problem[0] = _short(f"{type(error).__name__}: {error}")

    # In a thread, since the time limit of a request leaves out the look-up of the name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)
    return Hub(constants.ENDPOINT, problem[0])


class Memory(NamedTuple):
    """Bytes, where the system tells them."""

    total: int | None
    free: int | None


def read_memory(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Main memory of the machine, or of the container if that has less."""
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) << 10 for name, rest in (s.split(":") for s in lines)}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, LookupError):
        try:
            return Memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)
        except (OSError, ValueError, AttributeError):  # Windows has no sysconf
            return Memory(None, None)
    with contextlib.suppress(OSError, ValueError, LookupError):
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # or the word max
        used = int((group / "memory.current").read_text(encoding="ascii"))
        kinds = dict(s.split() for s in (group / "memory.stat").read_text("ascii").splitlines())
        # Of what the container uses, its file cache is given up when memory is asked for.
        left = max(0, limit - used + int(kinds["inactive_file"]))
        total, free = min(total, limit), min(free, left)
    return Memory(total, free)


def read_free_disk(folder: Path) -> int | None:
    """Free bytes where `folder` is or would be made."""
    for existing in (folder.absolute(), *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(existing).free
    return None


if __name__ == "__main__":
    print("\n" + json.dumps(SUBJECTS[sys.argv[1]]()))
