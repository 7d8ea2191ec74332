"""What an ONNX file may say: weights in the files beside it, and names that can be printed.

Knows ONNX's file format, not what a graph computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import onnx

from lpd_export.bounds import UNPRINTABLE
from lpd_export.errors import UserError


def check_graph_file(path: Path, beside: Collection[str]) -> None:
    """Raises UserError unless an ONNX file's weights are in itself or in the files `beside` it.

    Wherever they are named: in subgraphs, functions and attributes too. A name or a place with
    control characters is refused.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's, which is no dependency of ours
        raise UserError(f"{path} is not an ONNX file: build the bundle again") from error
    for message in _messages(model):
        for field, value in message.ListFields():
            texts = value if field.type == field.TYPE_STRING else ()
            for text in [texts] if isinstance(texts, str | bytes) else texts:
                # Protobuf gives the bytes of what is no text.
                if isinstance(text, bytes) or UNPRINTABLE.search(text):
                    raise UserError(
                        f"{path} holds control characters, which no build writes: {text[:80]!a}; "
                        "do not use this bundle"
                    )
        if isinstance(message, onnx.TensorProto):
            for entry in message.external_data:
                if entry.key == "location" and entry.value not in beside:
                    raise UserError(
                        f"{path} keeps weights in {entry.value!a}, which is not a file of the "
                        "bundle beside it: do not use this bundle"
                    )


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all those in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)
