"""The bundles of an update cycle: each of its models with everything that serving needs beside it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from registry.bundles.bundle import Bundle, BundleKind, write_bundle
from registry.bundles.context import write as write_context
from registry.bundles.prompt import Sid
from registry.bundles.ranking import write as write_ranking
from registry.bundles.rewards import write as write_rewards
from trainer.cycle_inputs import CycleInputs
from trainer.cycle_result import CycleResult
from trainer.generator.export import check_parity, export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.interactions import items_by_popularity
from trainer.settings import TrainerSettings

# Real histories in the parity check, beside the random ones.
_PARITY_HISTORIES = 32
_LOGGED_SETTINGS = (
    "seed", "members", "width", "layers", "heads", "dropout", "lr", "epochs", "batch_positions", "replay",
    "arithmetic",
)  # fmt: skip


@dataclass(frozen=True)
class BundleWriter:
    """Writes bundles below a cycle's run folder."""

    inputs: CycleInputs
    settings: TrainerSettings
    result: CycleResult
    run_folder: Path

    def write(self, kind: BundleKind, model: GeneratorForCausalLM, reference: str | None = None) -> Bundle:
        """The bundle of a model; `reference`: the id of the bundle that it was aligned from.

        Sets the metric `<kind>/parity`.
        """
        transformers_logging.disable_progress_bar()
        inputs, folder = self.inputs, self.run_folder / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model.save_pretrained(folder / "model")
        inputs.tokenizer.save_pretrained(folder / "model")
        export_generator(model, folder)
        write_ranking(self.result.ranking(), folder)
        write_context(inputs.context, folder)
        write_rewards(inputs.rewards, folder)
        self.result.metrics[f"{kind}/parity"] = check_parity(
            model, folder, self._parity_histories(), self.settings.seed
        )
        return write_bundle(
            folder, kind=kind, codebook=inputs.codebook, popular=self._popular_items(),
            max_items=inputs.prompt.max_items, window=inputs.window.ranges,
            sids={number: span[1] for number, span in inputs.window.ranges["sids"].items()},
            seed=self.settings.seed, metrics=dict(self.result.metrics),
            parent=inputs.start_bundle.id if inputs.start_bundle else None, reference=reference,
            validation=inputs.hold_out,
        )  # fmt: skip

    def _parity_histories(self) -> list[list[Sid]]:
        """Histories of the log for the comparison of the exported model with the trained one."""
        log, sids = self.inputs.log, self.inputs.catalogue.sids
        users = range(min(_PARITY_HISTORIES, len(log.users)))
        return [[sids[item] for item in log.items[log.starts[u] : log.starts[u + 1]]] for u in users]

    def _popular_items(self) -> list[str]:
        """All item ids: those bought most first, then, of items never bought, those clicked most."""
        inputs, item_ids = self.inputs, self.inputs.catalogue.item_ids
        log = inputs.log
        purchases = np.bincount(log.items[log.bought], minlength=len(item_ids))
        by_popularity = list(items_by_popularity(log, inputs.catalogue))
        return [item_ids[row] for row in sorted(by_popularity, key=lambda row: -purchases[row])]

    def params(self) -> dict[str, Any]:
        """What the registry keeps of a version's settings."""
        inputs, settings = self.inputs, self.settings
        params: dict[str, Any] = {name: getattr(settings, name) for name in _LOGGED_SETTINGS}
        for part in ("pretrain", "dpo"):
            values = getattr(settings, part).model_dump(mode="json")
            params |= {f"{part}.{name}": value for name, value in values.items()}
        params |= {"codebook": inputs.codebook.id, "items": len(inputs.catalogue.item_ids)}
        params["context"] = ", ".join(
            f"{name}: {len(values)}" for name, values in inputs.context.fields.items()
        )
        return params | {"parent": inputs.start_bundle.id if inputs.start_bundle else ""}
