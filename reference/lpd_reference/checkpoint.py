"""Reads released LPD and tokenizer checkpoints, from a path or the Hugging Face hub.

Knows the file formats (a PyTorch pickle with the weights under `model`, or safetensors) and how
to read an architecture off the shapes of the weights. Never unpickles arbitrary code: files are
read with `weights_only=True`, with `argparse.Namespace` (the authors' training arguments) allowed.
"""

from __future__ import annotations

import argparse
import errno
import math
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lpd_reference.lpd import HEAD_DIM, LPD, LPDConfig
from lpd_reference.vq import NORM_GROUPS, VQConfig, VQTokenizer

HUB_PREFIX = "hf:"
HUB_TIMEOUT_SECONDS = 10
COMMIT = re.compile("[0-9a-f]{40}")
WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")

WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ZEROS = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")
"""In a pickle: torch lets it be called, with a number of bytes to take. No weight needs it."""

StateDict = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be found or read, or that is not of the expected model."""


class HubFile(NamedTuple):
    """What a source `hf:ORG/NAME[@REVISION][/FILE]` names."""

    repository: str
    revision: str | None
    """A branch, tag or commit; None is the repository's main branch."""
    file: str | None
    """None is the repository's only weight file, or the one named after it."""

    @classmethod
    def parse(cls, source: str) -> HubFile:
        """Raises CheckpointError for a source of another form."""
        organisation, _, rest = source.removeprefix(HUB_PREFIX).partition("/")
        name, slash, file = rest.partition("/")
        name, at, revision = name.partition("@")
        names = [organisation, name, *[revision] * bool(at), *[file] * bool(slash)]
        if not all(names) or ".." in source.split("/"):
            raise CheckpointError(
                f"{source!r} is not of the form hf:ORG/NAME, hf:ORG/NAME/FILE or "
                "hf:ORG/NAME@REVISION/FILE"
            )
        return cls(f"{organisation}/{name}", revision or None, file or None)

    @property
    def command(self) -> str:
        """The command that fetches it."""
        words = ["hf download", self.repository, self.file or ""]
        words += ["--revision", self.revision] if self.revision else []
        return " ".join(filter(None, words))


class HubOutOfReachError(CheckpointError):
    """Files of the hub that are not in its cache here, and cannot be fetched from here."""

    def __init__(self, reason: str, sources: Sequence[str]) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        commands = " and ".join(f"`{HubFile.parse(source).command}`" for source in sources)
        super().__init__(
            f"cannot fetch {' and '.join(sources)}: {reason}; where the hub can be reached run "
            f"{commands}, and bring the cache here ({HF_HUB_CACHE}) or give the files' paths"
        )
        self.reason = reason


def locate(source: str | Path) -> Path:
    """The local file of a path or `hf:ORG/NAME[@REVISION][/FILE]`, downloaded if need be.

    Without FILE the repository must hold one weight file, or one named after itself.

    Raises:
        CheckpointError: if there is no such file, or the hub or the repository cannot be reached.
    """
    if str(source).startswith(HUB_PREFIX):
        return download(str(source))
    path = Path(source)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the checkpoint file inside it")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    return path


def locate_all(sources: Sequence[str]) -> list[Path]:
    """As `locate`, of several: files that cannot be fetched are all named in one error."""
    found, unreached, reason = list[Path](), list[str](), ""
    for source in sources:
        try:
            found.append(locate(source))
        except HubOutOfReachError as error:
            unreached.append(source)
            reason = error.reason
    if unreached:
        raise HubOutOfReachError(reason, unreached)
    return found


def is_here(source: str) -> bool:
    """Whether a source can be located without the hub; raises CheckpointError as `locate`."""
    if source.startswith(HUB_PREFIX):
        return find_cached(HubFile.parse(source)) is not None
    return locate(source).is_file()


def lasting_source(source: str, file: Path) -> str:
    """The source that finds a located file again: with its commit, or its absolute path."""
    if not source.startswith(HUB_PREFIX):
        # Of the folder alone: where the file is a link, its own name tells its format.
        return str(file.parent.resolve() / file.name)
    from huggingface_hub.constants import HF_HUB_CACHE

    _, _, commit, *name = file.relative_to(HF_HUB_CACHE).parts
    return f"{HUB_PREFIX}{HubFile.parse(source).repository}@{commit}/{'/'.join(name)}"


