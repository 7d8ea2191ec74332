"""What `lpd-export inspect` says of a bundle, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from lpd_export.bundle import Bundle, Manifest


def class_lines(manifest: Manifest) -> Iterator[str]:
    """A line for each class: its id and its names."""
    for label in range(manifest.model.num_classes):
        names = manifest.class_names[label] if manifest.class_names else []
        yield f"{label:4d}  {', '.join(names)}".rstrip()


def report_lines(bundle: Bundle) -> Iterator[str]:
    """The model, how it is run, its phases and its files."""
    manifest = bundle.manifest
    model, tokenizer, made = manifest.model, manifest.tokenizer, manifest.made
    yield f"{manifest.name}: {manifest.resolution} px in {len(manifest.phases)} steps"
    facts = {
        "model": f"width {model.dim}, {model.depth} blocks, {model.heads} heads of "
        f"{model.head_dim}, grid {model.grid}x{model.grid}, vocabulary {model.vocab_size}, "
        f"{model.num_classes} classes",
        "tokenizer": f"stride {tokenizer.stride}, channels {tokenizer.channels} x "
        f"{tuple(tokenizer.channel_multipliers)}, codebook {tokenizer.codebook_size} x "
        f"{tokenizer.codebook_dim}",
        "precision": manifest.precision,
        "backend": f"{manifest.backend} {manifest.backend_version}",
        "guidance": f"{manifest.cfg:g} {manifest.guidance} (recommended)",
        "batch": f"up to {manifest.max_batch}" if manifest.max_batch else "any",
        "caches": f"{cache_bytes(manifest) / 1e6:.1f} MB an image with guidance",
        "weights": weights_line(made),
        "made": f"{made['time']} by lpd-export {made['versions']['lpd-export']}, torch "
        f"{made['versions']['torch']}, onnx {made['versions']['onnx']}",
    }
    for name, value in facts.items():
        yield f"  {name:10} {value}"
    yield ""
    yield f"  phases     {'':4} context  queries  cache rows written"
    for phase in manifest.phases:
        rows = f"{phase.write_index} to {phase.write_index + phase.tokens - 1}"
        yield f"  {'':10} {phase.index:4} {phase.context:8} {phase.queries:8}  {rows}"
    yield ""
    yield "  files, all whole:"
    phases = [name for name in manifest.files if name.startswith("onnx/phase_")]
    for name, file in manifest.files.items():
        if name not in phases:
            yield f"  {file.size / 1e6:10.2f} MB  {name}"
    if phases:
        size = sum(manifest.files[name].size for name in phases)
        yield f"  {size / 1e6:10.2f} MB  {phases[0]} to {phases[-1].rsplit('/', 1)[1]}"
    total = sum(file.size for file in manifest.files.values())
    yield f"  {total / 1e6:10.2f} MB  in all"


def weights_line(made: dict[str, object]) -> str:
    checkpoint = made["checkpoint"]
    if isinstance(checkpoint, dict):
        return f"{checkpoint['source']} (SHA-256 {checkpoint['sha256'][:12]}...)"
    return f"random, seed {made['random_weights_seed']}"


def cache_bytes(manifest: Manifest) -> int:
    """Keys and values of an image's two rows, in the graphs' type."""
    model = manifest.model
    row = 2 * model.depth * model.heads * (model.grid**2 + 1) * model.head_dim
    return 2 * row * {"fp32": 4, "int8": 4}.get(manifest.precision, 2)
