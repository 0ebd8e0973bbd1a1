"""The bundles of an update cycle: each of its models with everything that serving needs beside it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers.utils import logging as transformers_logging

from registry.bundles.bundle import Bundle, BundleKind, write_bundle
from registry.bundles.code_version import code_version
from registry.bundles.context import write as write_context
from registry.bundles.ranking import write as write_ranking
from registry.bundles.rewards import write as write_rewards
from registry.bundles.run_record import flat_params
from registry.decoding.onnx_generator import OnnxGenerator
from trainer.cycle_inputs import CycleInputs
from trainer.cycle_result import CycleResult
from trainer.evaluation.results import machine
from trainer.generator.export import check_parity, export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.bundle_parity import PARITY_USERS, check_served_lists
from trainer.offline_checks.quality import HeldOutQuality, bundle_quality
from trainer.sequences.held_out import HeldOut, held_out_rows
from trainer.sequences.interactions import items_by_popularity
from trainer.settings import TrainerSettings

# Settings of a shape: weights that a refresh goes on from have one already, which is logged in their place.
_SHAPE = {
    "width", "layers", "heads", "ffn_factor", "depth_factor", "dropout", "item_dropout", "item_vectors",
    "text_inputs",
}  # fmt: skip
# Where and when a cycle runs, and what trains other models, makes no difference to these.
_ELSEWHERE = {"home", "schedule", "hf_model", "lora"}


@dataclass(frozen=True)
class BundleWriter:
    """Writes bundles below a cycle's run folder."""

    inputs: CycleInputs
    settings: TrainerSettings  # those that the models were trained with
    result: CycleResult
    run_folder: Path

    def write(
        self, kind: BundleKind, model: GeneratorForCausalLM, trained: HeldOutQuality | None,
        reference: str | None = None,
    ) -> tuple[Bundle, HeldOutQuality | None]:  # fmt: skip
        """The bundle of a model, and the quality of its files on the held-out users, as they are served.

        `trained`: the quality of the model in torch; None: nobody is held out. `reference`: the id of the
        bundle that it was aligned from. Sets the metrics `<kind>/parity` and those of the quality. Raises
        SidstreamError where the files do not answer as the model.
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
        self.result.metrics[f"{kind}/parity"] = max(
            check_parity(model, folder, self.settings.seed),
            check_served_lists(
                model, folder, self._parity_events(), inputs.catalogue, inputs.prompt, self.result.ranking()
            ),
        )
        served = None
        if trained is not None:
            generator = OnnxGenerator(folder, inputs.prompt.sizes, inputs.prompt.max_items)
            served = bundle_quality(
                generator, inputs.split.held_out, inputs.catalogue, inputs.prompt.max_items, trained
            )
            self.result.record_quality("dpo" if kind == "dpo" else "sft", served)
        bundle = write_bundle(
            folder, kind=kind, codebook=inputs.codebook, popular=self._popular_items(),
            max_items=inputs.prompt.max_items, window=inputs.window.ranges,
            sids={number: span[1] for number, span in inputs.window.ranges["sids"].items()},
            seed=self.settings.seed, metrics=dict(self.result.metrics),
            parent=inputs.start_bundle.id if inputs.start_bundle else None, reference=reference,
            validation=inputs.hold_out,
        )  # fmt: skip
        return bundle, served

    def _parity_events(self) -> HeldOut:
        """The events whose lists are compared: the held-out ones, or the last ones of the log's users."""
        held_out, log = self.inputs.split.held_out, self.inputs.log
        if len(held_out.targets):
            return held_out
        users = np.flatnonzero(np.diff(log.starts) > 1)[:PARITY_USERS]
        return held_out_rows(log, log.starts[users + 1] - 1, self.inputs.prompt.max_items)

    def _popular_items(self) -> list[str]:
        """All item ids: those bought most first, then, of items never bought, those clicked most."""
        inputs, item_ids = self.inputs, self.inputs.catalogue.item_ids
        log = inputs.log
        purchases = np.bincount(log.items[log.bought], minlength=len(item_ids))
        by_popularity = list(items_by_popularity(log, inputs.catalogue))
        return [item_ids[row] for row in sorted(by_popularity, key=lambda row: -purchases[row])]

    def params(self, kind: BundleKind, model: GeneratorForCausalLM) -> dict[str, str]:
        """What the registry keeps of how a version was made: the settings that were used, the shape of its
        weights, the limits of its lists, the code and the machine."""
        inputs, config = self.inputs, model.config
        unused = _SHAPE | _ELSEWHERE | (set() if kind == "dpo" else {"dpo"})
        settings = self.settings.model_dump(mode="json", exclude=unused)
        limits = inputs.catalogue.limits
        about = {
            "model": {
                "width": config.hidden_size, "layers": config.num_hidden_layers,
                "heads": config.num_attention_heads, "ffn_width": config.intermediate_size,
                "depth_width": config.depth_size, "members": config.norm_groups, "dropout": config.dropout,
                "item_dropout": config.item_dropout, "item_vectors": config.item_vectors,
                "text_size": config.text_size,
                "parameters": sum(weight.numel() for weight in model.parameters()),
            },
            "lists": {
                "beam": limits.beam, "exact_items": limits.exact_items,
                "repeats": limits.repeats and limits.repeats.repeats,
            },
            "codebook": inputs.codebook.id, "items": len(inputs.catalogue.item_ids),
            "context": ", ".join(f"{name}: {len(values)}" for name, values in inputs.context.fields.items()),
            "parent": inputs.start_bundle.id if inputs.start_bundle else "",
            "code": code_version(), "machine": machine(self.settings.arithmetic),
        }  # fmt: skip
        return flat_params(settings | about)
