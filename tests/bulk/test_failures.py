"""Images whose logits are not finite: they are named, and the others are what they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from commandline import answer, mistake
from lpd_export import Pipeline
from lpd_export.bulk.making import make_images
from lpd_export.bulk.plan import make_plan
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.run_request import RECORDS, RunRequest

pytestmark = pytest.mark.model


def tokens(out: Path) -> dict[int, list[int]]:
    rows = map(json.loads, (out / RECORDS).read_text().splitlines())
    return {row["position"]: row["token_ids"] for row in rows}


@pytest.mark.parametrize("kind", ["png", "tar", "npz"])
def test_an_image_that_fails(
    small_bundle: Path, broken_bundle: Path, tmp_path: Path, kind: str
) -> None:
    asked = ["--class", "all", "-n", 2, "--batch", 5, "--format", kind]
    assert answer("run", small_bundle, *asked, "--out", tmp_path / "whole").code == 0
    whole = tokens(tmp_path / "whole")
    told = (
        "image 3 (Crane, seed 0, index 3): the logits of step 1 (phase 0, prefill) are NaN or "
        "infinite: "
    )
    out = tmp_path / "out"
    assert mistake("run", broken_bundle, *asked, "--out", out).startswith(told)
    assert tokens(out) == {position: whole[position] for position in (0, 1, 2)}

    said = answer("run", broken_bundle, *asked, "--out", out, "--keep-going", "--json")
    assert said.code == 0, said
    result = json.loads(said.out)
    assert (result["made"], result["failed"]) == (5, 2)
    assert f"2 images could not be made: see {out}/failures.jsonl" in said.err
    good = {position: ids for position, ids in whole.items() if position % 5 != 3}
    assert tokens(out) == good
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [(failure["position"], failure["step"]) for failure in failures] == [(3, 1), (8, 1)]
    assert failures[0]["error"].startswith(told)

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = answer("run", broken_bundle, *asked, "--out", out, "--keep-going", "--json")
    assert json.loads(again.out)["made"] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    said = mistake("run", broken_bundle, *asked, "--out", out)
    assert said.startswith(f"{out}/failures.jsonl, line 1: image 3 (Crane, seed 0, index 3): the ")
    assert said.endswith("; go on without such images by --keep-going, or choose another --out")


def test_a_run_of_which_every_image_fails(broken_bundle: Path, tmp_path: Path) -> None:
    asked = ["--class", "3", "--out", tmp_path / "a"]
    assert "image 0 (Crane" in mistake("run", broken_bundle, *asked)
    assert not (tmp_path / "a").exists()
    said = answer("run", broken_bundle, *asked, "--keep-going")
    assert said.code == 0, said
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["failures.jsonl", RECORDS]


def test_a_bundle_that_another_build_replaced(small_bundle: Path, broken_bundle: Path) -> None:
    plan = make_plan(RunRequest(small_bundle, ["0"], Path("a")), Bundle.open(small_bundle))
    with pytest.raises(UserError, match="small was replaced or taken away while it was read: star"):
        make_images(Pipeline.open(broken_bundle), plan, np.arange(1), 1, False)
