"""Claim: serving's beam gives the items of transformers `generate`, in the same order, in a fraction of the
time.

Both decode the same weights for the same histories of the Online Retail year, one request at a time, over the
same SIDs: serving by ONNX Runtime and the index, transformers by `prefix_allowed_tokens_fn` over a dictionary
trie. Prints one line of JSON: `same` of `histories` equal item for item, the median milliseconds of both, and
their ratio. Without --bundle a model is made and trained for some steps first.

    python benchmarks/decode.py --histories 100
    python benchmarks/decode.py --bundle FOLDER     # a registered bundle's weights and graphs
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.speed_page import publish
from registry.bundles.bundle import load_bundle
from registry.bundles.embedder import WordLlamaEmbedder
from registry.bundles.prompt import BOS, FIRST_CODE, PAD, Prompt, prompt_sids
from registry.decoding.beam import beam_search
from registry.decoding.onnx_generator import OnnxGenerator
from registry.decoding.sid_index import SidIndex
from registry.settings import CodebookSettings
from streams.replay import OnlineRetail, user_item_sequences
from trainer.codebooks.fit import fit_codebook
from trainer.generator.export import export_generator
from trainer.generator.model import GeneratorForCausalLM, new_generator

Sid = tuple[int, ...]
Ranked = list[tuple[Sid, float]]  # best first
BEAM = 20
# Weights that have learned something give the uneven probabilities that a beam meets in service.
_STEPS, _BATCH, _RATE = 60, 32, 2e-3


def online_retail_sids() -> tuple[tuple[int, ...], dict[str, Sid], list[list[Sid]]]:
    """The codebook's sizes, every item's SID, and every customer's purchases as SIDs, oldest first."""
    shop = OnlineRetail()
    fit = fit_codebook(list(shop.catalogue()), WordLlamaEmbedder(), CodebookSettings.model_validate({}))
    sids = dict(zip(fit.items, fit.sids, strict=True))
    return (
        fit.codebook.sizes,
        sids,
        [[sids[item] for item in past] for _, past in sorted(user_item_sequences(shop).items())],
    )


def token_sequence(prompt: Prompt, sids: Sequence[Sid]) -> list[int]:
    """The token sequence that transformers sees: BOS, then the items' codes."""
    return [BOS, *(token for sid in sids for token in prompt.tokens(sid))]


