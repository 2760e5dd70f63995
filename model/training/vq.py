"""The image tokenizer's losses and its learner: reconstruction, quantisation, and a codebook that is used."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wallaroo.model.config import VQ_FACTOR
from wallaroo.model.training.data import shuffled
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.vq import VQModel, to_float


class VQLosses(nn.Module):
    """Reconstruction and quantisation losses.

    Straight-through estimator and commitment of weight 0.25 (van den Oord et al. 2017) on normalised
    vectors; reconstruction is the sum of mean absolute and mean squared error.

    Args:
        vq: Image tokenizer.
        alike: Weight of `unlike`.

    Attributes:
        last: Latents of the last forward, `(n, 8)`.
        last_keys: Their `patch_keys`, int64 `(n,)`.
    """

    def __init__(self, vq: VQModel, alike: float = 0.0):
        super().__init__()
        self.vq, self.alike = vq, alike
        self.last = torch.zeros(0, vq.quantize.embedding.embedding_dim)
        self.last_keys = torch.zeros(0, dtype=torch.int64)

    def forward(self, batch: Sequence[Tensor], quantised: bool = True) -> dict[str, Tensor]:
        """Computes the losses of pictures, and sets `last` and `last_keys`.

        Args:
            batch: Pictures of each size, `(B, 3, H, W)` from -1 to 1.
            quantised: Whether the decoder gets codebook entries instead of latents.

        Returns:
            Name -> loss, to be added.
        """
        device = self.vq.quant_conv.weight.device
        given = [pixels.to(device, non_blocking=True) for pixels in batch]
        latents = [self.vq.encode(pixels) for pixels in given]
        losses: dict[str, Tensor] = {}
        for pixels, points in zip(given, latents, strict=True):
            for name, loss in self._of_size(pixels, points, quantised).items():
                losses[name] = losses.get(name, 0.0) + loss / len(batch)
        flat = torch.cat([points.movedim(1, -1).flatten(0, 2) for points in latents])
        self.last, self.last_keys = flat.detach(), torch.cat([patch_keys(pixels) for pixels in given])
        if self.alike:
            means, kinds = kind_means(self.last, self.last_keys)
            losses["alike"] = self.alike * unlike(flat, means, kinds)
            if quantised:
                # The entry of a kind is the one nearest to its mean.
                codebook = self.vq.codebook()
                assigned = unlike(flat, codebook, (means @ codebook.T).argmax(-1)[kinds])
                losses["alike"] = losses["alike"] + self.alike * assigned
        return losses

    def _of_size(self, pixels: Tensor, latents: Tensor, quantised: bool) -> dict[str, Tensor]:
        losses = {}
        fed = latents
        if quantised:
            with torch.no_grad():
                tokens = self.vq.quantise(latents)
            entries = F.embedding(tokens, self.vq.codebook()).movedim(-1, 1)
            losses["codebook"] = F.mse_loss(entries, latents.detach())
            losses["commitment"] = 0.25 * F.mse_loss(latents, entries.detach())
            fed = latents + (entries - latents).detach()
        made = self.vq.decoder(self.vq.post_quant_conv(fed.contiguous()))
        losses["absolute"], losses["squared"] = F.l1_loss(made, pixels), F.mse_loss(made, pixels)
        return losses


def patch_keys(pixels: Tensor) -> Tensor:
    """Hashes the patches of pictures.

    Args:
        pixels: `(B, 3, H, W)` from -1 to 1.

    Returns:
        int64 `(B * h * w,)`, the same for equal patches.
    """
    side = VQ_FACTOR
    levels = ((pixels + 1) * 127.5).round().long()
    patches = levels.unfold(2, side, side).unfold(3, side, side).movedim(1, 3).flatten(0, 2).flatten(1)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (patches.shape[1],), generator=generator).to(pixels.device)
    return (patches * factors).sum(1)  # whole numbers that wrap around: no two kinds of patches meet


def kind_means(latents: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Averages latents of equal patches.

    Args:
        latents: `(n, 8)`.
        keys: Of their patches, `(n,)`.

    Returns:
        The mean of each kind of patch, unit vectors `(kinds, 8)`, and the kind of each latent, `(n,)`.
    """
    kinds, place = keys.unique(return_inverse=True)
    sums = latents.new_zeros(len(kinds), latents.shape[1]).index_add_(0, place, latents)
    return F.normalize(sums, dim=-1), place


ALIKE_TEMPERATURE = 0.05
"""Divides the similarities in `unlike`."""


