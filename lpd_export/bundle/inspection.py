"""What `lpd-export inspect` says of a bundle, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from lpd_export.bundle.manifest import Bundle, Made, Manifest
from lpd_export.formats import PRECISIONS

GRAPH_TITLES = {
    "decode": "decode",
    "detokenize": "tokenizer decoder",
    "tokenize": "tokenizer encoder",
}


def class_lines(manifest: Manifest) -> Iterator[str]:
    """A line for each class: its id and its names."""
    for label in range(manifest.model.num_classes):
        names = manifest.class_names[label] if manifest.class_names else []
        yield f"{label:4d}  {', '.join(names)}".rstrip()


def report_lines(bundle: Bundle, batch: int = 1) -> Iterator[str]:
    """The model, how it is run, the memory a batch needs, its phases, engines and files."""
    manifest = bundle.manifest
    model, tokenizer, made = manifest.model, manifest.tokenizer, manifest.made
    if quantized := quantized_line(manifest):
        yield quantized
    yield f"{manifest.name}: {manifest.resolution} px in {len(manifest.phases)} steps"
    facts = {
        "model": f"width {model.dim}, {model.depth} blocks, {model.heads} heads of "
        f"{model.head_dim}, grid {model.grid}x{model.grid}, vocabulary {model.vocab_size}, "
        f"{model.num_classes} classes",
        "tokenizer": f"stride {tokenizer.stride}, channels {tokenizer.channels} x "
        f"{tuple(tokenizer.channel_multipliers)}, codebook {tokenizer.codebook_size} x "
        f"{tokenizer.codebook_dim}",
        "precision": f"{manifest.precision}, inputs and caches {manifest.float_type}",
        "backend": f"{manifest.backend} {manifest.backend_version}",
        "guidance": f"{manifest.cfg:g} {manifest.guidance} (recommended)",
        "batch": f"up to {manifest.max_batch}" if manifest.max_batch else "any",
        "memory": memory_line(manifest, batch),
        "weights": weights_line(made),
        "made": f"{made['time']} by lpd-export {made['versions']['lpd-export']}, torch "
        f"{made['versions']['torch']}, onnx {made['versions']['onnx']}",
    }
    for name, value in facts.items():
        yield f"  {name:10} {value}"
    yield from calibration_lines(manifest)
    yield ""
    yield f"  {'phases':10} step  name      context  queries  cache rows written"
    for phase in manifest.phases:
        rows = f"{phase.write_index} to {phase.write_index + phase.tokens - 1}"
        step = phase.index + 1  # names are those of files, which count from 0
        yield f"  {'':10} {step:4}  {phase.name} {phase.context:8} {phase.queries:8}  {rows}"
    yield ""
    yield from engine_lines(manifest)
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


def quantized_line(manifest: Manifest) -> str:
    """How many layers of each graph are quantized, as was decided; empty if none can be."""
    precision = PRECISIONS[manifest.precision]
    return "; ".join(
        f"{GRAPH_TITLES[graph]}: {decided['layers'] - len(decided['kept'])} of "
        f"{decided['layers']} layers {quantization.title}"
        for graph, decided in manifest.calibration.get("quantization", {}).items()
        if (quantization := precision.quantization_of(graph))
    )


def weights_line(made: Made) -> str:
    checkpoint = made["checkpoint"]
    if checkpoint is not None:
        return f"{checkpoint['source']} (SHA-256 {checkpoint['sha256'][:12]}...)"
    return f"random, seed {made['random_weights_seed']}"


def memory_line(manifest: Manifest, batch: int) -> str:
    """What a batch with guidance takes, as far as it follows from the bundle."""
    prefix, suffix = ("engines/", ".engine") if manifest.engines else ("onnx/", ".data")
    weights = sum(
        file.size
        for name, file in manifest.files.items()
        if name.startswith(prefix) and name.endswith(suffix)
    )
    buffers = manifest.buffer_bytes(batch)
    return (
        f"{(weights + buffers) / 1e6:.0f} MB for a batch of {batch} with guidance: "
        f"{weights / 1e6:.0f} weights, {buffers / 1e6:.0f} caches and logits; activations on top"
    )


def calibration_lines(manifest: Manifest) -> Iterator[str]:
    """What was measured of the precision, and which layers it leaves in higher precision."""
    for graph, worst in manifest.calibration.get("largest_values", {}).items():
        name = "ranges" if graph == "decode" else ""
        yield f"  {name:10} {graph}: at most {worst['magnitude']:.4g}, in {worst['value']}"
    for graph, decision in manifest.calibration.get("quantization", {}).items():
        name = manifest.precision if graph == "decode" else ""
        kept = list(decision["kept"])
        yield (
            f"  {name:10} {graph}: {decision['measure']} {decision['value']:.3g}, limit "
            f"{decision['limit']:g}"
        )
        trials = decision.get("trials", [])
        if len(trials) > 1:
            curve = ", ".join(f"{int(count)}: {value:.3g}" for count, value in trials)
            yield f"  {'':10} by layers in higher precision: {curve}"
        if kept:
            more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
            kind = decision.get("kept_as") or "higher precision"
            yield f"  {'':10} in {kind}, above all: {', '.join(kept[:3])}{more}"


def engine_lines(manifest: Manifest) -> Iterator[str]:
    """What each engine is: its size, targets, profiles and what goes in and out."""
    for graph, engine in manifest.engines.items():
        targets = ", ".join(manifest.target_compute_capabilities) or "the default GPUs"
        yield (
            f"  engine     {graph}: {engine['size'] / 1e6:.1f} MB, "
            f"{engine['backend']} {engine['backend_version']} for {targets}, "
            f"{engine['engine_layers']} layers"
        )
        if engine["cache_updates"]:
            fused = engine["attentions"] - engine["decomposable_attentions"]
            yield (
                f"  {'':10} {engine['cache_updates']} caches updated in place, "
                f"{len(engine['copied_caches'])} copied for attention, {fused} of "
                f"{engine['attentions']} attentions fused"
            )
        if engine["integer_convolutions"]:
            yield (
                f"  {'':10} {engine['integer_convolutions']} of {engine['convolutions']} "
                "convolutions in INT8 kernels"
            )
        tensors = ", ".join(f"{name} {shape}" for name, shape in engine["tensors"].items())
        yield f"  {'':10} {tensors}"
        for number, profile in enumerate(engine["optimization_profiles"]):
            axes = ", ".join(
                f"{axis} {least} to {most} (best {best})"
                for axis, (least, best, most) in profile.items()
            )
            yield f"  {'':10} profile {number}: {axes}"
    if manifest.engines:
        yield ""
