"""`lpd-export` as a user runs it: in a process of its own, or faster in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import exported
from lpd_export.cli.main import main

COMMAND = Path(sys.executable).with_name("lpd-export")


class Answer(NamedTuple):
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def answer(*arguments: object) -> Answer:
    """Runs a command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Answer(code, out.getvalue(), err.getvalue())


def mistake(*arguments: object) -> str:
    """The one sentence that answers a wrong command."""
    return sentence(answer(*arguments))


def sentence(said: Answer) -> str:
    """The error of an answer, which must be one line, the last one, with exit code 2."""
    assert said.code == 2, said
    assert said.out == ""
    *before, last = said.err.splitlines()
    assert last.startswith("lpd-export: error: ")
    assert not any("error" in line or "Traceback" in line for line in before), said.err
    return last.removeprefix("lpd-export: error: ")


def start(
    *arguments: object,
    both: bool = False,
    env: Mapping[str, str] = os.environ,
    exports: Path | None = None,
    **settings: object,
) -> subprocess.Popen[str]:
    """A command in a process of its own, its standard error to be read line by line.

    `both` leads standard error to standard output, as `2>&1` does. With a folder of `exports` a
    build takes graphs from it, or leaves them there.
    """
    command = [COMMAND] if exports is None else [sys.executable, exported.__file__, exports]
    return subprocess.Popen(
        [str(word) for word in (*command, *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE,
        text=True,
        # The number of terminal columns must not change what a test sees.
        env={**env, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"},
        **settings,  # type: ignore[call-overload]
    )


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    """Reads standard error up to the line that begins with these words, and gives it."""
    assert process.stderr is not None
    read = []
    for line in process.stderr:
        read.append(line)
        if line.startswith(words):
            return line
    raise AssertionError(f"{words!r} was never said: {''.join(read)}")


def children(root: int) -> dict[int, str]:
    """All processes below one, with their command lines."""
    parents, commands = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            command = path.joinpath("cmdline").read_text()
        except OSError:  # it has just ended
            continue
        parents[int(path.name)], commands[int(path.name)] = parent, command

    def below(process: int) -> bool:
        return process == root or (process in parents and below(parents[process]))

    return {process: command for process, command in commands.items() if below(process)}


def end(process: subprocess.Popen[str]) -> Answer:
    out, err = process.communicate(timeout=300)
    return Answer(process.returncode, out, err)


def entries(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too, as relative paths."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
