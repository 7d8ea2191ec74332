"""What the generator asks of a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from lpd_export.runtime.arrays import Array, Arrays

Run = Callable[[], None]


class Executor(Protocol):
    """Runs the graphs of one bundle on one device.

    An executor binds arrays by address: it neither copies nor allocates what it is given, and
    a cache bound as input and output at once is updated in place.
    """

    @property
    def arrays(self) -> Arrays:
        """Makes the arrays that can be bound."""

    @property
    def device(self) -> str:
        """Where they lie: "cpu", "cuda" or "cuda:1"."""

    @property
    def float_type(self) -> str:
        """The type of the graphs' float inputs and outputs, all but the logits (float32)."""

    @property
    def records(self) -> bool:
        """Whether `record` gives a recording; work that is replayed cannot tell its progress."""

    def stream(self) -> AbstractContextManager[None]:
        """Inside, array operations and bound graphs are launched in order of one stream."""

    def record(self, work: Run) -> Run:
        """A call that repeats all that `work` launches on the device, in one launch.

        `work` must look at no value and always use the same arrays. Where the device has no
        recordings this is `work` itself.
        """

    def load(self, *graphs: str) -> None:
        """Makes graphs ready now rather than when they are first bound."""

    def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
        """A call that runs `graph` once over these very arrays, inputs and outputs by name.

        The arrays must be contiguous; the call keeps them alive, and raises GraphError if the
        graph fails on what they hold, UserError if memory does not suffice.
        """


class ExecutorAround:
    """Another executor, for subclasses that come between it and its graphs in `bind`.

    It records nothing: in a recording, nothing happens between two graphs.
    """

    records = False

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.arrays, self.device = executor.arrays, executor.device
        self.float_type = executor.float_type

    def stream(self) -> AbstractContextManager[None]:
        """As of the other."""
        return self._executor.stream()

    def load(self, *graphs: str) -> None:
        """Loads them in the other."""
        self._executor.load(*graphs)

    def record(self, work: Run) -> Run:
        """`work` itself."""
        return work
