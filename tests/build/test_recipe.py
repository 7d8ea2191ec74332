"""Recipes: what they say becomes a request, and a mistake in one is told with its line."""

import math
from pathlib import Path

import pytest

from commandline import entries, mistake
from lpd_export.build.request import BuildRequest, read_recipe
from lpd_export.errors import UserError

ANY_PRECISION = "fp32 or bf16 or fp16 or int8 or int8-weights or int4-weights or fp8"


def write(folder: Path, text: str, name: str = "small.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_setting_can_be_in_a_recipe(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        """
        model = "lpd-l"
        res = 512
        steps = 32
        checkpoint = "weights/lpd.pth"
        tokenizer = "hf:ORG/NAME/vq.pt"
        heads = 3
        classes = "lists/classes.json"
        schedule = "orders.npz"
        orders = 8
        repulsion = 0
        cfg = 3
        guidance = "constant"
        precision = "fp16"
        backend = "tensorrt-rtx"
        max-batch = 4
        random_weights = true
        seed = 7
        """,
    )
    settings = read_recipe(recipe)
    assert settings == {
        "model": "lpd-l",
        "res": 512,
        "steps": 32,
        "checkpoint": f"{tmp_path}/weights/lpd.pth",
        "tokenizer": "hf:ORG/NAME/vq.pt",
        "heads": 3,
        "classes": f"{tmp_path}/lists/classes.json",
        "schedule": f"{tmp_path}/orders.npz",
        "orders": 8,
        "repulsion": 0,
        "cfg": 3.0,
        "guidance": "constant",
        "precision": "fp16",
        "backend": "tensorrt-rtx",
        "max_batch": 4,
        "random_weights": True,
        "seed": 7,
        "out": f"{tmp_path}/small",
    }
    assert isinstance(settings["cfg"], float)
    BuildRequest(**settings)


def test_where_the_bundle_goes(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, ""))["out"] == f"{tmp_path}/small"
    assert read_recipe(write(tmp_path, 'out = "b/c"'))["out"] == f"{tmp_path}/b/c"
    assert read_recipe(write(tmp_path, "", "lpd-0.5.toml"))["out"] == f"{tmp_path}/lpd-0.5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('out = "/root/a"', "out: /root/a must be a path inside of "),
        ('out = "b/../../a"', "out: b/../../a must be a path inside of "),
        ('timing-cache = "../.bashrc"', "timing-cache: ../.bashrc must be a path inside of "),
        ('timing-cache = "link"', "link is a link that leaves "),
    ],
)
def test_what_a_recipe_writes_stays_beside_it(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    path = write(tmp_path / "in", line)
    with pytest.raises(UserError) as raised:
        read_recipe(path)
    assert str(raised.value).startswith(f"{path}, line 1: ")
    assert message in str(raised.value)


def test_what_a_recipe_reads_is_beside_it_or_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, folder = 'checkpoint = "../weights/lpd.pth"', tmp_path / "recipes"
    folder.mkdir()
    path = write(folder, line)
    with pytest.raises(UserError, match=r"line 1: checkpoint: .* give it as --checkpoint instead"):
        read_recipe(path)
    assert "checkpoint" not in read_recipe(path, replaced=["checkpoint"])
    monkeypatch.chdir(tmp_path)
    assert read_recipe(path)["checkpoint"] == f"{folder}/../weights/lpd.pth"
    (folder / "link").symlink_to("/etc")
    for line in ('classes = "/etc/passwd"', 'classes = "link/passwd"', r'classes = "a\u0000b"'):
        with pytest.raises(
            UserError, match=r"line 1: classes: .* leads out of the recipe's folder"
        ):
            read_recipe(write(folder, line))


def test_a_request_from_python() -> None:
    for wrong, message in (
        ({"res": "256"}, "--res must be a whole number from 1 to 2048, but it is '256'"),
        ({"cfg": 1e308}, "--cfg must be a number from 0 to 1000, but it is 1e+308"),
        ({"max_batch": True}, "--max-batch must be a whole number from 1 to 4096, but it is True"),
        (
            {"precision": None},
            f"--precision must be {ANY_PRECISION}, but it is None",
        ),
        ({"compute_capability": [8]}, "--compute-capability must be a list of texts in quotes"),
        ({"step": 20}, "there is no setting 'step'; there are model, res, steps"),
    ):
        with pytest.raises(UserError) as raised:
            BuildRequest(**wrong)
        assert str(raised.value).startswith(message)
    assert BuildRequest(cfg=3).cfg == 3.0
    assert BuildRequest(seed=2**64 - 1).seed == 2**64 - 1


def test_every_bound_of_a_setting_holds() -> None:
    bounded = set()
    for name, schema in BuildRequest.model_json_schema()["properties"].items():
        bounds = schema.get("anyOf", [schema])[0]
        if "minimum" in bounds:
            bounded.add(name)
            least, most = bounds["minimum"], bounds["maximum"]
            for value in (least - 1, most + 1, -math.inf, math.nan):
                with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must be a"):
                    BuildRequest(**{name: value})
            for value in (least, most):
                assert getattr(BuildRequest(**{name: value}), name) == value
    assert bounded == {
        *("res", "steps", "heads", "orders", "repulsion", "cfg", "max_batch", "workspace"),
        *("optimization_level", "seed"),
    }


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("res = 256\nstep = 20", 2, "there is no setting 'step'; there are model, res, steps,"),
        ("\n\n'res' = '256'", 3, "res must be a whole number from 1 to 2048, but it is '256'"),
        ("res = 256.0", 1, "res must be a whole number from 1 to 2048, but it is 256.0"),
        ("steps = true", 1, "steps must be a whole number from 1 to 16384, but it is True"),
        ("cfg = '3'", 1, "cfg must be a number from 0 to 1000, but it is '3'"),
        ("cfg = false", 1, "cfg must be a number from 0 to 1000, but it is False"),
        ("# hi\ncheckpoint = 3", 2, "checkpoint must be text in quotes, but it is 3"),
        ("checkpoint = ['a']", 1, "checkpoint must be text in quotes"),
        ("random-weights = 1", 1, "random-weights must be true or false, but it is 1"),
        ("steps = 4\ncfg = 1e300", 2, "cfg must be a number from 0 to 1000, but it is 1e+300"),
        ("cfg = nan", 1, "cfg must be a number from 0 to 1000, but it is nan"),
        ("orders = 1000000000", 1, "orders must be a whole number from 1 to 10000, but it is 1000"),
        ("\nmax-batch = 0", 2, "max-batch must be a whole number from 1 to 4096, but it is 0"),
        ("compute-capability = '8.9'", 1, "compute-capability must be a list of texts in quotes"),
        (
            "precision = 'fp7'",
            1,
            f"precision must be {ANY_PRECISION}, but it is 'fp7'",
        ),
        ("guidance = 'cosine'", 1, "guidance must be linear or constant"),
        ("backend = 'tvm'", 1, "backend must be onnxruntime or"),
        ("steps = 4\nforce = true", 2, "there is no setting 'force'"),
        ("steps = 4\n\n[build]\nres = 256", 3, "there is no setting 'build'"),
        ("model.name = 'lpd-l'", 1, "model must be text in quotes"),
    ],
)
def test_wrong_settings(tmp_path: Path, text: str, line: int, message: str) -> None:
    recipe = write(tmp_path, text)
    said = mistake("build", recipe)
    assert said.startswith(f"{recipe}, line {line}: {message}")
    assert entries(tmp_path) == ["small.toml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"res = ", "is not TOML: Invalid value (at end of document)"),
        (b"res = 256\nsteps 20", "is not TOML: Expected '=' after a key in a key/value pair (at"),
        (b"res = 1\nres = 2", "is not TOML: Cannot overwrite a value"),
        (b"a = " + b"[" * 10_000, "is not TOML"),
        (b"PK\x03\x04\xff\xfe", "cannot read the recipe"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "small.toml").write_bytes(content)
    assert message in mistake("build", tmp_path / "small.toml")


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "gone.toml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=f"^cannot read the recipe {path}: {reason}$"):
            read_recipe(path)