def download(source: str) -> Path:
    """The local copy of a hub file, kept in the hub's own cache."""
    from huggingface_hub import HfApi, constants, get_session, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    repository, revision, file = hub_file = HubFile.parse(source)
    # huggingface_hub changes its HTTP client with its version: this is the base of its errors.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    unreachable = "the Hugging Face hub cannot be reached from here"
    try:
        validate_repo_id(repository)
        cached = find_cached(hub_file)
        offline = constants.is_offline_mode()
        if cached is not None and (offline or COMMIT.fullmatch(revision or "")):
            return cached
        if offline:
            raise HubOutOfReachError("HF_HUB_OFFLINE keeps this process offline", [source])
        # Asked once: the calls below would ask a hub that is out of reach for half a minute.
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
        if file is None:
            files = HfApi().list_repo_files(repository, revision=revision)
            file = choose_weight_file(repository, files)
        return Path(hf_hub_download(repository, file, revision=revision))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} asks for a login on the Hugging Face hub: accept its terms there and "
            "run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"the Hugging Face hub has no repository {repository}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise HubOutOfReachError(unreachable, [source]) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repository} holds no file {file}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{repository!r} is not a Hugging Face repository name") from error
    except client_error as error:
        if cached is not None:
            return cached
        reason = unreachable
        if isinstance(error, HfHubHTTPError):
            reason = f"the Hugging Face hub answers with error {error.response.status_code}"
        raise HubOutOfReachError(reason, [source]) from error
    # The hub's Rust downloader has RuntimeErrors alone, the system's errors in their text.
    except (OSError, RuntimeError) as error:
        full = f"os error {errno.ENOSPC}" in str(error)
        if not full and not isinstance(error, OSError):
            raise CheckpointError(f"the download of {source} failed: {error}") from error
        why = os.strerror(errno.ENOSPC) if full else getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot keep {source} in {constants.HF_HUB_CACHE}: {why}; make room there, or set "
            "HF_HOME to a folder where there is"
        ) from error


def find_cached(wanted: HubFile) -> Path | None:
    """The copy in the hub's cache, if there is one; the hub is not asked."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision, file = wanted
    if file is not None:
        cached = try_to_load_from_cache(repository, file, revision=revision)
        return Path(cached) if isinstance(cached, str) else None
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        return folder / choose_weight_file(repository, files)
    except (LocalEntryNotFoundError, CheckpointError):
        return None


def choose_weight_file(repository: str, files: list[str]) -> str:
    """The weight file of a repository's list of files: the only one, or its namesake."""
    weights = [file for file in files if file.endswith(WEIGHT_SUFFIXES)]
    namesakes = [file for file in weights if Path(file).stem == repository.split("/")[1]]
    for candidates in (weights, namesakes):
        if len(candidates) == 1:
            return candidates[0]
    if not weights:
        raise CheckpointError(f"{repository} holds no {' / '.join(WEIGHT_SUFFIXES)} file")
    raise CheckpointError(
        f"{repository} holds {len(weights)} weight files ({', '.join(sorted(weights)[:8])}): "
        f"name one as hf:{repository}/FILE"
    )