def unlike(latents: Tensor, centres: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of classifying latents by the nearest centre (prototypes, Snell et al. 2017).

    With one centre for each kind of patch it pulls equal patches together, and pushes others apart.

    Args:
        latents: `(n, 8)`.
        centres: `(m, 8)`.
        wanted: Centre of each latent, `(n,)`.

    Returns:
        Mean loss, `()`.
    """
    return F.cross_entropy(latents @ centres.T / ALIKE_TEMPERATURE, wanted)


def spread_codebook(latents: Tensor, entries: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """Finds a codebook by k-means on the sphere, started as k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        latents: Unit vectors `(n, 8)`.
        entries: Number of codebook entries.
        generator: Decides the start.
        rounds: Of k-means; an entry that loses its members keeps its place.

    Returns:
        Unit vectors `(entries, 8)`.
    """
    first = int(torch.randint(len(latents), (1,), generator=generator))
    chosen = [latents[first]]
    distance = (latents - chosen[0]).square().sum(-1)
    for _ in range(entries - 1):
        draw = torch.multinomial(distance.clamp_min(1e-9), 1, generator=generator)
        chosen.append(latents[int(draw)])
        distance = torch.minimum(distance, (latents - chosen[-1]).square().sum(-1))
    centres = torch.stack(chosen)
    for _ in range(rounds):
        nearest = (latents @ centres.T).argmax(-1)
        total = torch.zeros_like(centres).index_add_(0, nearest, latents)
        used = torch.bincount(nearest, minlength=entries) > 0
        centres[used] = F.normalize(total[used], dim=-1)
    return centres


class VQLearner:
    """Trains the image tokenizer of a model on pictures, two sizes a batch; see `loop.Learner`.

    The first `plain` steps train encoder and decoder alone; then the codebook is set by k-means over the
    latents of the last steps. Every `revive` steps unused entries move to where different patches share an
    entry. Equal patches count once in both, or a plain background would take most of the entries.

    Args:
        vq: Image tokenizer of a model.
        pictures: uint8 `(H, W, 3)` each.
        recipe: The stage.
    """

    KEPT = 40000
    """Latents that are remembered."""

    flops_per_token = 0.0

    def __init__(self, vq: VQModel, pictures: Sequence[np.ndarray], recipe: Recipe):
        # Convolutions of few channels are quicker so, on CPUs too.
        vq.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = VQLosses(vq, recipe.alike)
        for name, parameter in vq.named_parameters():
            parameter.requires_grad_(name.startswith(recipe.learn) if recipe.learn else True)
        self.recipe = recipe
        self.by_size: dict[tuple[int, ...], list[np.ndarray]] = {}
        for picture in pictures:
            self.by_size.setdefault(picture.shape[:2], []).append(picture)
        self.latents, self.keys = self.module.last, self.module.last_keys

    def batch(self, step: int, piece: int) -> tuple[Any, ...]:
        """Makes a piece of a step: pictures of two sizes.

        Args:
            step: Number of the step.
            piece: Number of the piece, below `recipe.accumulate`.

        Returns:
            The arguments of the module's forward: float pictures `[B, 3, H, W]` of each size, and whether the
            codebook is used.
        """
        sizes = sorted(self.by_size)
        # Two sizes a step, and in the end all pairs, so that equal patches meet across sizes too.
        share, times = self.recipe.share(1)["vq"], step // len(sizes)
        pair = (step % len(sizes), (step + 1 + times) % len(sizes))
        made = []
        for number, count in enumerate((share - share // 2, share // 2)):
            pictures = self.by_size[sizes[pair[number]]]
            first = (times * self.recipe.accumulate + piece) * count
            chosen = shuffled(len(pictures), first, count, self.recipe.seed + number)
            if count:
                made.append(to_float(torch.from_numpy(np.stack([pictures[index] for index in chosen]))))
        return made, step >= self.recipe.plain

    def counts(self, batch: Sequence[Tensor], quantised: bool) -> dict[str, int]:
        """Counts what the means of losses are taken over.

        Args:
            batch: Pictures of each size, as `batch` gave them.
            quantised: Whether the codebook is used.

        Returns:
            Name of the loss -> tokens; and `tokens`.
        """
        names = ["absolute", "squared"]
        if quantised:
            names += ["codebook", "commitment"]
        if self.recipe.alike:
            names.append("alike")
        tokens = sum(pixels[:, 0].numel() for pixels in batch) // VQ_FACTOR**2
        return dict.fromkeys((*names, "tokens"), tokens)

    def after_step(self, step: int) -> dict[str, float]:
        """Sets the codebook, or revives unused entries, where the step is one for it.

        Returns:
            Metrics of the codebook; none where they are not due.
        """
        vq, recipe = self.module.vq, self.recipe
        self.latents = torch.cat((self.latents, self.module.last.cpu()))[-self.KEPT :]
        self.keys = torch.cat((self.keys, self.module.last_keys.cpu()))[-self.KEPT :]
        revive = bool(recipe.revive) and step % recipe.revive == 0
        if step % recipe.log_every and step != recipe.plain and not revive:
            return {}
        generator = torch.Generator().manual_seed(recipe.seed * 1000003 + step)
        with torch.no_grad():
            codebook = vq.quantize.embedding.weight
            means, place = kind_means(self.latents, self.keys)
            if step == recipe.plain:
                codebook.copy_(spread_codebook(means, len(codebook), generator))
            entries = vq.codebook().cpu()
            nearest, own = (means @ entries.T).max(-1)
            tokens = (self.latents @ entries.T).argmax(-1)
            used = torch.bincount(tokens, minlength=len(entries)) > 0
            if revive and recipe.plain < step < 0.8 * recipe.steps:
                closest = torch.full((len(entries),), -1.0).scatter_reduce(0, own, nearest, "amax")
                away = (1 - nearest).clamp_min(1e-6) * (nearest < closest[own])
                count = min(int((~used).sum()), int((away > 0).sum()))
                if count:
                    free = (~used).nonzero().flatten()[:count].to(codebook.device)
                    taken = torch.multinomial(away, count, generator=generator)
                    codebook[free] = means[taken].to(codebook.device)
        return {
            "codebook_used": float(used.float().mean()),
            "same_token": float((tokens == own[place]).float().mean()),
        }

    def extra_state(self) -> dict[str, Tensor]:
        """The latents of the last steps, and the keys of their patches."""
        return {"latents": self.latents, "keys": self.keys}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `extra_state` gave."""
        self.latents, self.keys = state["latents"], state["keys"]
