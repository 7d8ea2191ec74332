"""A model repository for Triton, and the images that a real `tritonserver` makes of it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commandline import mistake
from lpd_export import ImageRequest, Pipeline, Sampling, UserError
from lpd_export.bundle.manifest import MANIFEST, Bundle
from lpd_export.cli.main import commands
from lpd_export.serving.triton_repository import RepositoryRequest, write_repository
from server_process import until

TRITON = Path(__file__).parents[2] / "build" / "triton"
"""Where `make test-triton` puts the server and its clients."""
TYPES = {
    "class": np.int64,
    "seed": np.uint64,
    "index": np.uint64,
    "cfg": np.float64,
    "temperature": np.float64,
    "top_k": np.int64,
    "top_p": np.float64,
    "given": np.int64,
}
DATA_TYPES = {np.int64: "INT64", np.uint64: "UINT64", np.float64: "FP64"}

# ------------------------------------------------------------------------------ without a server


@pytest.mark.model
def test_a_repository_holds_whole_bundles_by_their_names(
    small_bundle: Path, emoji_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "repository"
    commands.main(
        ["triton", str(small_bundle), str(emoji_bundle), "--out", str(out)], standalone_mode=False
    )
    assert {path.name for path in out.parent.iterdir()} == {"repository"}
    assert {path.name for path in out.iterdir()} == {"small", "emoji32"}
    for bundle in (small_bundle, emoji_bundle):
        model = out / bundle.name
        assert {path.name for path in model.iterdir()} == {"config.pbtxt", "1"}
        assert {path.name for path in (model / "1").iterdir()} == {"model.py", "bundle"}
        copy = Bundle.open(model / "1" / "bundle")
        copy.files()
        copy.check_nothing_else()


@pytest.mark.model
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch": 0}, "--batch must be a whole number from 1"),
        ({"instances": 2000}, "--instances must be a whole number from 1 to 1024"),
        ({"max_queue": 0}, "--max-queue must be"),
        ({"max_wait": -1.0}, "--max-wait must be"),
        ({"threads": 0}, "--threads must be"),
        ({"out": Path("/")}, "/ exists: choose another --out, or move it away"),
        ({"out": Path("/proc/none/repository")}, "cannot write /proc/none"),
        ({"bundles": (Path("none"),)}, "there is no bundle none"),
    ],
)
def test_wrong_requests(
    options: dict[str, Any], sentence: str, small_bundle: Path, tmp_path: Path
) -> None:
    request = RepositoryRequest((small_bundle,), tmp_path / "repository")
    with pytest.raises(UserError, match=sentence):
        write_repository(replace(request, **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.model
def test_a_damaged_bundle_leaves_nothing(small_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "small"
    bundle.mkdir()
    for name in (MANIFEST, "schedule.npz"):
        (bundle / name).write_bytes((small_bundle / name).read_bytes())
    out = tmp_path / "repository"
    text = mistake("triton", str(bundle), "--out", str(out))
    assert "is missing: build the bundle again" in text
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


# --------------------------------------------------------------------------------- with a server


Clients = Callable[..., Any]


@pytest.fixture(scope="module")
def tritonclient() -> Iterator[Any]:
    """The package, with `http` and `grpc`."""
    if not TRITON.is_dir():
        pytest.skip("there is no tritonserver: make test-triton downloads it")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRITON / "client"))
        import tritonclient.grpc
        import tritonclient.http

        yield tritonclient


@pytest.fixture(scope="module")
def pipeline(small_bundle: Path) -> Pipeline:
    return Pipeline.open(small_bundle, threads=1)


@pytest.fixture(scope="module")
def server(
    tritonclient: Any, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, int]]:
    """Ports of a server of the bundle `small` by protocol, batches of 8."""
    folder = tmp_path_factory.mktemp("triton")
    request = RepositoryRequest((small_bundle,), folder / "repository", 8, 1, 16, 500.0, None, 1)
    write_repository(request)
    package = TRITON / "server" / "pytriton" / "tritonserver"
    # The backend, with the program that embeds our version of Python.
    (folder / "backends").mkdir()
    python = folder / "backends" / "python"
    python.mkdir()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for part in (
        *(package / "backends" / "python").glob("*triton_python*.*"),
        package / "python_backend_stubs" / version / "triton_python_backend_stub",
    ):
        (python / part.name).symlink_to(part)
    libraries = [TRITON / "server" / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }
    ports = dict(zip(("http", "grpc"), free_ports(2), strict=True))
    command = [package / "bin" / "tritonserver", f"--model-repository={folder / 'repository'}"]
    command += [f"--backend-directory={folder / 'backends'}", "--allow-metrics=false"]
    command += [f"--{protocol}-port={port}" for protocol, port in ports.items()]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:

        def ready() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            url = f"127.0.0.1:{ports['http']}"
            with contextlib.suppress(OSError), tritonclient.http.InferenceServerClient(url) as one:
                return bool(one.is_server_ready())
            return False

        until(ready, 120)
        yield ports
    finally:
        process.terminate()
        process.wait(60)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def infer(tritonclient: Any, server: dict[str, int]) -> Clients:
    """Asks for images by a protocol: tensors by name, rows of values."""

    def ask(protocol: str, **tensors: Any) -> dict[str, np.ndarray[Any, Any]]:
        module = getattr(tritonclient, protocol)
        inputs = []
        for name, rows in tensors.items():
            array = np.array(rows, TYPES[name]).reshape(len(rows), -1)
            inputs.append(module.InferInput(name, array.shape, DATA_TYPES[TYPES[name]]))
            inputs[-1].set_data_from_numpy(array)
        with module.InferenceServerClient(f"127.0.0.1:{server[protocol]}") as client:
            answer = client.infer("small", inputs)
        return {name: answer.as_numpy(name) for name in ("images", "token_ids")}

    return ask


@pytest.mark.triton
def test_the_configuration_is_what_triton_s_schema_says(
    tritonclient: Any, small_bundle: Path, tmp_path: Path
) -> None:
    from google.protobuf import text_format

    def parsed(**options: Any) -> Any:
        request = RepositoryRequest((small_bundle,), tmp_path / "none", **options)
        schema = tritonclient.grpc.model_config_pb2
        return text_format.Parse(request.config(Bundle.open(small_bundle)), schema.ModelConfig())

    config = parsed(batch=6, instances=2, max_queue=9, max_wait=1.5, threads=3)
    assert (config.backend, config.max_batch_size) == ("python", 6)
    inputs = {each.name: (each.data_type, list(each.dims)) for each in config.input}
    of_type = {f"TYPE_{name}": kind for kind, name in DATA_TYPES.items()}
    kinds = tritonclient.grpc.model_config_pb2.DataType
    assert {name: of_type[kinds.Name(kind)] for name, (kind, _) in inputs.items()} == TYPES
    assert {name for name, (_, dims) in inputs.items() if dims != [1]} == {"given"}
    assert [each.name for each in config.input if not each.optional] == ["class"]
    assert {each.name: list(each.dims) for each in config.output} == {
        "images": [16, 16, 3],
        "token_ids": [16],
    }
    batching = config.dynamic_batching
    assert batching.max_queue_delay_microseconds == 1500
    assert batching.default_queue_policy.max_queue_size == 9
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_CPU")
    assert config.parameters["threads"].string_value == "3"

    (group,) = parsed(device="cuda:1").instance_group
    assert (group.Kind.Name(group.kind), list(group.gpus)) == ("KIND_GPU", [1])


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_triton_s_images_are_those_of_a_run(
    protocol: str, infer: Clients, pipeline: Pipeline
) -> None:
    alone = infer(protocol, **{"class": [3]})
    (expected,) = pipeline.generate([3])
    np.testing.assert_array_equal(alone["images"], [expected.pixels])
    np.testing.assert_array_equal(alone["token_ids"], [expected.token_ids])

    seed = 2**64 - 1
    given = np.where(np.arange(16) < 8, expected.token_ids, -1)
    several = infer(
        protocol,
        **{"class": [1, -1], "seed": [seed, 7], "index": [1, 0], "cfg": [2.5, 0.1]},
        **{"temperature": [0.9, 1.1], "top_k": [40, 0], "top_p": [0.9, 1.0]},
        given=[[-1] * 16, given],
    )
    guidance = pipeline.manifest.guidance
    wanted = [
        ImageRequest(1, seed, 1, Sampling(2.5, guidance, 0.9, 40, 0.9)),
        ImageRequest(None, 7, 0, Sampling(0.1, guidance, 1.1), given=given),
    ]
    for row, image in enumerate(pipeline.stream(wanted, batch=2)):
        np.testing.assert_array_equal(several["images"][row], image.pixels)
        np.testing.assert_array_equal(several["token_ids"][row], image.token_ids)


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_eight_clients_share_batches_and_a_wrong_request_is_no_other_s_fault(
    protocol: str, infer: Clients, pipeline: Pipeline, tritonclient: Any, server: dict[str, int]
) -> None:
    def counts() -> tuple[int, int]:
        with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server['http']}") as client:
            (model,) = client.get_inference_statistics("small")["model_stats"]
            return model["inference_count"], model["execution_count"]

    def ask(number: int) -> Any:
        label = 99 if number == 5 else number % 5
        settings = {"seed": [number], "cfg": [0.5 * number], "temperature": [0.5 + number / 8]}
        try:
            return infer(protocol, **{"class": [label], **settings})
        except tritonclient.utils.InferenceServerException as error:
            return error

    images, batches = counts()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(8)))
    images, batches = np.subtract(counts(), (images, batches))
    assert (images, batches) == (8, 1)
    for number, answer in enumerate(answers):
        if number == 5:
            assert "the label must be from 0 to 4, but it is 99" in answer.message()
            continue
        (expected,) = pipeline.generate(
            [number % 5],
            seed=number,
            cfg=0.5 * number,
            temperature=0.5 + number / 8,
        )
        np.testing.assert_array_equal(answer["images"], [expected.pixels])
        np.testing.assert_array_equal(answer["token_ids"], [expected.token_ids])


@pytest.mark.triton
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"class": [5]}, "the label must be from 0 to 4, but it is 5"),
        ({"class": [-2]}, "the label must be from 0 to 4, but it is -2"),
        ({"cfg": [np.nan]}, "cfg must be a number from 0 to 1000, but it is nan"),
        ({"temperature": [0.0]}, "temperature must be a number from 0.001 to 1000"),
        ({"top_k": [-1]}, "top-k must be a whole number"),
        ({"top_p": [1.5]}, "top-p must be a number above 0 and at most 1"),
        ({"given": [[64] * 16]}, "token 64 is not in the model's codebook"),
        ({"given": [[0] * 15]}, "unexpected shape for input 'given'"),
    ],
)
def test_what_triton_s_clients_get_wrong_is_a_sentence(
    wrong: dict[str, Any], sentence: str, infer: Clients, tritonclient: Any
) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException, match=sentence):
        infer("grpc", **({"class": [1]} | wrong))
