"""Training of the VQ tokenizer: autoencoding with a codebook of unit vectors.

Knows the loss, how the codebook begins (k-means of latents) and how unused rows come back to life.
There is no discriminator: an L1, an L2 and an edge loss are enough for flat artwork. What is
common to all training is in `training.loop`.

Sources: VQ-VAE (arXiv 1711.00937), unit-norm codes (ViT-VQGAN, arXiv 2110.04627), LlamaGen (arXiv
2406.06525).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpd_reference.vq import VQConfig, VQTokenizer
from training.data import (
    ImageSet,
    TrainingError,
    augment,
    batch_of_step,
    class_weights,
    seeded,
    to_signed,
)
from training.loop import Batch, Figures, Outcome, Recipe, autocast

COMMITMENT = 0.25
"""Weight of the pull of latents to their code, against that of codes to their latents."""
EDGE_SCALES = (1, 2, 4)
"""Resolutions, as divisors, at which the edge loss compares differences of neighbours."""
CODEBOOK_IMAGES = 256
"""Images whose latents the codebook begins with."""
KMEANS_ROUNDS = 10
VALIDATION_BATCH = 32
# Purposes of random numbers, so that no two draws of a step are the same.
_AUGMENTATION, _KMEANS, _REVIVAL = 10, 11, 12


class TokenizerTask:
    """A `training.loop.Task` that trains a VQTokenizer to give images back.

    The first `codebook_start` steps train an autoencoder without a codebook; then k-means of its
    latents become the codebook. Every `revive_every` steps, until `revive_until` of all steps, rows
    that no latent chose since the last time are moved onto latents far from their row.
    """

    def __init__(
        self,
        config: VQConfig,
        recipe: Recipe,
        images: ImageSet,
        validation: ImageSet,
        device: torch.device,
        *,
        codebook_start: int = 200,
        revive_every: int = 50,
        revive_until: float = 0.7,
    ) -> None:
        if images.resolution % config.stride or validation.resolution != images.resolution:
            raise TrainingError(
                f"images of {images.resolution} and {validation.resolution} pixels cannot be "
                f"trained on: both sets must have one size, a multiple of {config.stride}"
            )
        self.model = VQTokenizer(config).initialize(recipe.seed).to(device)
        self.config, self.recipe, self.device = config, recipe, device
        self.images, self.validation = images, validation
        self.weights = class_weights(images.labels, balance=0)
        self.codebook_start = codebook_start
        self.revive_every, self.revive_until = revive_every, revive_until
        self.chosen = torch.zeros(config.codebook_size, dtype=torch.int64, device=device)

    def settings(self) -> dict[str, Any]:
        return {
            **asdict(self.config),
            "codebook_start": self.codebook_start,
            "revive_every": self.revive_every,
            "revive_until": self.revive_until,
            "images_digest": self.images.digest(),
        }

    def state(self) -> dict[str, Tensor]:
        return {"chosen": self.chosen}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.chosen = state["chosen"].to(self.device)

    def batch(self, step: int) -> Batch:
        """Augmented images [B, 3, H, W]."""
        recipe = self.recipe
        places = batch_of_step(step, recipe.batch_size, self.weights, recipe.seed)
        generator = seeded(recipe.seed, _AUGMENTATION, step)
        # To give an image back is the same task for its mirror image.
        every = torch.ones(len(places), dtype=torch.bool)
        return {"images": augment(self.images.pixels[places], generator, every)}

    def loss(self, step: int, part: Batch) -> Outcome:
        """L1 + L2 + edges of the reconstruction, the codebook's and the commitment's distance."""
        images = part["images"].to(self.device)
        with autocast(self.device, self.recipe.precision):
            latent = self.model.encode_latent(images)
        unit = F.normalize(latent.float(), dim=1)
        distance, quantized = unit.new_zeros(()), unit
        figures: Figures = {}
        kept: Batch = {}
        if step >= self.codebook_start:
            indices = self.model.quantize(unit.detach())
            rows = self.model.quantize.codebook()[indices].transpose(1, 2).view_as(unit)
            pull = F.mse_loss(unit, rows.detach())
            distance = F.mse_loss(unit.detach(), rows) + COMMITMENT * pull
            quantized = unit + (rows - unit).detach()
            figures["quantization_error"] = float(pull.detach())
            kept = {"indices": indices, "latents": unit.detach().flatten(2).transpose(1, 2)}
        with autocast(self.device, self.recipe.precision):
            decoded = self.model.decoder(self.model.post_quant_conv(quantized))
        pixel = pixel_loss(decoded.float(), images)
        figures["pixel_loss"] = float(pixel.detach())
        return Outcome(pixel + distance, figures, kept)

    @torch.no_grad()
    def after_update(
        self, step: int, kept: Batch, average: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Figures:
        """Begins the codebook, and revives rows that nothing chose."""
        if step + 1 == self.codebook_start:
            rows = kmeans(
                self.sample_latents(), self.config.codebook_size, seeded(self.recipe.seed, _KMEANS)
            )
            every = torch.arange(len(rows), device=self.device)
            self.replace_rows(every, rows, average, optimizer)
            return {}
        if kept:
            self.chosen += torch.bincount(kept["indices"].flatten(), minlength=len(self.chosen))
        since_start = step + 1 - self.codebook_start
        if since_start <= 0 or since_start % self.revive_every:
            return {}
        unused = (self.chosen == 0).nonzero().flatten()
        self.chosen.zero_()
        if len(unused) and step < self.revive_until * self.recipe.steps:
            generator = seeded(self.recipe.seed, _REVIVAL, step)
            latents = kept["latents"].flatten(0, 1)
            similarity = (latents @ self.model.quantize.codebook().T).amax(dim=1)
            error = (1 - similarity).clamp_min(1e-6).cpu()
            unused = unused[: len(error)]
            far = torch.multinomial(error, len(unused), generator=generator)
            self.replace_rows(unused, latents[far.to(self.device)], average, optimizer)
        return {"unused_codes": float(len(unused))}

    def replace_rows(
        self, rows: Tensor, values: Tensor, average: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Sets codebook rows in the model and its average, and forgets their gradients' past."""
        weight = self.model.quantize.embedding.weight
        weight[rows] = values
        cast(VQTokenizer, average).quantize.embedding.weight[rows] = values
        for tensor in optimizer.state[weight].values():
            if tensor.shape == weight.shape:
                tensor[rows] = 0

    def sample_latents(self) -> Tensor:
        """Unit latents [n, codebook_dim] of some training images."""
        generator = seeded(self.recipe.seed, _KMEANS, 1)
        some = torch.randperm(len(self.images), generator=generator)[:CODEBOOK_IMAGES]
        latents = []
        for part in some.split(VALIDATION_BATCH):
            images = to_signed(self.images.pixels[part]).to(self.device)
            with autocast(self.device, self.recipe.precision):
                latent = self.model.encode_latent(images)
            latents.append(F.normalize(latent.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2))
        return torch.cat(latents)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> Figures:
        """Mean PSNR in dB over the validation images; how much of the codebook they use."""
        tokenizer = cast(VQTokenizer, model)
        counts = torch.zeros(self.config.codebook_size, dtype=torch.int64, device=self.device)
        ratios = []
        for pixels in self.validation.pixels.split(VALIDATION_BATCH):
            images = to_signed(pixels).to(self.device)
            with autocast(self.device, self.recipe.precision):
                indices = tokenizer.encode(images)
                decoded = tokenizer.decode(indices)
            counts += torch.bincount(indices.flatten(), minlength=len(counts))
            ratios.append(psnr(decoded.float(), images))
        share = counts.double() / counts.sum()
        return {
            "validation_psnr": round(float(torch.cat(ratios).mean()), 3),
            "codebook_usage": round(float((counts > 0).double().mean()), 4),
            "codebook_perplexity": round(float(torch.special.entr(share).sum().exp()), 1),
        }


