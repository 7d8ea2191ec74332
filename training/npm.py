"""Packages of the npm registry: fetched, and taken only with the hash that is expected.

Knows npm's names, its command where it is installed and its registry where it is not. It does not
know what a package holds.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from lpd_export.errors import UserError

DEFAULT_REGISTRY = "https://registry.npmjs.org"
DOWNLOAD_SECONDS = 120
BY_HAND = "fetch it on another machine and give its folder as --tarballs"


@dataclass(frozen=True)
class Package:
    """A published version of a package."""

    name: str
    """With its scope, such as `@iconify-json/noto`."""
    version: str
    integrity: str
    """As npm writes it: `sha512-` and the digest in base64."""

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def address(self, registry: str) -> str:
        """Where a registry has the tarball."""
        return f"{registry}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball, downloaded into `folder`; its hash is not checked.

    Raises:
        UserError: if it cannot be had.
    """
    npm = shutil.which("npm")
    if npm is None:
        return download(package, folder)
    # npm knows the user's registry, proxy and login.
    command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        reason = words[0].removeprefix("npm error ") if words else f"exit code {done.returncode}"
        raise UserError(f"cannot fetch {package.tarball} with npm ({reason}); {BY_HAND}")
    return folder / package.tarball


def download(package: Package, folder: Path) -> Path:
    """The package's tarball from the registry of the environment, or npm's default one."""
    # npm takes its variables in either case.
    environment = {name.upper(): value for name, value in os.environ.items()}
    registry = (environment.get("NPM_CONFIG_REGISTRY") or DEFAULT_REGISTRY).rstrip("/")
    address = package.address(registry)
    path = folder / package.tarball
    try:
        with (
            urllib.request.urlopen(address, timeout=DOWNLOAD_SECONDS) as answer,
            open(path, "wb") as file,
        ):
            shutil.copyfileobj(answer, file)
    # Addresses that are none are a ValueError, a connection that breaks an HTTPException.
    except Exception as error:
        raise UserError(f"cannot fetch {address} ({error}); {BY_HAND}") from error
    return path


def check_integrity(package: Package, path: Path) -> None:
    """Raises UserError unless the tarball is the published one."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; leave --tarballs out to download it"
        ) from error
    integrity = "sha512-" + base64.b64encode(digest).decode()
    if integrity != package.integrity:
        raise UserError(
            f"{path} is not the published {package.name} {package.version}: its hash is "
            f"{integrity[:20]}..., not {package.integrity[:20]}...; fetch it again"
        )


def read_member(tarball: Path, name: str) -> bytes:
    """A file of a package, by its path below `package/`.

    Raises:
        UserError: if the package has no such file.
    """
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            content = archive.extractfile(f"package/{name}")
            assert content is not None
            return content.read()
    except KeyError as error:
        raise UserError(f"{tarball} holds no {name}") from error
