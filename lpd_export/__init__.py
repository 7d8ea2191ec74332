"""lpd-export: LPD image generators as ONNX graphs and engines, and a runtime that drives them.

from lpd_export import Pipeline

images = Pipeline.open("engines/demo").generate(["heart", "clock"], seed=0)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lpd_export.errors import UserError

if TYPE_CHECKING:
    from lpd_export.runtime.pipeline import Pipeline
    from lpd_export.runtime.requests import ImageRequest
    from lpd_export.runtime.sampler import Sampling

__all__ = ["ImageRequest", "Pipeline", "Sampling", "UserError"]
__version__ = version("lpd-export")

_MODULES = {"ImageRequest": "requests", "Pipeline": "pipeline", "Sampling": "sampler"}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: they bring torch, which `lpd-export --help` should not wait for.
    if name in _MODULES:
        return getattr(import_module(f"lpd_export.runtime.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
