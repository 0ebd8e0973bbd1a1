"""The frozen quantiser: an embedding becomes a semantic ID, one item a SID.

Residual quantisation: each level takes the nearest centroid and hands the residual (vector minus centroid)
to the next level. With centroids of k-means the residual is scaled to unit length: without the scaling its
length decides the code (on 3,659 shop titles one code of 64 took 1,027 of them; with it, 164). The centroids
of an RQ-VAE quantise the output of its encoder, and the residual is not scaled. The encoder is part of the
codebook, as plain matrices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from registry.bundles.prompt import Sid
from streams.errors import SidstreamError

# 1: centroids alone, residuals scaled. 2: an encoder, a collaborative part, or residuals that are not scaled.
FORMATS = (1, 2)
# An SID's code is a u16 in a packed history.
MAX_CODES = 65_536

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
# Weight (in, out) and bias (out,) of one layer of an encoder.
Layer = tuple[Float32, Float32]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Centroids a level, each float32 (K_l, d), for the vectors (D,) of one embedder.

    `encoder`: the layers of an MLP with ReLU between them, D -> d; without one d is D. `scaled`: residuals
    are scaled to unit length. `collaborative_dims`: how many of the D dimensions, the last ones, come from
    what users did with the item. An item without interactions has zeros there.
    """

    embedder: str
    centroids: tuple[Float32, ...]
    encoder: tuple[Layer, ...] = ()
    scaled: bool = True
    collaborative_dims: int = 0

    def __post_init__(self) -> None:
        shapes = [level.shape for level in self.centroids]
        if (
            not 1 <= len(shapes) <= 8
            or any(len(shape) != 2 or not 1 <= shape[0] <= MAX_CODES for shape in shapes)
            or len({shape[1] for shape in shapes}) != 1
        ):
            raise SidstreamError(f"a codebook has 1 to 8 levels of (K, D) centroids with one D, not {shapes}")
        if any(level.dtype != np.float32 or not np.isfinite(level).all() for level in self.centroids):
            raise SidstreamError("a codebook's centroids are finite float32 numbers")
        widths = [*(weight.shape[0] for weight, _ in self.encoder), shapes[0][1]]
        if any(
            weight.shape != (before, after) or bias.shape != (after,)
            for (weight, bias), before, after in zip(self.encoder, widths, widths[1:], strict=False)
        ):
            raise SidstreamError(f"an encoder's layers lead from its input to {shapes[0][1]} dimensions")
        arrays = [array for layer in self.encoder for array in layer]
        if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays):
            raise SidstreamError("a codebook's encoder has finite float32 weights")
        if not 0 <= self.collaborative_dims < self.dim:
            raise SidstreamError(
                f"{self.collaborative_dims} of {self.dim} dimensions cannot be collaborative"
            )

    @property
    def format(self) -> int:
        """The oldest format of the file that holds all of it."""
        return 1 if self.scaled and not self.encoder and not self.collaborative_dims else 2

    @cached_property
    def id(self) -> str:
        """16 hex digits of the hash of the embedder's name, the encoder and the centroids."""
        header: list[object] = [self.format, self.embedder, self.sizes, self.dim]
        if self.format > 1:
            header += [self.scaled, self.collaborative_dims, [weight.shape for weight, _ in self.encoder]]
        digest = hashlib.sha256(json.dumps(header).encode())
        for array in (*self.centroids, *(array for layer in self.encoder for array in layer)):
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return digest.hexdigest()[:16]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes a level."""
        return tuple(len(level) for level in self.centroids)

    @property
    def dim(self) -> int:
        """Length of the vectors that it quantises."""
        return int((self.encoder[0][0] if self.encoder else self.centroids[0].T).shape[0])

    @cached_property
    def _centroids64(self) -> tuple[Float64, ...]:
        # Double precision: a batch and a single vector must find the same nearest centroid.
        return tuple(level.astype(np.float64) for level in self.centroids)

    @cached_property
    def _encoder64(self) -> tuple[tuple[Float64, Float64], ...]:
        return tuple((weight.astype(np.float64), bias.astype(np.float64)) for weight, bias in self.encoder)

    def encode(self, vectors: npt.ArrayLike) -> Float64:
        """The input of the first level, float64 (N, d), of vectors (N, D).

        Vectors (N, D - collaborative_dims) are the text part alone, of items without interactions.
        """
        rows = np.asarray(vectors, dtype=np.float64)
        if rows.ndim == 2 and self.collaborative_dims and rows.shape[1] == self.dim - self.collaborative_dims:
            rows = np.pad(rows, ((0, 0), (0, self.collaborative_dims)))
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise SidstreamError(
                f"vectors of shape {rows.shape} do not fit a codebook of {self.dim} dimensions"
            )
        for number, (weight, bias) in enumerate(self._encoder64):
            rows = (rows if number == 0 else np.maximum(rows, 0.0)) @ weight + bias
        return rows

    def _next_residual(self, residual: Float64) -> Float64:
        return unit(residual) if self.scaled else residual

    def candidates(self, vector: npt.ArrayLike) -> Iterator[Sid]:
        """Every SID there is, nearest first; the same vector (D,), or its text's part, gives the same order.

        The greedy SID, its siblings by the last code's distance, the same below the next-nearest prefix, ...
        """
        yield from self._walk(self.encode(np.asarray(vector)[None])[0], ())

    def _walk(self, residual: Float64, prefix: Sid) -> Iterator[Sid]:
        level = len(prefix)
        order = np.argsort(_distances(residual[None], self._centroids64[level])[0], kind="stable").tolist()
        if level == len(self.centroids) - 1:
            for code in order:
                yield (*prefix, code)
            return
        for code in order:
            yield from self._walk(
                self._next_residual(residual - self._centroids64[level][code]), (*prefix, code)
            )

    def quantise(self, vectors: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], Float64]:
        """Greedy codes int64 (N, L) of vectors (N, D), and what is left over before the last level (N, d)."""
        residual = self.encode(vectors)
        codes = np.empty((len(residual), len(self.centroids)), dtype=np.int64)
        last = len(self.centroids) - 1
        for level, centroids in enumerate(self._centroids64):
            codes[:, level] = _distances(residual, centroids).argmin(axis=1)
            if level < last:
                residual = self._next_residual(residual - centroids[codes[:, level]])
        return codes, residual

    def assign(self, vectors: npt.ArrayLike, taken: Collection[Sid] = ()) -> list[Sid]:
        """One SID a vector (N, D), in order: the nearest slot that is free.

        Free: neither in `taken` (which is not changed) nor given to an earlier vector. Raises SidstreamError
        when every slot is taken.
        """
        used = set(taken)
        codes, residual = self.quantise(vectors)
        # Almost every item finds a slot below its own prefix: those orders come from one product.
        orders = np.argsort(_distances(residual, self._centroids64[-1]), axis=1, kind="stable")
        assigned: list[Sid] = []
        for row, (greedy, order) in enumerate(zip(codes.tolist(), orders.tolist(), strict=True)):
            prefix = tuple(greedy[:-1])
            siblings = ((*prefix, code) for code in order)
            sid = next((slot for slot in siblings if slot not in used), None)
            if sid is None:
                slots = self.candidates(np.asarray(vectors)[row])
                sid = next((slot for slot in slots if slot not in used), None)
            if sid is None:
                raise SidstreamError(
                    f"all {int(np.prod(self.sizes))} SIDs of codebook {self.id} are taken; fit a larger one"
                )
            used.add(sid)
            assigned.append(sid)
        return assigned

    def save(self, path: Path) -> None:
        """Write one safetensors file; equal codebooks give equal bytes."""
        # One metadata entry: safetensors writes several in no fixed order, and bundles hash this file.
        header: dict[str, object] = {"format": self.format, "id": self.id, "embedder": self.embedder}
        if self.format > 1:
            header |= {"scaled": self.scaled, "collaborative": self.collaborative_dims}
        tensors = {f"level_{level}": np.ascontiguousarray(c) for level, c in enumerate(self.centroids)}
        for number, (weight, bias) in enumerate(self.encoder):
            tensors |= {f"weight_{number}": np.ascontiguousarray(weight), f"bias_{number}": bias}
        save_file(tensors, str(path), metadata={"codebook": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> Codebook:
        """Read what `save` wrote. Raises SidstreamError where the file is no codebook or was changed."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})["codebook"])
                if header["format"] not in FORMATS:
                    raise SidstreamError(
                        f"{path} has codebook format {header['format']}; this version reads {max(FORMATS)}: "
                        "update sidstream"
                    )
                names = set(file.keys())
                levels = [file.get_tensor(f"level_{n}") for n in range(8) if f"level_{n}" in names]
                layers = [
                    (file.get_tensor(f"weight_{n}"), file.get_tensor(f"bias_{n}"))
                    for n in range((len(names) - len(levels)) // 2)
                ]
            codebook = cls(
                header["embedder"], tuple(levels), tuple(layers), header.get("scaled", True),
                header.get("collaborative", 0),
            )  # fmt: skip
            expected_id = header["id"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SidstreamError(
                f"{path} is no codebook ({error}); fetch it from the registry again"
            ) from error
        if codebook.id != expected_id:
            raise SidstreamError(
                f"{path} was changed: its content is {codebook.id}, its name {expected_id}; fetch it again"
            )
        return codebook


def unit(rows: Float64) -> Float64:
    """Rows scaled to length 1; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: Float64 = rows / np.where(length > 0, length, 1.0)
    return scaled


def _distances(rows: Float64, centroids: Float64) -> Float64:
    """Squared distances (N, K), less the rows' own lengths, which do not change an order."""
    distances: Float64 = (centroids**2).sum(axis=1) - 2.0 * (rows @ centroids.T)
    return distances
