"""The formats of a bundle: a precision is a row, a backend is a row.

Knows what a precision computes and stores, and what each backend needs for it. Nobody else compares
their names: code asks a row. Does not know how values are cast, how layers are quantized, or how
close to the reference a precision must come, which is in `accuracy.thresholds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FloatType:
    """A type of values at work.

    Attributes:
        name: as a precision is called that is this type throughout.
        torch: as torch, NumPy and manifests call it.
        onnx: as ONNX calls it.
        size: in bytes.
        largest: its largest finite number.
        roundoff: the largest relative error of one rounding.
    """

    name: str
    torch: str
    onnx: str
    size: int
    largest: float
    roundoff: float


FLOAT32 = FloatType("fp32", "float32", "FLOAT", 4, (2 - 2.0**-23) * 2.0**127, 2.0**-24)
FLOAT16 = FloatType("fp16", "float16", "FLOAT16", 2, 65504.0, 2.0**-11)
BFLOAT16 = FloatType("bf16", "bfloat16", "BFLOAT16", 2, (2 - 2.0**-7) * 2.0**127, 2.0**-8)
FLOAT_TYPES = {row.torch: row for row in (FLOAT32, FLOAT16, BFLOAT16)}
"""By the name that manifests have."""


# ------------------------------------------------------------------------------------ backends


@dataclass(frozen=True)
class Backend:
    """What runs a bundle.

    Attributes:
        name: as the command line calls it.
        product: its name in prose.
        module: the Python module that drives it.
        compiles: whether graphs become engines.
        portable: whether engines are for GPUs that need not be there when they are compiled; each
            then compiles its kernels when it loads one, and keeps them.
        fewest_fused_heads: of an attention that is a fused kernel.
        not_taken: settings of engines that it has not, and what to do instead.
        quantized_among: the float type of what is between quantized layers.
        unsigned: whether its integer kernels want activations from 0 to 255, not around 0.
        fuses_attention: whether attention is one kernel with its cache, which takes rows by heads,
            [R, H, S + 1, d], and reads them all. For another, caches are [R, S + 1, D], which
            nothing has to transpose, and graphs leave out rows that nothing needs: of the cache
            those that are not written yet, and in the last block the context's.
        polygraphy: how `polygraphy run` is told to use it: variables, then the option.
    """

    name: str
    product: str
    module: str
    compiles: bool
    quantized_among: FloatType
    unsigned: bool
    fuses_attention: bool
    polygraphy: tuple[str, str]
    portable: bool = False
    fewest_fused_heads: int = 1
    not_taken: Mapping[str, str] = field(default_factory=dict, repr=False)


ONNXRUNTIME = Backend(
    name="onnxruntime",
    product="ONNX Runtime",
    module="onnxruntime",
    compiles=False,
    quantized_among=FLOAT32,  # its CPU has no FP16
    unsigned=True,
    fuses_attention=False,
    polygraphy=("", "--onnxrt"),
)
TENSORRT = Backend(
    name="tensorrt",
    product="TensorRT",
    module="tensorrt",
    compiles=True,
    quantized_among=FLOAT16,
    unsigned=False,
    fuses_attention=True,
    polygraphy=("", "--trt"),
    not_taken={
        "compute_capability": "tensorrt compiles for the GPU that it runs on: leave out the "
        "compute capability (hardware compatibility takes in all GPUs from Ampere on), or use "
        "tensorrt-rtx",
    },
)
TENSORRT_RTX = Backend(
    name="tensorrt-rtx",
    product="TensorRT-RTX",
    module="tensorrt_rtx",
    compiles=True,
    quantized_among=FLOAT16,
    unsigned=False,
    fuses_attention=True,
    polygraphy=("POLYGRAPHY_USE_TENSORRT_RTX=1 ", "--trt"),
    portable=True,
    fewest_fused_heads=2,
    not_taken={
        "timing_cache": "tensorrt-rtx times no kernels when it builds: leave out the timing cache",
        "hardware_compatible": "tensorrt-rtx engines run on every GPU from Ampere on as they are: "
        "leave out hardware compatibility, or name the compute capabilities to compile for",
    },
)
BACKENDS = {row.name: row for row in (ONNXRUNTIME, TENSORRT, TENSORRT_RTX)}
ENGINE_BACKENDS = tuple(name for name, row in BACKENDS.items() if row.compiles)

Target = tuple[str, str]
"""A backend's name and a device."""
CPU: Target = (ONNXRUNTIME.name, "cpu")
CUDA: Target = (ONNXRUNTIME.name, "cuda")
TRT: Target = (TENSORRT.name, "cuda")
RTX: Target = (TENSORRT_RTX.name, "cuda")


