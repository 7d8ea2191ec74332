"""A small image classifier, whose features and verdicts measure generated images.

It says whether they are of the class that was asked for. It knows nothing of what generates them,
nor what is made of its features. Training it is `scripts/train_classifier.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from lpd_export.errors import UserError

GROUP_CHANNELS = 16
"""Channels that a group normalization takes together."""
CONFIG_KEY, CLASSES_KEY = "config", "classes"
"""Entries of a file's header: JSON of the architecture and of the class names."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The architecture: a level for each width, which halves the side."""

    classes: int
    resolution: int = 64
    widths: tuple[int, ...] = (32, 64, 96, 128)
    """Channels of each level, multiples of 16; the last is the number of features."""

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 or width % GROUP_CHANNELS for width in self.widths):
            raise ValueError(f"widths must be multiples of {GROUP_CHANNELS}, not {self.widths}")
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1, not {self.classes}")

    @property
    def feature_count(self) -> int:
        return self.widths[-1]


class ResidualBlock(nn.Module):
    """Two convolutions, each after a normalization, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = group_norm(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(self.norm1(x)))
        hidden = self.conv2(F.relu(self.norm2(hidden)))
        return x + hidden


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(width // GROUP_CHANNELS, width)


class Classifier(nn.Module):
    """A residual network whose features are averaged over the image."""

    def __init__(self, config: ClassifierConfig, class_names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.class_names = class_names
        levels: list[nn.Module] = []
        before = 3
        for level, width in enumerate(config.widths):
            # The first level has one wide look at the pixels alone: blocks there cost the most.
            size = 5 if level == 0 else 3
            levels.append(nn.Conv2d(before, width, size, stride=2, padding=size // 2))
            if level > 0:
                levels.append(ResidualBlock(width))
            before = width
        self.levels = nn.Sequential(*levels)
        self.norm = group_norm(before)
        self.head = nn.Linear(before, config.classes)
        for weight in self.parameters():
            if weight.ndim == 4:  # the layout that CPUs compute fastest in
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """What the classifier sees in images, before it decides.

        Args:
            images: [N, 3, H, H] float32 in [-1, 1], of the config's resolution H.

        Returns:
            [N, F] float32, with F the config's `feature_count`; none is negative.

        Raises:
            ValueError: if the images are of another shape.
        """
        expected = (3, self.config.resolution, self.config.resolution)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [N, {', '.join(map(str, expected))}], not {list(images.shape)}"
            )
        hidden = self.levels(images.contiguous(memory_format=torch.channels_last))
        return F.relu(self.norm(hidden)).float().mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """Unnormalized log-probabilities [N, classes] of images as `features` takes them."""
        scores: Tensor = self.head(self.features(images))
        return scores.float()

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)

    def initialize(self, seed: int) -> Classifier:
        """Draws the weights; each residual block begins as the identity."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        return self

    def header(self) -> dict[str, str]:
        """What a file of the weights must say so that `load` can read it."""
        return {
            CONFIG_KEY: json.dumps(asdict(self.config)),
            CLASSES_KEY: json.dumps(self.class_names),
        }


def load(path: Path) -> Classifier:
    """A trained classifier in float32 on the CPU, for use and not for training.

    Raises:
        UserError: if there is no such file, or it is damaged or not a classifier.
    """
    if not path.is_file():
        raise UserError(f"there is no classifier {path}: train one with train_classifier.py")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        settings = json.loads(header[CONFIG_KEY])
        config = ClassifierConfig(**{**settings, "widths": tuple(settings["widths"])})
        model = Classifier(config, tuple(json.loads(header[CLASSES_KEY])))
        model.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged or is not a classifier: train one with train_classifier.py"
        ) from error
    return model.requires_grad_(False).eval()