def read_state_dict(path: Path) -> StateDict:
    """The named weights of a checkpoint file, on the CPU, in the file's own types.

    Raises:
        CheckpointError: if the file is truncated, not a checkpoint, or holds more than weights.
    """
    kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
    damaged = f"{path} is truncated or is not a {kind}"
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            check_pickle(path)
            zipped = zipfile.is_zipfile(path)
            with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
                # Mapped, so that an optimizer's state beside the weights is never read, and so that
                # no text in a pickle can be longer than the file.
                mapped: Any = path if zipped else mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                content = torch.load(mapped, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects other than weights, which could run code, and was "
                "not loaded"
            ) from error
        raise CheckpointError(damaged) from error
    except OSError as error:
        # In some truncated files PyTorch seeks a place before the start.
        if error.errno == errno.EINVAL:
            raise CheckpointError(damaged) from error
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    # On garbage the unpickler fails with whatever its next line raises, IndexError for one.
    except Exception as error:
        asked = re.search(r"tried to allocate (\d+) bytes", str(error))
        beyond = asked is not None and int(asked[1]) > path.stat().st_size
        shortage = isinstance(error, MemoryError) or "allocate memory" in str(error)
        if isinstance(error, CheckpointError) or (shortage and not beyond):
            raise  # a shortage says nothing of the file, unless it asks for more than it has
        raise CheckpointError(damaged) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    named_values = content.items() if isinstance(content, Mapping) else ()
    state = {str(key): value for key, value in named_values if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no named weights")
    return state


def check_pickle(path: Path) -> None:
    """Raises CheckpointError for what would take memory that is not in the file.

    Whatever zipfile and the system raise for a damaged file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise CheckpointError(f"{path} is compressed, as no PyTorch checkpoint is")
            pickles = [archive.read(m) for m in members if m.filename.endswith("/data.pkl")]
            asks = any(map(ZEROS.search, pickles))
    else:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as whole:
            asks = ZEROS.search(whole) is not None
    if asks:
        raise CheckpointError(f"{path} asks for memory beside its weights, and was not loaded")


def dense(state: StateDict, key: str, kind: str) -> Tensor:
    """A weight, which must be an array of floats with all of its values in the file."""
    tensor = state[key]
    if tensor.layout != torch.strided or tensor.dtype not in WEIGHT_TYPES or tensor.is_meta:
        layout = (
            "" if tensor.layout == torch.strided else f"{tensor.layout} ".removeprefix("torch.")
        )
        raise CheckpointError(
            f"not {kind}: {key} is a {layout}tensor of {str(tensor.dtype).removeprefix('torch.')}; "
            "weights must be dense, of float64, float32, float16 or bfloat16"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"not {kind}: {key} has shape {list(tensor.shape)}, of which the file has a part alone"
        )
    return tensor


def shape_of(state: StateDict, key: str, dimensions: int, kind: str) -> torch.Size:
    """The shape of a weight that tells the architecture."""
    if key not in state:
        some = ", ".join(list(state)[:3])
        raise CheckpointError(f"not {kind}: the key {key} is missing (it holds {some}, ...)")
    shape = dense(state, key, kind).shape
    if len(shape) != dimensions:
        raise CheckpointError(
            f"not {kind}: {key} has shape {list(shape)}, where {dimensions} dimensions are expected"
        )
    return shape


def count_modules(state: StateDict, prefix: str) -> int:
    """How many different numbers follow a prefix; gaps then show as missing and unexpected keys."""
    numbers = {key.removeprefix(prefix).split(".", 1)[0] for key in state if key.startswith(prefix)}
    return sum(number.isdecimal() for number in numbers)


def lpd_config(state: StateDict, heads: int | None = None) -> LPDConfig:
    """The architecture of an LPD's weights; heads are D / 64 unless told otherwise."""
    kind = "an LPD checkpoint"
    num_classes, dim = shape_of(state, "class_emb.weight", 2, kind)
    vocab_size = shape_of(state, "token_emb.weight", 2, kind)[0]
    cells = shape_of(state, "pos_embed", 3, kind)[1] - 1
    mlp_dim = shape_of(state, "blocks.0.mlp.fc1.weight", 2, kind)[0]
    grid = math.isqrt(max(cells, 0))
    if cells < 1 or grid * grid != cells:
        raise CheckpointError(
            f"not {kind}: pos_embed has {cells + 1} rows, which is not 1 + a square grid"
        )
    if heads is None:
        if dim % HEAD_DIM:
            raise CheckpointError(
                f"the model's width {dim} is not a multiple of {HEAD_DIM}: say how many attention "
                "heads it has"
            )
        heads = dim // HEAD_DIM
    elif heads < 1 or dim % heads:
        raise CheckpointError(f"the model's width {dim} does not divide into {heads} heads")
    depth = count_modules(state, "blocks.")
    return LPDConfig(dim, depth, heads, grid, num_classes, vocab_size, mlp_dim)


def vq_config(state: StateDict) -> VQConfig:
    """The architecture of a tokenizer's weights."""
    kind = "a VQ tokenizer"
    channels = shape_of(state, "encoder.conv_in.weight", 4, kind)[0]
    widths = [
        shape_of(state, f"encoder.conv_blocks.{level}.res.0.conv1.weight", 4, kind)[0]
        for level in range(max(1, count_modules(state, "encoder.conv_blocks.")))
    ]
    if channels < 1 or channels % NORM_GROUPS:
        raise CheckpointError(f"not {kind}: {channels} channels, not a multiple of {NORM_GROUPS}")
    if any(width % channels for width in widths):
        raise CheckpointError(f"not {kind}: widths {widths} are not multiples of {channels}")
    codebook_size, codebook_dim = shape_of(state, "quantize.embedding.weight", 2, kind)
    return VQConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=count_modules(state, "encoder.conv_blocks.0.res."),
        z_channels=shape_of(state, "encoder.conv_out.weight", 4, kind)[0],
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
    )