# ---------------------------------------------------------------------------------- precisions


@dataclass(frozen=True)
class Support:
    """How a target takes a precision.

    Attributes:
        capability: the least compute capability of the GPU; "" where no GPU takes part.
        refused: why the target does not take it, and what to use instead; "" if it does.
        note: what to know although it works.
    """

    capability: str = ""
    refused: str = ""
    note: str = ""


def reaches(capability: str, least: str) -> bool:
    """Whether a compute capability, such as "8.9", is at least another; "" is the least."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split("."))) if text else ()

    return numbers(capability) >= numbers(least)


@dataclass(frozen=True)
class Quantization:
    """How the matrix products of a precision are stored and computed.

    Attributes:
        title: as a reader knows it.
        weights: the ONNX type of a stored weight.
        activations: the ONNX type that activations are rounded to; "" leaves them as they are.
        bits: of a weight.
        largest: the largest level of a weight, and the lowest without its sign.
        roundoff: the largest error of one rounding, over the largest value.
        block: consecutive inputs of an output that share a weight's scale; 0 for all of them.
        kept: how the weights of layers are stored that this would change too much; None leaves
            them as they are.
    """

    title: str
    weights: str
    activations: str
    bits: int
    largest: float
    roundoff: float
    block: int = 0
    kept: Quantization | None = None

    @property
    def integer(self) -> bool:
        """Whether levels are integers, at equal distances."""
        return self.weights.startswith("INT")


@dataclass(frozen=True)
class Precision:
    """What a bundle computes in.

    Attributes:
        name: as the command line calls it.
        check_tolerance: how far a graph's output may be from the reference's, of its norm, for a
            bundle to be written: whether graphs were written right. How close they are is
            `lpd-export verify`'s to say. FP32 and FP16 are some twenty to a thousand times their
            roundoff away in a deep model.
        support: by target.
        throughout: the type of all floats; None leaves it to the backend.
        quantization: of the decode graph's matrix products, if any.
        tokenizer: of the tokenizer's layers, if any.
        divergence: how far the decode graph's distributions may be from FP32's (mean KL of guided
            logits, in nats) when it is decided which of its layers are quantized.
    """

    name: str
    check_tolerance: float
    support: Mapping[Target, Support] = field(repr=False)
    throughout: FloatType | None = None
    quantization: Quantization | None = None
    tokenizer: Quantization | None = None
    divergence: float = 0.0

    def float_type(self, backend: str) -> FloatType:
        """The type of a graph's float inputs, outputs, caches and unquantized values."""
        return self.throughout or BACKENDS[backend].quantized_among

    @property
    def rounds_activations(self) -> bool:
        """Whether the decode graph's products are computed on rounded activations too."""
        return self.quantization is not None and bool(self.quantization.activations)

    def quantization_of(self, graph: str) -> Quantization | None:
        """How the layers of a graph are quantized, if they are."""
        return self.quantization if graph == "decode" else self.tokenizer

    @property
    def exact(self) -> bool:
        """Whether graphs stay as they are exported."""
        return self.throughout == FLOAT32

    @property
    def roundoff(self) -> float:
        """The relative error of one rounding, the coarsest there is."""
        if self.quantization:
            return self.quantization.roundoff
        assert self.throughout is not None
        return self.throughout.roundoff


