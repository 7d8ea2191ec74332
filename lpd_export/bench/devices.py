"""How many operations and bytes a second a device can do: measured here, or from a data sheet.

Knows devices, not what is computed on them. Data sheets tell peaks, which no program reaches:
what follows from them is a bound and no forecast.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lpd_export.errors import UserError

CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Attributes:
        name: as the command line calls it.
        title: in prose.
        bandwidth: bytes a second to and from its memory.
        rates: operations a second by type, dense, a multiplication and an addition being two.
        source: where that is from.
    """

    name: str
    title: str
    bandwidth: float
    rates: Mapping[str, float]
    source: str

    def rate(self, product: str) -> float:
        """Operations a second of a product of a type that `work.product_type` tells.

        Weights of fewer bits than what they are multiplied with are turned back on their way, and
        cost what the other type costs; a CPU, whose kernels round the other side to 8 bits
        instead, takes the faster of the two. A type that the device has not is computed in
        float32, as what has no fast kernel there is.
        """
        kept, *packed = product.split(" x ")
        rate = self.rates.get(kept, self.rates["float32"])
        if packed and self.name == CPU:
            return max(rate, self.rates["int8"])
        return rate


def _sheet(
    name: str, title: str, gigabytes: float, source: str, **teraops: float
) -> tuple[str, Device]:
    rates = {kind: value * 1e12 for kind, value in teraops.items()}
    rates["bfloat16"] = rates.get("bfloat16", rates["float16"])
    return name, Device(name, title, gigabytes * 1e9, rates, source)


DATA_SHEETS: dict[str, Device] = dict(
    (
        _sheet(
            "a100",
            "NVIDIA A100 SXM, 80 GB",
            2039,
            "https://www.nvidia.com/en-us/data-center/a100/",
            float32=19.5,
            float16=312,
            int8=624,
        ),
        _sheet(
            "h100",
            "NVIDIA H100 SXM",
            3350,
            "https://www.nvidia.com/en-us/data-center/h100/",
            float32=67,
            float16=989.5,
            int8=1979,
            float8=1979,
        ),
        _sheet(
            "h200",
            "NVIDIA H200 SXM",
            4800,
            "https://www.nvidia.com/en-us/data-center/h200/",
            float32=67,
            float16=989.5,
            int8=1979,
            float8=1979,
        ),
        _sheet(
            "l4",
            "NVIDIA L4",
            300,
            "https://www.nvidia.com/en-us/data-center/l4/",
            float32=30.3,
            float16=121,
            int8=242.5,
            float8=242.5,
        ),
        _sheet(
            "l40s",
            "NVIDIA L40S",
            864,
            "https://www.nvidia.com/en-us/data-center/l40s/",
            float32=91.6,
            float16=362,
            int8=733,
            float8=733,
        ),
        # FP16 and FP8 of the next two accumulate in FP16, twice as fast as in FP32.
        _sheet(
            "rtx-4090",
            "NVIDIA GeForce RTX 4090",
            1008,
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
            float32=82.6,
            float16=330.3,
            bfloat16=165.2,
            int8=660.6,
            float8=660.6,
        ),
        _sheet(
            "rtx-5090",
            "NVIDIA GeForce RTX 5090",
            1792,
            "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
            float32=104.8,
            float16=419,
            bfloat16=209.5,
            int8=838,
            float8=838,
        ),
        # The sheet tells FP4 and FP8; FP16 is half of FP8, FP32 its 2,560 cores at 1.575 GHz.
        _sheet(
            "jetson-thor",
            "NVIDIA Jetson Thor T5000",
            273,
            "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-thor/",
            float32=8.06,
            float16=258.5,
            int8=517,
            float8=517,
        ),
    )
)
"""By name."""


def check_name(name: str) -> None:
    """Raises UserError for a device that is not known."""
    if name not in (CPU, *DATA_SHEETS):
        raise UserError(
            f"--roofline {name!r} is not known: it must be one of {CPU}, {', '.join(DATA_SHEETS)}"
        )


def find_device(name: str, threads: int | None = None) -> Device:
    """A device by its name; `cpu` is measured now, for two seconds.

    Raises:
        UserError: if it is not known.
    """
    check_name(name)
    return measure_cpu(threads) if name == CPU else DATA_SHEETS[name]


def sheet_of(gpu: str) -> Device | None:
    """The data sheet of a GPU that calls itself this, if there is one."""
    words = gpu.lower().replace("-", " ").split()
    for device in DATA_SHEETS.values():
        if set(device.name.split("-")) <= set(words):
            return device
    return None


# ------------------------------------------------------------------------------------ this CPU


def measure_cpu(threads: int | None = None) -> Device:
    """The rates of this CPU with so many threads, the best of many short trials.

    Large products in ONNX Runtime, float32 and unsigned by signed 8-bit integers, and the sum of
    an array that is far larger than any cache.
    """
    import numpy as np
    import torch

    rows, inputs, outputs = 384, 2048, 2048
    generator = np.random.default_rng(0)
    operations = 2 * rows * inputs * outputs
    rates = {}
    for kind, operator, left, right in (
        ("float32", "MatMul", np.float32, np.float32),
        ("int8", "MatMulInteger", np.uint8, np.int8),
    ):
        weight = generator.integers(-100, 100, (inputs, outputs)).astype(right)
        values = generator.integers(0, 200, (rows, inputs)).astype(left)
        rates[kind] = operations / _best(_product(operator, weight, values, threads))
    # Its FP16 and BF16 graphs are computed through casts to float32, if at all.
    with torch_threads(threads or torch.get_num_threads()):
        array = torch.ones(64 << 20)
        bandwidth = array.nbytes / _best(lambda: array.sum())
    used = threads or os.cpu_count()
    return Device(CPU, f"this CPU, {used} threads", bandwidth, rates, "measured")


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch's operations on a CPU take so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(work: Callable[[], object], seconds: float = 0.5) -> float:
    """The least seconds that a piece of work takes, tried for so long and at least five times."""
    work()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _product(
    operator: str, weight: object, values: object, threads: int | None
) -> Callable[[], object]:
    """A call that multiplies values with a constant weight in ONNX Runtime."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from lpd_export.runtime.onnxruntime_session import allowed_cores

    assert isinstance(weight, np.ndarray)
    assert isinstance(values, np.ndarray)
    result = TensorProto.INT32 if operator == "MatMulInteger" else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(values.dtype), None)],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or allowed_cores()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": values})
