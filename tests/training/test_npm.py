"""Packages of the npm registry, from a registry on this machine."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lpd_export.errors import UserError
from training.npm import Package, check_integrity, fetch, read_member

NAME = "@artist/icons"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """The files of a registry with one package, and an empty folder beside it."""
    folder = tmp_path / "registry" / NAME / "-"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "icons-1.0.0.tgz", "w:gz") as archive:
        info = tarfile.TarInfo("package/icons.json")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"{}"))
    (tmp_path / "downloads").mkdir()
    return tmp_path / "registry"


@pytest.fixture
def package(registry: Path) -> Package:
    digest = hashlib.sha512((registry / NAME / "-" / "icons-1.0.0.tgz").read_bytes()).digest()
    return Package(NAME, "1.0.0", "sha512-" + base64.b64encode(digest).decode())


@pytest.fixture
def served(registry: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of that registry, which is the environment's; npm is not installed."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(Quiet, directory=str(registry))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("npm_config_registry", f"{address}/")
        yield address
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_a_package_comes_from_the_registry_of_the_environment(
    package: Package, served: str, tmp_path: Path
) -> None:
    path = fetch(package, tmp_path / "downloads")
    check_integrity(package, path)
    assert path == tmp_path / "downloads" / "artist-icons-1.0.0.tgz"
    assert read_member(path, "icons.json") == b"{}"
    with pytest.raises(UserError, match=rf"{path} holds no emoji.json"):
        read_member(path, "emoji.json")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=rf"{path} is not the published @artist/icons 1.0.0"):
        check_integrity(package, path)


def test_what_the_registry_has_not_is_said(package: Package, served: str, tmp_path: Path) -> None:
    missing = Package(NAME, "2.0.0", package.integrity)
    address = f"{served}/@artist/icons/-/icons-2.0.0.tgz"
    with pytest.raises(UserError, match=rf"cannot fetch {address} .*404.*--tarballs"):
        fetch(missing, tmp_path / "downloads")


def test_a_missing_tarball_is_named(package: Package, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*icons.tgz: No such file"):
        check_integrity(package, tmp_path / "icons.tgz")


def test_what_npm_says_is_passed_on(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho "npm warn old" >&2; echo "npm error code E404" >&2; exit 1\n')
    npm.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(npm))
    expected = r"cannot fetch artist-icons-1.0.0.tgz with npm \(code E404\); fetch it"
    with pytest.raises(UserError, match=expected):
        fetch(package, tmp_path)