def pixel_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 + L2 + the L1 of differences between neighbours at several scales; scalar."""
    error = decoded - images
    loss = error.abs().mean() + error.square().mean()
    for scale in EDGE_SCALES:
        # Averaging and differences are linear: those of the error are the errors of those.
        scaled = F.avg_pool2d(error, scale) if scale > 1 else error
        edges = scaled.diff(dim=2).abs().mean() + scaled.diff(dim=3).abs().mean()
        loss = loss + edges / len(EDGE_SCALES)
    return loss


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image [B], both [B, 3, H, W], images in [-1, 1]."""
    error = (decoded.clamp(-1, 1) - images) / 2
    return -10 * error.square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


def kmeans(latents: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres [count, d] of unit vectors [n, d], n >= count, unit as well: spherical k-means.

    The first centres are drawn far from one another (k-means++), so that the many latents of a
    blank background do not take most of them.
    """
    if len(latents) < count:
        raise TrainingError(
            f"{len(latents)} latents are too few for a codebook of {count}: give more images or a "
            "smaller --codebook-size"
        )
    first = torch.randint(len(latents), (1,), generator=generator)
    centres = [latents[int(first)]]
    nearest = 1 - latents @ centres[0]
    for _ in range(count - 1):
        weights = nearest.clamp_min(1e-9).cpu()
        chosen = int(torch.multinomial(weights, 1, generator=generator))
        centres.append(latents[chosen])
        nearest = torch.minimum(nearest, 1 - latents @ centres[-1])
    rows = torch.stack(centres)
    for _ in range(KMEANS_ROUNDS):
        assigned = (latents @ rows.T).argmax(dim=1)
        sums = torch.zeros_like(rows).index_add_(0, assigned, latents)
        rows = torch.where(sums.norm(dim=1, keepdim=True) > 1e-6, F.normalize(sums, dim=1), rows)
    return rows


@torch.inference_mode()
def reconstruct(tokenizer: VQTokenizer, pixels: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] up to overshoot, through the codebook and back.

    pixels: [B, H, W, 3] uint8.
    """
    device = next(tokenizer.parameters()).device
    return tokenizer.decode(tokenizer.encode(to_signed(pixels).to(device)))
