"""Shards and merging: any split gives the files of one process."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from commandline import answer, mistake
from lpd_export.errors import UserError
from lpd_export.run_request import read_shard


def content(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file()
    }


def make(bundle: Path, out: Path, *options: object) -> None:
    asked = ["--class", "all", "-n", 3, "--per-file", 4, "--keep-going", *options]
    said = answer("run", bundle, *asked, "--out", out)
    assert said.code == 0, said


@pytest.mark.parametrize("kind", ["png", "tar", "npz"])
def test_any_split_gives_the_same(broken_bundle: Path, tmp_path: Path, kind: str) -> None:
    """Images that fail are among them."""
    make(broken_bundle, tmp_path / "whole", "--format", kind)
    whole = content(tmp_path / "whole")
    for shards in (2, 4, 20):  # the last has empty ones
        out, merged = tmp_path / f"of_{shards}", tmp_path / f"merged_{shards}"
        for number in reversed(range(shards)):
            make(broken_bundle, out, "--format", kind, "--shard", f"{number}/{shards}")
        said = answer("merge", out, "--out", merged)
        assert said.out == f"12 images of {shards} shards in {merged}; 3 failed\n"
        assert content(merged) == whole
    # Half a merge goes on.
    lines = (merged / "images.jsonl").read_bytes().splitlines(keepends=True)
    (merged / "images.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    (merged / "failures.jsonl").unlink()
    assert answer("merge", out, "--out", merged).code == 0
    assert content(merged) == whole


def test_a_record_of_a_shard_leads_nowhere_else(small_bundle: Path, tmp_path: Path) -> None:
    make(small_bundle, tmp_path / "whole")
    make(small_bundle, tmp_path / "a", "--shard", "0/1")
    path = tmp_path / "a" / "shard_0_of_1" / "images.jsonl"
    path.write_text(path.read_text().replace('"file": "', '"file": "../../../secret/'))
    assert answer("merge", tmp_path / "a", "--out", tmp_path / "merged").code == 0
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


@pytest.mark.model
def test_shards_that_are_no_whole(small_bundle: Path, tmp_path: Path) -> None:
    out, merged = tmp_path / "a", tmp_path / "merged"
    assert mistake("merge", out, "--out", merged) == (
        f"{out} holds no shards: give the --out of runs with --shard"
    )
    make(small_bundle, out, "--shard", "1/2")
    assert f"shard 0 of 2 is missing in {out}: " in mistake("merge", out, "--out", merged)
    make(small_bundle, out, "--shard", "0/2")
    before = (out / "shard_0_of_2/images.jsonl").read_bytes()
    (out / "shard_0_of_2/images.jsonl").write_bytes(before[:-5])
    assert mistake("merge", out, "--out", merged) == (
        f"{out}/shard_0_of_2 is not whole: 1 of its 7 images are missing; the command that made "
        "the others makes them"
    )
    far = before.replace(b'"position": 6,', b'"position": 9,')
    (out / "shard_0_of_2/images.jsonl").write_bytes(far)
    assert mistake("merge", out, "--out", merged) == (
        f"{out}/shard_0_of_2/images.jsonl, line 7: image 9 is not of this shard"
    )
    (out / "shard_0_of_2/images.jsonl").write_bytes(before)
    (out / "shard_0_of_2/failures.jsonl").write_text('{"position": 6}\n')
    assert "failures.jsonl, line 1: not a record of `lpd-export run` (index: " in mistake(
        "merge", out, "--out", merged
    )
    (out / "shard_0_of_2/failures.jsonl").unlink()
    make(small_bundle, out, "--shard", "0/2")
    assert (out / "shard_0_of_2/images.jsonl").read_bytes() == before
    shutil.copy(out / "shard_0_of_2/shard.json", tmp_path)
    (out / "shard_0_of_2/shard.json").write_text("{}")
    assert "is no shard of a run: shard.json is missing or damaged" in mistake(
        "merge", out, "--out", merged
    )
    other = (tmp_path / "shard.json").read_text().replace('"images": 15', '"images": 16')
    (out / "shard_0_of_2/shard.json").write_text(other)
    assert "is of another run than the others" in mistake("merge", out, "--out", merged)
    assert not merged.exists()


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("3/8", {}, (3, 8)),
        ("auto", TORCHRUN, (3, 8)),
        ("auto", TORCHRUN | ARRAY, (3, 8)),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_MIN": "4"}, (3, 4)),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}, (3, 4)),
        ("8/8", {}, "--shard 8/8: of N shards, I is from 0 to N - 1"),
        ("0/0", {}, "--shard 0/0: of N shards"),
        ("auto", ARRAY, "--shard 7/4: of N shards"),
        ("auto", {"RANK": "3"}, "--shard auto reads RANK and WORLD_SIZE, or"),
        ("auto", TORCHRUN | {"RANK": "x"}, "RANK must be a whole number, but it is 'x'"),
    ],
)
def test_which_shard_is_meant(
    monkeypatch: pytest.MonkeyPatch, text: str, environment: dict[str, str], shard: object
) -> None:
    for name in (*TORCHRUN, *ARRAY, "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(shard, tuple):
        assert read_shard(text) == shard
    else:
        with pytest.raises(UserError) as told:
            read_shard(text)
        assert str(shard) in str(told.value)
