"""LPD and its VQ tokenizer in plain PyTorch: the truth that every exported graph is compared with.

Knows the paper (arXiv 2507.01957) and the released file formats. Knows nothing of ONNX, TensorRT
or `lpd_export`.
"""

from lpd_reference.checkpoint import CheckpointError, load_lpd, load_tokenizer
from lpd_reference.generate import Generation, generate
from lpd_reference.lpd import LPD, PUBLISHED_MODELS, KeyValueCache, LPDConfig
from lpd_reference.vq import VQConfig, VQTokenizer

__all__ = [
    "LPD",
    "PUBLISHED_MODELS",
    "CheckpointError",
    "Generation",
    "KeyValueCache",
    "LPDConfig",
    "VQConfig",
    "VQTokenizer",
    "generate",
    "load_lpd",
    "load_tokenizer",
]
