"""A schedule, group sizes and the orders that share them, and the files that hold one.

Reads and writes `.npz`, and reads the authors' JSON lists of orders. How orders are made is in
`orders`, what follows from group sizes in `phases`.
"""

import io
import json
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpd_export.bounds import Natural, Positive, Seed, checked
from lpd_export.errors import UserError
from lpd_export.files import read_file, write_atomically
from lpd_export.schedule.orders import KINDS, checked_orders, make_orders
from lpd_export.schedule.phases import checked_sizes, group_sizes

FOREIGN = "foreign"
"""The kind of orders read from a bare JSON list, which does not say how they were made."""
_MOST_BYTES = 2**28  # of an array in a file: 65,536 orders of a 32x32 grid
_MOST_FILE_BYTES = 2**29  # the authors' JSON takes up to 6 bytes where the array takes 4


@dataclass(frozen=True, eq=False)
class Schedule:
    """Group sizes and the orders that share them; valid by construction, and read-only.

    `group_sizes` [K] int32 and `orders` [N, S] int32, each row a permutation of the S raster
    indices. `kind` is one of KINDS, or FOREIGN for orders of unknown making; `repulsion`,
    `proximity` and `seed` say how the orders were made, and are None where that means nothing.

        schedule = Schedule.make(grid=16, steps=20)
        schedule.save("orders.npz")
        Schedule.load("orders.npz").check_grid(16)

    Raises UserError for sizes or orders that are not a schedule, saying which and why.
    """

    group_sizes: NDArray[np.int32]
    orders: NDArray[np.int32]
    kind: str
    repulsion: int | None = None
    proximity: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, FOREIGN):
            raise UserError(
                f"there is no order kind {self.kind!r}: it is one of {', '.join(KINDS)}, "
                f"or {FOREIGN} for orders of unknown making"
            )
        checked("the repulsion threshold", self.repulsion, Natural | None)
        checked("the proximity threshold", self.proximity, float | None)
        checked("the seed", self.seed, Seed | None)
        orders = checked_orders(self.orders)
        sizes = checked_sizes(self.group_sizes, orders.shape[1])
        for name, array in (("group_sizes", sizes), ("orders", orders)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def cells(self) -> int:
        """S: the cells of the grid."""
        return int(self.orders.shape[1])

    @property
    def grid(self) -> int:
        """The side of the grid, in cells."""
        return math.isqrt(self.cells)

    @property
    def steps(self) -> int:
        """K: the steps in which an image is generated."""
        return len(self.group_sizes)

    @property
    def count(self) -> int:
        """N: how many orders there are to choose from."""
        return len(self.orders)

    @classmethod
    def make(
        cls,
        grid: int,
        steps: int,
        kind: str = "locality",
        repulsion: int = 2,
        proximity: float = 1.0,
        count: int = 64,
        seed: int = 0,
    ) -> "Schedule":
        """A new schedule of `count` orders; the same arguments always give the same one.

        Raises UserError for an argument out of its range.
        """
        sizes = group_sizes(checked("the grid", grid, Positive) ** 2, steps)
        orders = make_orders(grid, sizes, kind, count, seed, repulsion, proximity)
        return cls(
            group_sizes=sizes,
            orders=orders,
            kind=kind,
            repulsion=repulsion if kind == "locality" else None,
            proximity=float(proximity) if kind == "locality" else None,
            seed=None if kind == "raster" else seed,
        )

    def check_grid(self, grid: int) -> None:
        """Raises UserError unless this schedule is for a model of this grid."""
        if grid != self.grid:
            raise UserError(
                f"the schedule is for a {self.grid}x{self.grid} grid, the model's is "
                f"{grid}x{grid}: give a schedule made for the model's resolution"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the schedule as .npz, whole or not at all; the same schedule, the same bytes.

        Raises UserError if the file cannot be written.
        """
        meta = {
            "kind": self.kind,
            "grid": self.grid,
            "repulsion": self.repulsion,
            "proximity": self.proximity,
            "seed": self.seed,
        }
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            group_sizes=self.group_sizes,
            orders=self.orders,
            meta=np.array(json.dumps(meta)),
        )
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str], steps: int | None = None) -> "Schedule":
        """Reads a schedule: an .npz that `save` wrote, or a JSON list of orders.

        A JSON list says nothing of groups, so it takes its sizes from `steps`; for an .npz, `steps`
        may be left out and has to agree where given. Raises UserError if the file is missing,
        damaged, something else, or at odds with `steps`.
        """
        path = Path(path)
        content = read_file(path, "the schedule", _MOST_FILE_BYTES)
        read = cls._from_npz if content.startswith(b"PK") else cls._from_json
        try:
            return read(content, steps)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error.__cause__

    @classmethod
    def _from_npz(cls, content: bytes, steps: int | None) -> "Schedule":
        try:
            _check_headers(content)
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                sizes, orders = archive["group_sizes"], archive["orders"]
                meta = json.loads(str(archive["meta"]))
            grid = meta.pop("grid")
            schedule = cls(sizes, orders, **meta)
        except UserError:
            raise
        except Exception as error:  # a damaged archive fails in zipfile, zlib, NumPy or json
            raise UserError(
                "this .npz is damaged or not a schedule (a schedule holds group_sizes, orders "
                "and meta): make it again with `lpd-export schedule make`"
            ) from error
        if grid != schedule.grid:
            raise UserError(
                f"its meta says a grid of {grid}, its orders are for {schedule.grid}: the file "
                "was altered; make it again with `lpd-export schedule make`"
            )
        if steps is not None and steps != schedule.steps:
            raise UserError(
                f"this schedule has {schedule.steps} steps, but --steps {steps} was asked for: "
                f"leave --steps out, or make a schedule of {steps} steps"
            )
        return schedule

    @classmethod
    def _from_json(cls, content: bytes, steps: int | None) -> "Schedule":
        try:
            listed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(
                "this is neither an .npz schedule nor a complete JSON list of orders: give a file "
                "from `lpd-export schedule make`, or the authors' JSON"
            ) from error
        try:
            orders = np.array(listed)
        except (ValueError, OverflowError) as error:
            raise UserError("a JSON schedule must be a list of equally long orders") from error
        orders = checked_orders(orders)
        if steps is None:
            raise UserError(
                "a JSON list of orders does not say in how many steps they are generated: pass "
                "--steps, the number in the file's name (20 for res256_steps20_repulsion2.json)"
            )
        return cls(group_sizes(orders.shape[1], steps), orders, FOREIGN)


def _check_headers(content: bytes) -> None:
    """Raises UserError for arrays that no schedule has, before memory is taken for them.

    A damaged archive raises what zipfile and NumPy raise.
    """
    headers = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in ("group_sizes", "orders", "meta"):
            member = archive.getinfo(f"{name}.npy")
            # Nobody's header is long; NumPy would read a gigabyte of one before it says so.
            if member.file_size > _MOST_BYTES + 2**16:
                raise UserError(
                    f"its {name} take {member.file_size / 1e9:.3g} GB, a schedule's at most "
                    f"{_MOST_BYTES / 1e9:.2g} GB: make it again with fewer orders"
                )
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
                headers[name] = shape, dtype.itemsize * math.prod(shape)
    for name, (shape, size) in headers.items():
        if size > _MOST_BYTES:
            raise UserError(
                f"its {name} of shape {list(shape)} take {size / 1e9:.3g} GB, a schedule's "
                f"at most {_MOST_BYTES / 1e9:.2g} GB: make it again with fewer orders"
            )