# Three bits of mantissa: the largest two numbers, 416 and 448, are 32 apart.
FP8 = Quantization("FP8", "FLOAT8E4M3FN", "FLOAT8E4M3FN", bits=8, largest=448, roundoff=16 / 448)
# Blocks of 32: on a CPU, activations are rounded within a block too.
INT8_WEIGHTS = Quantization(
    "INT8 weights", "INT8", "", bits=8, largest=127, roundoff=1 / 254, block=32
)
INT8 = Quantization(
    "INT8", "INT8", "INT8", bits=8, largest=127, roundoff=1 / 254, kept=INT8_WEIGHTS
)
INT4_WEIGHTS = Quantization(
    "INT4 weights", "INT4", "", bits=4, largest=7, roundoff=1 / 14, block=64, kept=INT8_WEIGHTS
)
SLOW_ATTENTION = "attention is not fused in fp32: fp16 and bf16 are faster"
NO_FP8 = "ONNX Runtime has no kernels for fp8 products: use int8, or tensorrt or tensorrt-rtx"
WEIGHT_SUPPORT = {
    CPU: Support(note="products round activations to 8 bits, within blocks of the weights"),
    CUDA: Support("7.5"),
    TRT: Support("7.5"),
    RTX: Support("7.5"),
}

PRECISIONS = {
    row.name: row
    for row in (
        Precision(
            "fp32",
            check_tolerance=1e-4,
            throughout=FLOAT32,
            support={
                CPU: Support(),
                CUDA: Support("7.5"),
                TRT: Support("7.5", note=SLOW_ATTENTION),
                RTX: Support("7.5", note=SLOW_ATTENTION),
            },
        ),
        Precision(
            "bf16",
            check_tolerance=8e-2,
            throughout=BFLOAT16,
            support={
                CPU: Support(
                    refused="ONNX Runtime's CPU provider loads no bf16: use fp16, or tensorrt or "
                    "tensorrt-rtx"
                ),
                # Its Resize, which the tokenizer's decoder uses, has no kernel for bf16.
                CUDA: Support(
                    refused="ONNX Runtime's CUDA provider cannot decode images in bf16: use fp16, "
                    "or tensorrt"
                ),
                TRT: Support("8.0"),
                RTX: Support("8.0"),
            },
        ),
        Precision(
            "fp16",
            check_tolerance=1e-2,
            throughout=FLOAT16,
            support={
                CPU: Support(note="computed through casts to fp32: smaller than fp32, not faster"),
                CUDA: Support("7.5"),
                TRT: Support("7.5"),
                RTX: Support("7.5"),
            },
        ),
        Precision(
            "int8",
            check_tolerance=0.2,
            quantization=INT8,
            tokenizer=INT8,
            # Less than half of what is promised, so that other images hold it too, and about what
            # leaves 95 % of the most probable tokens of the demo as they are.
            divergence=0.007,
            support={
                CPU: Support(note="the fastest on a CPU"),
                CUDA: Support("7.5"),
                TRT: Support("7.5"),
                RTX: Support(
                    "8.0",
                    note="its documentation names INT8 for weights alone: INT8 activations "
                    "compile, how fast they run is documented nowhere, so measure against fp16",
                ),
            },
        ),
        Precision(
            "int8-weights",
            check_tolerance=0.2,  # its tokenizer is INT8
            quantization=INT8_WEIGHTS,
            # Its decoder takes half the time and a quarter of the room, and keeps 35 dB.
            tokenizer=INT8,
            # Of the weights alone it is a tenth of that; a CPU's kernels round activations as well.
            divergence=0.004,
            support=WEIGHT_SUPPORT,
        ),
        Precision(
            "int4-weights",
            check_tolerance=0.4,
            quantization=INT4_WEIGHTS,
            tokenizer=INT8,
            divergence=0.035,
            support=WEIGHT_SUPPORT,
        ),
        Precision(
            "fp8",
            check_tolerance=0.4,
            quantization=FP8,
            # Its tokenizer is FP16: an edit keeps its tokens.
            divergence=0.03,
            support={
                CPU: Support(refused=NO_FP8),
                CUDA: Support(refused=NO_FP8),
                TRT: Support("8.9"),
                RTX: Support("8.9"),
            },
        ),
    )
}
QUANTIZED = tuple(name for name, row in PRECISIONS.items() if row.quantization)
ROUNDING_ACTIVATIONS = tuple(name for name, row in PRECISIONS.items() if row.rounds_activations)
