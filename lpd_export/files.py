"""Files that are whole or not there."""

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

from lpd_export.errors import UserError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all: under a temporary name beside it, then renamed.

    Raises UserError if it cannot be written; then nothing is left behind, and a file that was
    there before is untouched.
    """
    path = Path(path)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; check that its folder exists and is "
            "writable"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