def train_generator(
    prompt: Prompt, pasts: Sequence[Sequence[Sid]], steps: int, batch: int = _BATCH, **shape: Any
) -> GeneratorForCausalLM:
    """A generator after `steps` steps of next-token training on random pieces of the pasts."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = new_generator(prompt.sizes, FIRST_CODE, prompt.first_word, max_items=prompt.max_items, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    model.train()
    for _ in range(steps):
        rows = []
        for at in rng.integers(0, len(pasts), batch):
            begin = int(rng.integers(0, max(1, len(pasts[at]) - prompt.max_items)))
            rows.append(token_sequence(prompt, pasts[at][begin : begin + prompt.max_items]))
        ids = torch.full((batch, max(map(len, rows))), PAD)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
        loss = model(ids, labels=torch.where(ids == PAD, -100, ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def transformers_decoder(
    model: GeneratorForCausalLM, prompt: Prompt, sids: Sequence[Sid]
) -> Callable[[Sequence[Sequence[Sid]]], list[Ranked]]:
    """transformers' beam search over the SIDs: histories -> for each the best SIDs and their scores."""
    trie: dict[tuple[int, ...], set[int]] = {}
    for sid in sids:
        tokens = prompt.tokens(sid)
        for level, token in enumerate(tokens):
            trie.setdefault(tuple(tokens[:level]), set()).add(token)
    children = {prefix: sorted(tokens) for prefix, tokens in trie.items()}

    def decode(histories: Sequence[Sequence[Sid]]) -> list[Ranked]:
        rows = [token_sequence(prompt, history) for history in histories]
        start = max(map(len, rows))
        ids = torch.tensor([[PAD] * (start - len(row)) + row for row in rows])
        generated = model.generate(
            ids, attention_mask=(ids != PAD).long(), num_beams=BEAM, num_return_sequences=BEAM,
            length_penalty=0.0, max_new_tokens=len(prompt.sizes), do_sample=False, use_cache=False,
            prefix_allowed_tokens_fn=lambda _, tokens: children[tuple(tokens[start:].tolist())],
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        sids_found = [prompt.sid(row[start:].tolist()) for row in generated.sequences]
        ranked = list(zip(sids_found, generated.sequences_scores.tolist(), strict=True))
        return [ranked[at : at + BEAM] for at in range(0, len(ranked), BEAM)]

    return decode


def serving_decoder(
    folder: Path, prompt: Prompt, sids: Sequence[Sid], threads: int
) -> Callable[[Sequence[Sequence[Sid]]], list[Ranked]]:
    """Serving's beam search over the same SIDs, from the graphs in `folder`."""
    index = SidIndex.build(np.array(sids), [str(row) for row in range(len(sids))])
    generator = OnnxGenerator(folder, prompt.sizes, prompt.max_items, threads)

    def decode(histories: Sequence[Sequence[Sid]]) -> list[Ranked]:
        count = len(histories)
        rankings = beam_search(generator, index, histories, [()] * count, [BEAM] * count, BEAM)
        return [
            [
                (tuple(index.sid(leaf)), score)
                for leaf, score in zip(ranking.leaves, ranking.scores.tolist(), strict=True)
            ]
            for ranking in rankings
        ]

    return decode


def timed_decode(
    decode: Callable[[Sequence[Sequence[Sid]]], list[Ranked]], histories: Sequence[Sequence[Sid]]
) -> tuple[list[Ranked], float]:
    """All answers, asked one by one after a warm-up, and the median time of one in milliseconds."""
    decode(histories[:1])
    answers, spent = [], []
    for history in histories:
        begun = time.perf_counter()
        answers += decode([history])
        spent.append(1e3 * (time.perf_counter() - begun))
    return answers, median(spent)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--bundle", type=Path, help="folder of a bundle; default: a model made here")
    parser.add_argument("--steps", type=int, default=_STEPS, help="training steps of the model made here")
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--publish", action="store_true", help="put the figures into docs/results/speed.md")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sizes, sids, pasts = online_retail_sids()
    with tempfile.TemporaryDirectory() as generated:
        if options.bundle:
            bundle = load_bundle(options.bundle)
            prompt, folder = bundle.prompt, bundle.path
            if prompt.sizes != sizes:
                parser.error(
                    f"the bundle's codebook has sizes {prompt.sizes}, the Online Retail year's {sizes}"
                )
            model = GeneratorForCausalLM.from_pretrained(bundle.model).eval()
        else:
            prompt, folder = Prompt(sizes, 50), Path(generated)
            model = train_generator(prompt, pasts, options.steps)
            export_generator(model, folder)
        torch.set_num_threads(options.threads)
        chosen = np.random.default_rng(0).permutation(len(pasts))[: options.histories]
        histories = [prompt_sids(pasts[at], None, prompt.max_items) for at in chosen]
        all_sids = sorted(sids.values())
        ours, ours_ms = timed_decode(serving_decoder(folder, prompt, all_sids, options.threads), histories)
        theirs, theirs_ms = timed_decode(transformers_decoder(model, prompt, all_sids), histories)
    equal_answers = sum(
        [sid for sid, _ in left] == [sid for sid, _ in right]
        for left, right in zip(ours, theirs, strict=True)
    )
    largest_difference = max(
        abs(mine - other)
        for left, right in zip(ours, theirs, strict=True)
        for (_, mine), (_, other) in zip(left, right, strict=True)
    )
    result = {
        "histories": len(histories), "items": len(all_sids), "beam": BEAM,
        "parameters": model.num_parameters(), "threads": options.threads, "same": equal_answers,
        "largest_score_difference": largest_difference, "serving_ms": round(ours_ms, 2),
        "transformers_ms": round(theirs_ms, 2), "ratio": round(theirs_ms / ours_ms, 1),
    }  # fmt: skip
    print(json.dumps({"benchmark": "decode"} | result))
    if options.publish:
        publish(
            "serving's beam is transformers generate, faster",
            "UCI Online Retail",
            "benchmarks.decode",
            result,
        )


if __name__ == "__main__":
    main()
