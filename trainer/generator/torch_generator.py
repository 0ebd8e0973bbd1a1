"""A generator in torch, as the search of registry.decoding asks it: what `OnnxGenerator` is to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from registry.bundles.prompt import Prompt
from registry.decoding.item_vectors import Floats
from registry.decoding.sid_index import Ints, Sid, SidIndex
from trainer.generator.items import PastOccurrences
from trainer.generator.model import GeneratorForCausalLM

# Prompts of one forward: padded to the longest of them, which are of nearly the same length.
_ROWS_PER_FORWARD = 256


class TorchGenerator:
    """`registry.decoding.beam.Generator` and `ItemScorer` over a model, without gradients.

    The states stay on the model's device. What `encode` returns are their numbers (B,), which the search only
    passes on; equal prompts under equal contexts have one state, and what is asked of it twice in one call is
    computed once. So the same histories can be searched under several rules at little cost.
    """

    def __init__(self, model: GeneratorForCausalLM) -> None:
        """The model's weights must not change while this is in use."""
        self.sizes = tuple(model.config.sizes)
        self._model = model.eval()
        self._device = model.lm_head.weight.device
        prompt = Prompt(self.sizes, model.config.max_items)
        self._bases = np.array([prompt.code_base(level) for level in range(len(self.sizes))], dtype=np.int64)
        self._states = torch.zeros(0, model.config.hidden_size, device=self._device)
        self._number_of: dict[bytes, int] = {}
        self._cached_matrix: tuple[NDArray[np.uint16], Floats] | None = None

    @property
    def items(self) -> TorchGenerator | None:
        """The dense head; None where the model has no item."""
        return self if len(self._model.model.items.keys) else None

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[Sequence[Sid]], contexts: Sequence[Sequence[int]] | None = None
    ) -> NDArray[np.generic]:
        """B prompts of SIDs, oldest first, and contexts (B, C) of token ids -> their states' numbers (B,)."""
        sids = [np.asarray(prompt, dtype=np.int64).reshape(-1, len(self.sizes)) for prompt in prompts]
        about = None if contexts is None else np.asarray(contexts, dtype=np.int64)
        keys = [
            row.tobytes() + b"|" + (b"" if about is None else about[at].tobytes())
            for at, row in enumerate(sids)
        ]
        first = {key: at for at, key in reversed(list(enumerate(keys))) if key not in self._number_of}
        new = sorted(first.values(), key=lambda at: (len(sids[at]), at))
        for low in range(0, len(new), _ROWS_PER_FORWARD):
            rows = new[low : low + _ROWS_PER_FORWARD]
            lengths = np.array([len(sids[row]) for row in rows], dtype=np.int64)
            codes = np.zeros((len(rows), max(1, int(lengths.max())), len(self.sizes)), dtype=np.int64)
            for place, row in enumerate(rows):
                codes[place, : len(sids[row])] = sids[row] + self._bases
            context = None if about is None else torch.from_numpy(about[rows]).to(self._device)
            states = self._model.encode(
                torch.from_numpy(codes).to(self._device), torch.from_numpy(lengths).to(self._device),
                context=context,
            )  # fmt: skip
            self._number_of.update((keys[row], len(self._states) + at) for at, row in enumerate(rows))
            self._states = torch.cat((self._states, states.float()))
        return np.array([self._number_of[key] for key in keys], dtype=np.int64)

    def states(self, numbers: NDArray[np.generic]) -> Tensor:
        """The states (N, D) of numbers (N,), on the model's device."""
        return self._states[torch.from_numpy(numbers.astype(np.int64)).to(self._device)]

    @torch.no_grad()
    def step(self, state: NDArray[np.generic], prefix: Ints) -> Floats:
        """Numbers of states (N,) and chosen codes (N, l) -> log-probabilities (N, K_l), float32."""
        level = prefix.shape[1]
        asked, place = np.unique(
            np.concatenate((state.astype(np.int64)[:, None], prefix), axis=1), axis=0, return_inverse=True
        )
        tokens = torch.from_numpy(asked[:, 1:] + self._bases[:level]).to(self._device) if level else None
        log_probs = self._model.step(level, self.states(asked[:, 0]), tokens)
        answers: Floats = log_probs.float().cpu().numpy()[place.ravel()]
        return answers

    def add_new_items(self, index: SidIndex, title_of: Callable[[str], str]) -> None:
        """Nothing: the item table has the texts of all items."""

    @torch.no_grad()
    def project_queries(self, state: NDArray[np.generic]) -> Floats:
        """Numbers of states (R,) -> queries (R, D)."""
        queries: Floats = self._model.model.queries(self.states(state)).float().cpu().numpy()
        return queries

    @torch.no_grad()
    def item_matrix(self, index: SidIndex) -> Floats:
        """The vectors (N, D) of an index's items in leaf order; computed once for each tree."""
        if self._cached_matrix is None or self._cached_matrix[0] is not index.sids:
            codes = torch.from_numpy(index.sids.astype(np.int64) + self._bases).to(self._device)
            self._cached_matrix = (index.sids, self._model.model.embed_items(codes).float().cpu().numpy())
        return self._cached_matrix[1]

    @torch.no_grad()
    def repeat_bias(self, query: Floats, owner: Ints, distances: Ints, counts: Ints) -> Floats:
        """The addend (n,) to the logits of n items of histories, as of `ItemVectors.repeat_bias`."""
        queries, last, frequency = (
            torch.from_numpy(values).to(self._device) for values in (query[owner], distances, counts)
        )
        bias: Floats = (
            self._model.model.items.repeat_bias(
                queries, PastOccurrences(last[:, None], frequency[:, None])
            )[:, 0].cpu().numpy()
        )  # fmt: skip
        return bias
