"""RQ-VAE: an encoder whose output is quantised level by level, trained to reconstruct the vector.

With r_0 = Enc(x): c_l = argmin_k |r_{l-1} - e_{l,k}|^2, r_l = r_{l-1} - e_{l,c_l}, z = sum_l e_{l,c_l},
L = |x - Dec(z)|^2 + sum_l (|sg[r_{l-1}] - e_{l,c_l}|^2 + beta |r_{l-1} - sg[e_{l,c_l}]|^2),
straight-through for the decoder (Lee et al. 2022, arXiv 2203.01941; for SIDs: Rajput et al. 2023, arXiv
2305.05065).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from registry.bundles.codebook import Layer
from trainer.codebooks.kmeans import code_means, kmeans, mask_changed_codes, nearest_centroids
from trainer.tuning.checkpoint import (
    Checkpoint,
    optimizer_tensors,
    restore,
    restore_optimizer,
    snapshot,
)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

HIDDEN = (256, 128)
CODE_DIM = 32
COMMITMENT = 0.25
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
BATCH = 1024
EPOCHS = 100
EPOCHS_BETWEEN_CHECKPOINTS = 10


@dataclass(frozen=True)
class FittedRqvae:
    """The trained layers of the encoder, and the centroids (K, CODE_DIM) of each level."""

    encoder: tuple[Layer, ...]
    centroids: tuple[Float32, ...]


class RQVAE(nn.Module):
    """Encoder, residual codebooks, decoder."""

    def __init__(self, dim: int, sizes: Sequence[int]) -> None:
        super().__init__()
        widths = (dim, *HIDDEN, CODE_DIM)
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        self.codes = nn.ParameterList(nn.Parameter(torch.zeros(size, CODE_DIM)) for size in sizes)

    def quantise(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Straight-through codes of latents (B, d): their sum (B, d), the loss (), the codes (B, L)."""
        residual, total, loss = latent, torch.zeros_like(latent), latent.new_zeros(())
        chosen = []
        for level in self.codes:
            with torch.no_grad():
                code = ((level**2).sum(1) - 2.0 * residual @ level.T).argmin(1)
            vector = level[code]
            loss = loss + (residual.detach() - vector).pow(2).sum(1).mean()
            loss = loss + COMMITMENT * (residual - vector.detach()).pow(2).sum(1).mean()
            residual = residual - vector
            total = total + vector
            chosen.append(code)
        return latent + (total - latent).detach(), loss, torch.stack(chosen, dim=1)

    def forward(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss () of reconstructing `targets` (B, D) from `rows` (B, D), and the codes (B, L)."""
        quantised, loss, codes = self.quantise(self.encoder(rows))
        return (self.decoder(quantised) - targets).pow(2).sum(1).mean() + loss, codes


def fit_rqvae(
    rows: Float32,
    sizes: Sequence[int],
    seed: int,
    *,
    optional: int = 0,
    old: Int64 | None = None,
    progress: Callable[[int], None] | None = None,
    runs: Path | None = None,
) -> FittedRqvae:
    """Train on rows (N, D), sizes[l] codes at level l. `progress(1)` is called once an epoch.

    Below `runs` a fit that was cut off finds its checkpoint by its inputs, and goes on from it to the very
    codes of an unbroken one; the checkpoints of other inputs there are removed.

    `optional`: the number of last columns that later items may lack; a quarter of the rows of a batch are
    encoded without them. `old`: the rows' codes (N, >= len(sizes)) in the codebook before, -1 for new rows:
    training starts at their means, so that a code keeps its meaning.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RQVAE(rows.shape[1], sizes)
    data = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    checkpoint = _checkpoint(runs, data, sizes, seed, optional, old) if runs else None
    saved = checkpoint.load() if checkpoint else None
    if saved is None:
        _initialise_codes(model, data, seed, old)
    else:
        restore(model, saved.tensors["weights"])
        restore_optimizer(optimiser, saved.tensors["optimizer"])
        generator.set_state(saved.tensors["generator"]["state"])
    for epoch in range(saved.state["epochs"] if saved else 0, EPOCHS):
        used_codes = [torch.zeros(size, dtype=torch.bool) for size in sizes]
        for batch in torch.randperm(len(data), generator=generator).split(BATCH):
            targets = data[batch]
            inputs = targets
            if optional:
                inputs = targets.clone()
                inputs[torch.rand(len(batch), generator=generator) < 0.25, -optional:] = 0.0
            loss, codes = model(inputs, targets)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            for level, column in zip(used_codes, codes.T, strict=True):
                level[column] = True
        # No restarts in the last fifth of the epochs: a code would have no time to converge.
        if epoch < 0.8 * EPOCHS:
            _restart_unused_codes(model, data, used_codes, generator)
        if checkpoint and (epoch + 1) % EPOCHS_BETWEEN_CHECKPOINTS == 0:
            tensors = {"weights": snapshot(model), "optimizer": optimizer_tensors(optimiser)}
            random_state = {"state": generator.get_state()}
            checkpoint.save({**tensors, "generator": random_state}, {"epochs": epoch + 1})
        if progress:
            progress(1)
    return FittedRqvae(
        tuple((_numpy(linear.weight.T), _numpy(linear.bias)) for linear in _linears(model.encoder)),
        tuple(_numpy(level) for level in model.codes),
    )


def _checkpoint(
    runs: Path, data: Tensor, sizes: Sequence[int], seed: int, optional: int, old: Int64 | None
) -> Checkpoint:
    """The checkpoint of a fit, named by its inputs; those of others are removed."""
    about = hashlib.sha256(data.numpy().tobytes())
    about.update(repr((tuple(data.shape), tuple(sizes), seed, optional)).encode())
    about.update(b"" if old is None else np.ascontiguousarray(old).tobytes())
    folder = runs / about.hexdigest()[:16]
    for other in runs.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return Checkpoint(folder)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _linears(mlp: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in mlp if isinstance(layer, nn.Linear)]


@torch.no_grad()
def _initialise_codes(model: RQVAE, data: Tensor, seed: int, old: Int64 | None) -> None:
    """Set the codes by k-means on the untrained encoder's outputs, or to the means of the old codes."""
    residual = model.encoder(data).double().numpy()
    for number, level in enumerate(model.codes):
        if old is None:
            centroids = kmeans(residual, len(level), seed + number)
        else:
            # Without k-means iterations, which would move the codes away from the trained ones.
            centroids = code_means(residual, old[:, number], len(level), seed + number)
        level.copy_(torch.from_numpy(centroids))
        codes = nearest_centroids(residual, centroids)
        if old is not None:
            old = mask_changed_codes(old, codes, number)
        residual = residual - centroids[codes]


@torch.no_grad()
def _restart_unused_codes(
    model: RQVAE, data: Tensor, used_codes: Sequence[Tensor], generator: torch.Generator
) -> None:
    """Codes without a row in an epoch restart at the residuals of random rows."""
    if all(bool(level.all()) for level in used_codes):
        return
    sample = data[torch.randint(len(data), (BATCH,), generator=generator)]
    residual = model.encoder(sample)
    for level, used in zip(model.codes, used_codes, strict=True):
        unused = (~used).nonzero()[:, 0]
        level[unused] = residual[torch.randint(len(residual), (len(unused),), generator=generator)]
        near = ((level**2).sum(1) - 2.0 * residual @ level.T).argmin(1)
        residual = residual - level[near]


def _numpy(tensor: Tensor) -> Float32:
    return np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32)
