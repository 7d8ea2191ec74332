"""TensorRT and TensorRT-RTX: engines run by address, and a whole generation as one CUDA graph.

Knows the half of their API that runs engines, which the two share, and torch's CUDA streams and
graphs. Does not build engines, know what they compute, or see a value that they compute; how they
are loaded is in `tensorrt_engine`. What TensorRT-RTX has of its own (kernels compiled on this GPU,
and a cache of them) is in the functions that ask for it with `hasattr`.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpd_export.errors import GraphError, UserError
from lpd_export.files import write_atomically
from lpd_export.runtime.arrays import arrays_of
from lpd_export.runtime.executor import Run
from lpd_export.runtime.tensorrt_engine import (
    ShapeRange,
    choose_profile,
    deserialize,
    explain,
    find_gpu,
    first_line,
    import_tensorrt,
    make_logger,
    open_runtime,
)

TORCH_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
}
"""By the name of TensorRT's DataType."""
ALIGNMENT = 256
"""Bytes that TensorRT wants addresses to be multiples of."""


class TensorRTExecutor:
    """An executor over TensorRT engine files, each loaded when it is first bound.

    All contexts work in one buffer: graphs run one after another, in order of one stream. Calls
    from `bind` are enqueued on torch's current stream, which inside `stream` is a side stream.

    Args:
        engines: the engine file of each graph.
        float_type: of the graphs.
        backend: "tensorrt" or "tensorrt-rtx".
        device: "cuda", or with an index.
        runtime_cache: where TensorRT-RTX finds and leaves the kernels that it compiles here.

    Raises:
        UserError: if the backend's module is not installed, or torch cannot use the GPU.
    """

    def __init__(
        self,
        engines: Mapping[str, Path],
        float_type: str = "float16",
        backend: str = "tensorrt",
        device: str = "cuda",
        runtime_cache: Path | None = None,
    ) -> None:
        self.trt = import_tensorrt(backend)
        self.device = str(find_gpu(device))
        self.arrays = arrays_of(self.device)
        self.float_type = float_type
        self.records = True  # until a capture fails
        self.logger = make_logger(self.trt)
        self._engine_files = dict(engines)
        self._runtime_cache_file = runtime_cache
        self._cache: Any = None
        self._engines: dict[str, Any] = {}
        self._bindings: weakref.WeakSet[Binding] = weakref.WeakSet()
        self._memory = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._side_stream = torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device):
            self._runtime = open_runtime(self.trt, self.logger)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        caller = torch.cuda.current_stream(self.device)
        self._side_stream.wait_stream(caller)
        with torch.cuda.stream(self._side_stream):
            yield
        caller.wait_stream(self._side_stream)

    def load(self, *graphs: str) -> None:
        """See `Executor`.

        Raises:
            UserError: if an engine does not load on this GPU with the installed version.
        """
        for graph in graphs:
            self._loaded(graph)

    def _loaded(self, graph: str) -> Any:
        """The ICudaEngine of a graph.

        Raises:
            UserError: if it does not load on this GPU with the installed version.
        """
        if graph not in self._engines:
            with torch.cuda.device(self.device):
                name = torch.cuda.get_device_name(self.device)
                path = self._engine_files[graph]
                engine = deserialize(self.trt, self._runtime, self.logger, path, name)
            self._engines[graph] = engine
        return self._engines[graph]

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Run:
        """See `Executor`.

        Raises:
            UserError: if the engine does not load, takes no tensors of these names, types and
                shapes, does not update in place what is bound as input and output at once, or
                the GPU's memory is too small.
        """
        engine = self._loaded(graph)
        with torch.cuda.device(self.device):
            binding = Binding(self, graph, engine, tensors)
            needed = binding.open(self._runtime_config(engine))
            if needed > self._memory.numel():
                try:
                    self._memory = torch.empty(needed, dtype=torch.uint8, device=self.device)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"the GPU has no {needed / 2**20:.0f} MiB free for the {graph} "
                        "engine to work in: use a smaller --batch, or end what else runs on it"
                    ) from error
                for other in self._bindings:
                    other.use(self._memory)
            binding.use(self._memory)
        self._bindings.add(binding)
        return binding

    def _runtime_config(self, engine: Any) -> Any:
        """How a context of the engine is to run."""
        trt = self.trt
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if hasattr(trt, "CudaGraphStrategy"):
            # Its own graphs, one a context, would be captured inside ours of all contexts.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            # Shapes are few and fixed, and a kernel that came later would miss the recording.
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            if self._cache is None:
                self._cache = load_cache(config, self._runtime_cache_file)
            config.set_runtime_cache(self._cache)
        return config

    def record(self, work: Run) -> Run:
        """One CUDA graph of all that `work` launches, kernels of TensorRT and torch alike.

        Where that is not possible this is `work` itself; a RuntimeWarning then says why, and
        `records` turns False.
        """
        # At a first run TensorRT still sets itself up for the shapes, and RTX compiles.
        work()
        self._save_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            for binding in self._bindings:
                binding.check_capturable(self._side_stream)
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(
                graph, stream=self._side_stream, capture_error_mode="thread_local"
            ):
                work()
        except (RuntimeError, UserError) as error:
            reason = first_line(cause_of_failed_capture(error))
            self.records = False
            warnings.warn(
                "images are generated step by step instead of with one launch of a CUDA graph, "
                f"which takes longer: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return work
        return partial(_replay, graph, (work, self._memory))

    def _save_cache(self) -> None:
        """Leaves TensorRT-RTX's compiled kernels for the next process."""
        if self._cache is None or self._runtime_cache_file is None:
            return
        try:
            save_kernels(self._runtime_cache_file, bytes(self._cache.serialize()))
        except (OSError, UserError) as error:
            warnings.warn(f"the next start is not faster: {error}", RuntimeWarning, stacklevel=3)


def save_kernels(path: Path, kernels: bytes) -> None:
    """Writes compiled kernels whole; makes the folder, which a new user does not have.

    Raises:
        UserError, OSError: if they cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, kernels)


def _replay(
    graph: torch.cuda.CUDAGraph,
    recorded: tuple[Run, Tensor],  # referred to by address alone, and so kept alive here
) -> None:
    graph.replay()


class Binding:
    """One execution context over fixed tensors, and the call that enqueues it."""

    def __init__(
        self, executor: TensorRTExecutor, graph: str, engine: Any, tensors: Mapping[str, Tensor]
    ) -> None:
        self._context: Any = None  # the first attribute, so that it goes before what it uses
        self._config: Any = None
        self._executor = executor
        self.graph = graph
        self.engine = engine
        self._tensors = dict(tensors)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._check({name: engine.get_tensor_dtype(name).name for name in names})
        mode = executor.trt.TensorIOMode.INPUT
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode]
        self._check_in_place([name for name in names if name not in inputs])
        self._shapes = {name: tuple(tensors[name].shape) for name in inputs}
        profiles = [
            {name: ShapeRange(*engine.get_tensor_profile_shape(name, index)) for name in inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        self._profile = choose_profile(graph, profiles, self._shapes)

    def _check(self, types: Mapping[str, str]) -> None:
        """Raises UserError unless the engine's tensors, by type, are those given."""
        for name in sorted(types.keys() ^ self._tensors.keys()):
            raise UserError(
                f"the {self.graph} engine has {'a' if name in types else 'no'} tensor {name}, "
                "unlike this version of lpd-export: build the bundle again"
            )
        for name, tensor in self._tensors.items():
            assert tensor.is_contiguous(), name
            assert tensor.data_ptr() % ALIGNMENT == 0, name
            if TORCH_TYPES.get(types[name]) != tensor.dtype:
                raise UserError(
                    f"the {self.graph} engine's {name} is {types[name]}, where the runtime has "
                    f"{tensor.dtype}: build the bundle again"
                )

    def _check_in_place(self, outputs: Sequence[str]) -> None:
        """Raises UserError unless the engine updates in place what shares its address, no more."""
        for name in outputs:
            address = self._tensors[name].data_ptr()
            shared = [
                other
                for other, tensor in self._tensors.items()
                if other != name and tensor.data_ptr() == address
            ]
            updated = self.engine.get_aliased_input_tensor(name)
            if shared != ([updated] if updated else []):
                raise UserError(
                    f"the {self.graph} engine writes {name} over {updated or 'no input'}, where "
                    f"the runtime shares it with {', '.join(shared) or 'none'}: build the bundle "
                    "again"
                )

    def open(self, config: Any) -> int:
        """Makes the context anew; returns the bytes that it needs for its activations."""
        context = self.engine.create_execution_context(runtime_config=config)
        stream = torch.cuda.current_stream(self._executor.device).cuda_stream
        if (
            context is None
            or not context.set_optimization_profile_async(self._profile, stream)
            or not all(context.set_input_shape(name, s) for name, s in self._shapes.items())
            or not all(
                context.set_tensor_address(name, tensor.data_ptr())
                for name, tensor in self._tensors.items()
            )
        ):
            raise UserError(f"the {self.graph} engine cannot be set up: {self._reason()}")
        self._context, self._config = context, config
        needed = context.update_device_memory_size_for_shapes()
        # 0 is TensorRT's answer to an error too, and then its log says what it was.
        if needed == 0 and (said := self._executor.logger.take()):
            raise UserError(f"the {self.graph} engine cannot be set up: {explain(said)}")
        return needed

    def use(self, memory: Tensor) -> None:
        """Gives the context the buffer to work in."""
        self._context.set_device_memory(memory.data_ptr(), memory.numel())

    def profile(self, tell: Callable[[str, float], None]) -> None:
        """Has every run tell the milliseconds of each layer by its name, and wait for the end."""
        base: Any = self._executor.trt.IProfiler

        class Profiler(base):
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                tell(layer_name, ms)

        self._context.profiler = self._profiler = Profiler()  # TensorRT does not keep it alive
        self._context.enqueue_emits_profile = True

    def check_capturable(self, stream: torch.cuda.Stream) -> None:
        """Raises UserError if TensorRT-RTX says that the context cannot be captured."""
        context = self._context
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(
            stream.cuda_stream
        ):
            raise UserError(f"TensorRT-RTX cannot capture the {self.graph} engine")

    def __call__(self) -> None:
        stream = torch.cuda.current_stream(self._executor.device).cuda_stream
        if not self._context.execute_async_v3(stream):
            raise GraphError(f"the {self.graph} engine cannot be launched: {self._reason()}")

    def _reason(self) -> str:
        return explain(self._executor.logger.take())


def load_cache(config: Any, path: Path | None) -> Any:
    """TensorRT-RTX's cache of compiled kernels, filled from a file if there is a fitting one."""
    cache = config.create_runtime_cache()
    if path is not None and path.is_file():
        # One of another GPU, driver or version is refused, and replaced at the next save.
        with contextlib.suppress(OSError):
            cache.deserialize(path.read_bytes())
    return cache


def cause_of_failed_capture(error: BaseException) -> BaseException:
    """What broke a capture into a CUDA graph, for launching step by step to be the answer.

    Raises:
        UserError: if memory ran out, which launching step by step would not help.
    """
    # Ending a capture that something broke raises an error of its own, after the cause.
    cause = error.__context__ or error
    if any(isinstance(one, torch.OutOfMemoryError) for one in (error, cause)):
        raise UserError(
            "the GPU has too little free memory to record the generation as a CUDA graph: use a "
            "smaller --batch, or end what else runs on it"
        ) from error
    return cause
