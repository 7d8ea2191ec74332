"""What others build on: docs/versions.md promises it, and a change here is a change of version."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import click
import pytest

import lpd_export
from lpd_export.cli.main import commands

pytestmark = pytest.mark.unit

PIPELINE = {
    "bind_steps",
    "check_batch",
    "choose_schedule",
    "close",
    "detokenize",
    "edit",
    "executor",
    "forced_logits",
    "generate",
    "picture_after",
    "open",
    "prepare_edit",
    "sampling",
    "stream",
    "teacher_forced_logits",
    "tokenize",
    "trace",
}
WORDS = {
    "build": "RECIPE --res --model --steps --checkpoint --tokenizer --heads --classes --schedule "
    "--orders --repulsion --cfg --guidance --precision --keep-layers --backend --max-batch "
    "--workspace --optimization-level --timing-cache --hardware-compatible "
    "--compute-capability --random-weights --seed --out --force "
    "--dry-run --quiet --verbose --json",
    "run": "BUNDLE --class -n --seed --cfg --guidance --temperature --top-k --top-p --batch "
    "--schedule --steps --device --threads --save-tokens --trace --resume --out "
    "--per-class --requests --format --per-file --keep-going --shard --workers "
    "--quiet --verbose --json",
    "merge": "DIR --out --json",
    "edit": "BUNDLE IMAGE --class --mask --box --outpaint --fit --order --paste -n --seed --cfg "
    "--guidance --temperature --top-k --top-p --batch --schedule --steps --device --threads "
    "--save-tokens --trace --resume --out --quiet --verbose --json",
    "verify": "BUNDLE --against --checkpoint --tokenizer --images --seed --threshold --by-layer "
    "--bisect --save-phases --onnx --device --threads --out "
    "--quiet --verbose --json",
    "bench": "BUNDLE --batch --against --checkpoint --tokenizer --runs --roofline --device "
    "--threads --details --out --quiet --verbose --json",
    "evaluate": "BUNDLE|FOLDER|FILE.npz --against --features --per-class --seed --cfg "
    "--guidance --temperature --top-k --top-p --batch --schedule --device --threads "
    "--save-statistics --out --quiet --verbose --json",
    "schedule make": "--res --steps --kind --repulsion --proximity --count --seed --stride --out "
    "--force --json",
    "schedule check": "FILE --steps --json",
    "schedule show": "FILE --steps --order --out --force --json",
    "serve": "BUNDLE... --host --port --max-queue --batch --max-wait --api-key --device --threads",
    "triton": "BUNDLE... --out --batch --instances --max-queue --max-wait --device --threads "
    "--json",
    "inspect": "BUNDLE --classes --batch --json",
    "doctor": "--json",
}
"""Of the command line."""


def leaves(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """Every command that is no group, by its full name."""
    context, found = click.Context(group), {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found.update(leaves(command, f"{prefix}{name} "))
        else:
            found[prefix + name] = command
    return found


def words(command: click.Command) -> set[str]:
    """Arguments in capitals, and the options as they are typed."""
    return {
        word
        for parameter in command.params
        for word in (
            [parameter.human_readable_name]
            if isinstance(parameter, click.Argument)
            else parameter.opts
        )
    }


def test_what_the_package_names() -> None:
    assert set(lpd_export.__all__) == {"ImageRequest", "Pipeline", "Sampling", "UserError"}
    for name in lpd_export.__all__:
        assert getattr(lpd_export, name).__name__ == name
    assert lpd_export.__version__
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        _ = lpd_export.Pipelines


def test_what_a_pipeline_can_do() -> None:
    public = {name for name in vars(lpd_export.Pipeline) if not name.startswith("_")}
    assert public == PIPELINE
    for name in public:
        assert inspect.getdoc(getattr(lpd_export.Pipeline, name)), f"{name} has no docstring"


def test_what_one_generates_with() -> None:
    parameters = inspect.signature(lpd_export.Pipeline.generate).parameters
    assert [*parameters][:2] == ["self", "classes"]
    assert {"seed", "cfg", "batch", "schedule", "progress"} < set(parameters)


def test_the_words_of_the_command_line() -> None:
    """Commands are these; options may be added, and none goes."""
    found = leaves(commands)
    assert set(found) == set(WORDS)
    for name, text in WORDS.items():
        gone = set(text.split()) - words(found[name])
        assert not gone, f"`lpd-export {name}` has lost {gone}"


def test_types_are_told_to_who_uses_the_package() -> None:
    assert (files("lpd_export") / "py.typed").is_file()


def test_the_package_and_its_help_do_not_wait_for_torch() -> None:
    program = (
        "import sys, lpd_export, lpd_export.cli.main; lpd_export.UserError; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_cpu_makes_images_without_torch(small_bundle: Path, tmp_path: Path) -> None:
    """Which would take a second and 200 MB of each process."""
    program = (
        "import sys\n"
        "from lpd_export.cli.main import commands\n"
        "from lpd_export.serving import server\n"
        "bundle, out = sys.argv[1:]\n"
        "for words in (\n"
        "    ['run', bundle, '--class', '0', '--out', out, '--trace'],\n"
        "    ['edit', bundle, out + '/images.jsonl:0', '--box', '0,0,4,4', '--out', out + '-2'],\n"
        "):\n"
        "    commands.main([*words, '--quiet'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", program, small_bundle, out], check=True)
    assert (out / "images.jsonl").is_file()
    assert (tmp_path / "out-2/images.jsonl").is_file()