def resize_positions(state: StateDict, grid: int) -> StateDict:
    """The weights with `pos_embed` resized to another grid (bicubic; the condition's row kept)."""
    positions = state["pos_embed"].float()
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == grid:
        return state
    image = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    cells = resized.flatten(2).transpose(1, 2)
    return {**state, "pos_embed": torch.cat([positions[:, :1], cells], dim=1)}


class WithoutInitialization(TorchFunctionMode):
    """Modules are made without drawing weights: on the meta device, that alone imports for 2 s."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def fill(model: nn.Module, state: StateDict, ignored: frozenset[str], kind: str) -> None:
    """Gives a model on the meta device its weights, in float32, every key and shape checked."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"not {kind}: the key {missing[0]} is missing{more}")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"not {kind}: {key} has shape {list(state[key].shape)}, expected "
                f"{list(tensor.shape)}"
            )
    unexpected = [key for key in state if key not in expected and key not in ignored]
    if unexpected:
        raise CheckpointError(f"not {kind}: unexpected key {unexpected[0]}")
    found = [dense(state, key, kind) for key in expected]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    needed = sum(tensor.nbytes for tensor in found)
    if needed > 2 * sum(stored.values()):
        raise CheckpointError(
            f"not {kind}: its weights share {sum(stored.values())} bytes of the file, and apart "
            f"they would take {needed}"
        )
    # Copied out of the file's mapping: the weights must outlive the file.
    weights = {key: state[key].to(torch.float32, copy=True) for key in expected}
    broken = [key for key, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise CheckpointError(f"not {kind}: {broken[0]} holds NaN or infinite values")
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()


def named(error: CheckpointError, source: str | Path) -> CheckpointError:
    link = " is " if str(error).startswith("not ") else ": "
    return CheckpointError(f"{source}{link}{error}")


def load_lpd(source: str | Path, *, grid: int | None = None, heads: int | None = None) -> LPD:
    """An LPD with the weights of a checkpoint, in float32, for inference.

    Args:
        source: a path, or `hf:ORG/NAME[@REVISION][/FILE]`.
        grid: resize the positions to this grid; by default the checkpoint's own.
        heads: attention heads, where the model's width / 64 is not right.

    Raises:
        CheckpointError: naming the file and the key or shape that is wrong.
    """
    state = read_state_dict(locate(source))
    try:
        config = lpd_config(state, heads)
        if grid is not None:
            state = resize_positions(state, grid)
            config = lpd_config(state, config.heads)
        with torch.device("meta"), WithoutInitialization():
            model = LPD(config)
        fill(model, state, frozenset(), "an LPD checkpoint")
    except CheckpointError as error:
        raise named(error, source) from error.__cause__
    return model


def load_tokenizer(source: str | Path) -> VQTokenizer:
    """A VQ tokenizer with the weights of a checkpoint, in float32, for inference.

    Args:
        source: a path, or `hf:ORG/NAME[@REVISION][/FILE]`.

    Raises:
        CheckpointError: naming the file and the key or shape that is wrong.
    """
    state = read_state_dict(locate(source))
    try:
        with torch.device("meta"), WithoutInitialization():
            model = VQTokenizer(vq_config(state))
        # A training counter, of no use here.
        fill(model, state, frozenset({"quantize.codebook_used"}), "a VQ tokenizer")
    except CheckpointError as error:
        raise named(error, source) from error.__cause__
    return model
