"""The frozen quantiser: a text embedding becomes a semantic ID, one item a SID.

Residual quantisation: level by level the nearest centroid, then what it leaves over, scaled to unit length.
Without the scaling a level is ruled by the length of what is left (on 3,659 shop titles one code of 64 took
1,027 of them; with it, 164).
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

from registry.prompt import Sid
from streams.errors import SidstreamError

FORMAT = 1
# An SID's code is a u16 in a packed history.
MAX_CODES = 65_536

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Centroids a level, each float32 (K_l, D), for the vectors of one embedder."""

    embedder: str
    centroids: tuple[Float32, ...]

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

    @cached_property
    def id(self) -> str:
        """16 hex digits of the hash of the embedder's name and the centroids."""
        digest = hashlib.sha256(json.dumps([FORMAT, self.embedder, self.sizes, self.dim]).encode())
        for level in self.centroids:
            digest.update(np.ascontiguousarray(level, dtype="<f4").tobytes())
        return digest.hexdigest()[:16]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes a level."""
        return tuple(len(level) for level in self.centroids)

    @property
    def dim(self) -> int:
        """Length of the vectors that it quantises."""
        return int(self.centroids[0].shape[1])

    @cached_property
    def _wide(self) -> tuple[Float64, ...]:
        # Double precision: a batch and a single vector must find the same nearest centroid.
        return tuple(level.astype(np.float64) for level in self.centroids)

    def candidates(self, vector: npt.ArrayLike) -> Iterator[Sid]:
        """Every SID there is, nearest first; the same vector (D,) gives the same order.

        The greedy SID, its siblings by the last code's distance, the same below the next-nearest prefix, ...
        """
        row = np.asarray(vector, dtype=np.float64)
        if row.shape != (self.dim,):
            raise SidstreamError(
                f"a vector of shape {row.shape} does not fit a codebook of {self.dim} dimensions"
            )
        yield from self._walk(row, ())

    def _walk(self, residual: Float64, prefix: Sid) -> Iterator[Sid]:
        level = len(prefix)
        order = np.argsort(_distances(residual[None], self._wide[level])[0], kind="stable").tolist()
        if level == len(self.centroids) - 1:
            for code in order:
                yield (*prefix, code)
            return
        for code in order:
            yield from self._walk(unit(residual - self._wide[level][code]), (*prefix, code))

    def quantise(self, vectors: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], Float64]:
        """Greedy codes int64 (N, L) of vectors (N, D), and what is left over before the last level (N, D)."""
        residual = np.asarray(vectors, dtype=np.float64)
        if residual.ndim != 2 or residual.shape[1] != self.dim:
            raise SidstreamError(
                f"vectors of shape {residual.shape} do not fit a codebook of {self.dim} dimensions"
            )
        codes = np.empty((len(residual), len(self.centroids)), dtype=np.int64)
        last = len(self.centroids) - 1
        for level, centroids in enumerate(self._wide):
            codes[:, level] = _distances(residual, centroids).argmin(axis=1)
            if level < last:
                residual = unit(residual - centroids[codes[:, level]])
        return codes, residual

    def assign(self, vectors: npt.ArrayLike, taken: Collection[Sid] = ()) -> list[Sid]:
        """One SID a vector (N, D), in order: the nearest slot that is free.

        Free: neither in `taken` (which is not changed) nor given to an earlier vector. Raises SidstreamError
        when every slot is taken.
        """
        used = set(taken)
        codes, residual = self.quantise(vectors)
        # Almost every item finds a slot below its own prefix: those orders come from one product.
        orders = np.argsort(_distances(residual, self._wide[-1]), axis=1, kind="stable")
        given: list[Sid] = []
        for row, (greedy, order) in enumerate(zip(codes.tolist(), orders.tolist(), strict=True)):
            prefix = tuple(greedy[:-1])
            near = ((*prefix, code) for code in order)
            sid = next((slot for slot in near if slot not in used), None)
            if sid is None:
                every = self.candidates(np.asarray(vectors)[row])
                sid = next((slot for slot in every if slot not in used), None)
            if sid is None:
                raise SidstreamError(
                    f"all {int(np.prod(self.sizes))} SIDs of codebook {self.id} are taken; fit a larger one"
                )
            used.add(sid)
            given.append(sid)
        return given

    def save(self, path: Path) -> None:
        """Write one safetensors file; equal codebooks give equal bytes."""
        # One metadata entry: safetensors writes several in no fixed order, and bundles hash this file.
        about = json.dumps({"format": FORMAT, "id": self.id, "embedder": self.embedder})
        tensors = {f"level_{level}": np.ascontiguousarray(c) for level, c in enumerate(self.centroids)}
        save_file(tensors, str(path), metadata={"codebook": about})

    @classmethod
    def load(cls, path: Path) -> Codebook:
        """Read what `save` wrote. Raises SidstreamError where the file is no codebook or was changed."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                about = json.loads((file.metadata() or {})["codebook"])
                levels = tuple(file.get_tensor(f"level_{level}") for level in range(len(file.keys())))
            if about["format"] != FORMAT:
                raise SidstreamError(
                    f"{path} has codebook format {about['format']}; this version reads {FORMAT}"
                )
            made = cls(about["embedder"], levels)
            wanted = about["id"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SidstreamError(
                f"{path} is no codebook ({error}); fetch it from the registry again"
            ) from error
        if made.id != wanted:
            raise SidstreamError(
                f"{path} was changed: its content is {made.id}, its name {wanted}; fetch it again"
            )
        return made


def unit(rows: Float64) -> Float64:
    """Rows scaled to length 1; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: Float64 = rows / np.where(length > 0, length, 1.0)
    return scaled


def _distances(rows: Float64, centroids: Float64) -> Float64:
    """Squared distances (N, K), less the rows' own lengths, which do not change an order."""
    made: Float64 = (centroids**2).sum(axis=1) - 2.0 * (rows @ centroids.T)
    return made
