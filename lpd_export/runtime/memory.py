"""Is there room for a batch? Knows what a device has free, not what is generated."""

from __future__ import annotations

from lpd_export.errors import UserError
from lpd_export.machine.facts import read_memory
from lpd_export.runtime.arrays import HOST


def check_memory(batch: int, needed: int, held: int, device: str) -> None:
    """Raises UserError if the buffers of a batch of this size do not fit.

    Args:
        batch: images generated together.
        needed: bytes of their buffers.
        held: bytes of buffers that are used again, or freed before there are others.
        device: where they lie.
    """
    free = free_memory(device)
    if free is not None and needed > free + held:
        raise UserError(
            f"a batch of {batch} needs {needed / 1e9:.1f} GB for its caches and logits alone, "
            f"and {(free + held) / 1e9:.1f} GB are free: use a smaller batch"
        )


def free_memory(device: str) -> int | None:
    """Free bytes of a device's memory, where the system tells them.

    Blocks that torch keeps for its next tensors count as free.
    """
    if device == HOST:
        return read_memory().free
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
