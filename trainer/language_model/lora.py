"""A Hugging Face causal LM tuned in the small generator's place, by LoRA, on the same rows.

The codes of SIDs become added tokens, whose rows of the embeddings are trained, and no other rows; the rest
of the network gets low-rank adapters (Hu et al. 2021). Ranked under the same constraint through `generate`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from registry.bundles.context import Context
from registry.bundles.prompt import BOS, EOS, ITEM, LEVELS, PAD, TITLE, UNK, Prompt
from registry.bundles.ranking import Ranking
from registry.bundles.store import Registry
from streams.errors import SidstreamError
from streams.settings import KafkaSettings
from trainer.alignment.cycle_stage import window_rows
from trainer.alignment.rows import PreferenceRow
from trainer.cycle_inputs import cycle_lock, read_cycle_inputs
from trainer.generator.constrained import SidSet
from trainer.offline_checks.probe import ProbeOutcome
from trainer.offline_checks.quality import HeldOutQuality, for_json, hr_ndcg
from trainer.sequences.batches import IGNORE, TokenRow, to_device
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.devices import device, training_arithmetic
from trainer.tuning.optimization import ClippedAdamW, train_on_batches

if TYPE_CHECKING:
    from trainer.alignment.dpo import DpoResult

_MARKS = {TITLE: "<sid_title>", ITEM: "<sid_item>"}
_EVAL_ROWS = 16


@dataclass(frozen=True)
class LoraResult:
    """What the tuning did; `folder` holds the merged model and its tokenizer."""

    folder: str
    steps: int
    seconds: float
    loss: float
    quality: HeldOutQuality
    # Of the alignment, where there were pairs enough: its folder, what it did, and what it is worth.
    aligned: str | None = None
    dpo: DpoResult | None = None
    aligned_quality: HeldOutQuality | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return for_json(self)


class VocabularyTranslation:
    """Our token ids <-> a foreign tokenizer's: codes and marks are added tokens, a word may be several."""

    def __init__(
        self,
        prompt: Prompt,
        own_tokenizer: PreTrainedTokenizerBase,
        foreign_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.prompt = prompt
        codes = [
            f"<{LEVELS[level]}_{code}>" for level, size in enumerate(prompt.sizes) for code in range(size)
        ]
        foreign_tokenizer.add_tokens([*_MARKS.values(), *codes])
        self.added: list[int] = foreign_tokenizer.convert_tokens_to_ids([*_MARKS.values(), *codes])
        self.pad = (
            foreign_tokenizer.pad_token_id
            if foreign_tokenizer.pad_token_id is not None
            else foreign_tokenizer.eos_token_id
        )
        self.end = foreign_tokenizer.eos_token_id
        if self.end is None:
            raise SidstreamError(
                f"the tokenizer of {foreign_tokenizer.name_or_path} has no end token; "
                "choose a model that has one"
            )
        begin = foreign_tokenizer.bos_token_id if foreign_tokenizer.bos_token_id is not None else self.end
        self.table: list[list[int]] = [[] for _ in range(len(own_tokenizer))]
        self.table[BOS], self.table[EOS], self.table[PAD] = [begin], [self.end], []
        self.table[UNK] = []
        for token, text in _MARKS.items():
            self.table[token] = [foreign_tokenizer.convert_tokens_to_ids(text)]
        first = prompt.code_base(0)
        for at, foreign in enumerate(foreign_tokenizer.convert_tokens_to_ids(codes)):
            self.table[first + at] = [foreign]
        names = own_tokenizer.convert_ids_to_tokens(list(range(len(own_tokenizer))))
        for token in range(prompt.first_word, len(own_tokenizer)):
            self.table[token] = foreign_tokenizer(" " + names[token], add_special_tokens=False).input_ids
        self.own_token = {self.table[t][0]: t for t in range(first, prompt.first_word)}

    def translate_row(self, row: TokenRow) -> TokenRow:
        """A row in the foreign vocabulary; every piece of a learned word is learned."""
        pieces = [self.table[token] for token in row.ids.tolist()]
        learned = [mark for mark, piece in zip(row.learned.tolist(), pieces, strict=True) for _ in piece]
        ids = [token for piece in pieces for token in piece]
        return TokenRow(np.array(ids, dtype=np.int64), np.array(learned, dtype=bool), row.weight)

    def foreign_ids(self, own_ids: Sequence[int]) -> list[int]:
        """Token ids in the foreign vocabulary."""
        return [piece for token in own_ids for piece in self.table[token]]

    def translate_preference(self, row: PreferenceRow) -> PreferenceRow:
        """A preference row in the foreign vocabulary."""
        return PreferenceRow(
            prompt_ids=self.foreign_ids(row["prompt_ids"]), chosen_ids=self.foreign_ids(row["chosen_ids"]),
            rejected_ids=[self.foreign_ids(answer) for answer in row["rejected_ids"]],
        )  # fmt: skip


def _pad_rows(rows: Sequence[TokenRow], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORE)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for at, row in enumerate(rows):
        part = torch.from_numpy(row.ids)
        ids[at, : len(part)] = part
        mask[at, : len(part)] = 1
        labels[at, : len(part)] = torch.where(torch.from_numpy(row.learned), part, IGNORE)
    return ids, labels, mask, torch.tensor([row.weight for row in rows])


def _with_adapters(model: Any, settings: TrainerSettings, added: Sequence[int]) -> Any:
    # Of the embeddings the rows of the added tokens alone: weight decay would wear off all others. A tied
    # head follows its embeddings.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    modules = [embedding] if head.weight is embedding.weight else [embedding, head]
    config = _adapter_config(model, settings, {names[id(module)]: list(added) for module in modules})
    return get_peft_model(model, config)


def _adapter_config(
    model: Any, settings: TrainerSettings, added: dict[str, list[int]] | None = None
) -> LoraConfig:
    return LoraConfig(
        r=settings.lora.rank, lora_alpha=settings.lora.alpha, lora_dropout=settings.lora.dropout,
        target_modules="all-linear", trainable_token_indices=added, task_type="CAUSAL_LM",
        # GPT-2 keeps its weights transposed.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )  # fmt: skip


def tune_lora(
    name: str,
    rows: TrainingRows,
    own_tokenizer: PreTrainedTokenizerBase,
    sids: SidSet,
    settings: TrainerSettings,
    folder: Path,
    progress: Callable[[str], None] | None = None,
) -> LoraResult:
    """Tune the causal LM `name` (id or folder), rank the held-out items, save the merged model in `folder`.

    Raises SidstreamError when the model cannot be loaded.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        foreign_tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise SidstreamError(f"{name} is no causal LM that can be loaded here: {first}") from error
    translation = VocabularyTranslation(rows.prompt, own_tokenizer, foreign_tokenizer)
    torch.manual_seed(settings.seed)
    model.resize_token_embeddings(max(len(foreign_tokenizer), model.get_input_embeddings().num_embeddings))
    where = device()
    model = _with_adapters(model, settings, translation.added).to(where)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = ClippedAdamW(trained, lr=settings.lora.lr, weight_decay=settings.weight_decay)

    def loss_of(batch: list[TokenRow]) -> Tensor:
        # Which places are learned is found on the CPU: the host would wait for a GPU to tell.
        ids, labels, mask, weight = _pad_rows(batch, translation.pad)
        row, place = labels[:, 1:].ne(IGNORE).nonzero(as_tuple=True)
        targets, weights = labels[:, 1:][row, place], weight[row]
        ids, mask, row, place, targets, weights = (
            to_device(part, where) for part in (ids, mask, row, place, targets, weights)
        )
        with training_arithmetic(settings.arithmetic, where):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        losses = F.cross_entropy(logits[row, place].float(), targets, reduction="none")
        return (losses * weights).mean()

    def out_of_time() -> bool:
        return settings.max_seconds is not None and time.monotonic() - began > settings.max_seconds

    def report(step: int, loss: float) -> None:
        if progress:
            progress(f"step {step}, loss {loss:.3f}")

    began = time.monotonic()
    model.train()
    batches = (
        batch
        for epoch in range(settings.epochs)
        for batch in _translated_batches(rows.epoch_rows(epoch), translation, settings, epoch)
    )
    steps, loss = train_on_batches(optimizer, batches, loss_of, stop=out_of_time, progress=report)
    seconds = time.monotonic() - began
    merged = model.merge_and_unload().eval()
    quality = evaluate_language_model(merged, translation, rows, sids, settings)
    folder.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(folder)
    foreign_tokenizer.save_pretrained(folder)
    return LoraResult(str(folder), steps, seconds, loss, quality)


def _translated_batches(
    rows: list[TokenRow], translation: VocabularyTranslation, settings: TrainerSettings, epoch: int
) -> list[list[TokenRow]]:
    rng = np.random.default_rng((settings.seed, epoch, 2))
    translated = sorted((translation.translate_row(row) for row in rows), key=lambda row: len(row.ids))
    batches: list[list[TokenRow]] = [[]]
    for row in translated:
        if batches[-1] and (len(batches[-1]) + 1) * len(row.ids) > settings.lora.batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return [batches[at] for at in rng.permutation(len(batches))]


@torch.no_grad()
def evaluate_language_model(
    model: Any,
    translation: VocabularyTranslation,
    rows: TrainingRows,
    sids: SidSet,
    settings: TrainerSettings,
) -> HeldOutQuality:
    """HR@10 and NDCG@10 of held-out items by constrained `generate`; validity of free answers."""
    rank, valid = language_model_ranks(model, translation, rows, sids, settings)
    hr, ndcg = hr_ndcg(torch.from_numpy(rank))
    return HeldOutQuality(len(rank), hr, ndcg, float(valid.mean()) if len(rank) else 0.0, Ranking())


@torch.no_grad()
def language_model_ranks(
    model: Any,
    translation: VocabularyTranslation,
    rows: TrainingRows,
    sids: SidSet,
    settings: TrainerSettings,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Rank (B,) from 0 of each held-out item by constrained `generate`; which (B,) free answers are SIDs."""
    model_device = next(model.parameters()).device
    prompt, held_out, catalogue = rows.prompt, rows.split.held_out, rows.catalogue
    beams = min(max(catalogue.limits.beam, 10), len(sids))
    ranks: list[int] = []
    valid: list[bool] = []
    for low in range(0, len(held_out.targets), _EVAL_ROWS):
        histories = held_out.histories[low : low + _EVAL_ROWS]
        prompts = [[BOS, *catalogue.codes[history].ravel().tolist()] for history in histories]
        foreign_prompts = [[piece for token in ids for piece in translation.table[token]] for ids in prompts]
        length = max(len(ids) for ids in foreign_prompts)
        ids = torch.tensor(
            [[translation.pad] * (length - len(row)) + row for row in foreign_prompts], device=model_device
        )
        mask = torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in foreign_prompts], device=model_device
        )
        levels = len(prompt.sizes)

        def allowed(row: int, tokens: Tensor, length: int = length) -> list[int]:
            prefix = [translation.own_token[token] for token in tokens[length:].tolist()]
            return [translation.table[token][0] for token in sids.allowed_tokens(prefix)] or [translation.end]

        shared = {"attention_mask": mask, "max_new_tokens": levels, "do_sample": False,
                  "pad_token_id": translation.pad, "eos_token_id": None}  # fmt: skip
        best = model.generate(
            ids, num_beams=beams, num_return_sequences=beams, length_penalty=0.0,
            prefix_allowed_tokens_fn=allowed, **shared,
        )[:, length:]  # fmt: skip
        sids_of = [prompt.sid([translation.own_token[token] for token in row]) for row in best.tolist()]
        for row, target in enumerate(held_out.targets[low : low + _EVAL_ROWS].tolist()):
            answers = sids_of[row * beams : (row + 1) * beams]
            ranks.append(
                answers.index(catalogue.sids[target]) if catalogue.sids[target] in answers else beams
            )
        for row in model.generate(ids, num_beams=1, **shared)[:, length:].tolist():
            tokens = [translation.own_token.get(token, PAD) for token in row]
            valid.append(all(token in sids.allowed_tokens(tokens[:at]) for at, token in enumerate(tokens)))
    return np.array(ranks, dtype=np.int64), np.array(valid, dtype=bool)


def align_lora(
    tuned: LoraResult,
    pairs: Sequence[PreferenceRow],
    rows: TrainingRows,
    own_tokenizer: PreTrainedTokenizerBase,
    sids: SidSet,
    settings: TrainerSettings,
    progress: Callable[[str], None] | None = None,
) -> LoraResult:
    """Align the model of `tune_lora` to preference rows of our token ids, by fresh adapters; saved beside it.

    The embeddings stay: the codes were learned in tuning. A model that a stop rule refuses is not saved:
    `aligned` stays None, and `dpo.stopped` says why.
    """
    from trainer.alignment.dpo import align_language_model

    foreign_tokenizer = AutoTokenizer.from_pretrained(tuned.folder)
    model = AutoModelForCausalLM.from_pretrained(tuned.folder, dtype=torch.float32)
    translation = VocabularyTranslation(rows.prompt, own_tokenizer, foreign_tokenizer)
    few = rows.with_fewer_held_out(settings.dpo.probe_users)

    def probe(policy: Any) -> ProbeOutcome:
        rank, valid = language_model_ranks(policy.eval(), translation, few, sids, settings)
        return ProbeOutcome(rank < 10, valid)

    folder = Path(f"{tuned.folder}-dpo")
    aligned_model, result = align_language_model(
        model, foreign_tokenizer, [translation.translate_preference(row) for row in pairs], settings,
        folder / "run",
        _adapter_config(model, settings), probe=probe if len(few.split.held_out.targets) else None,
        progress=progress,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    if result.failed(settings.dpo.max_drop):
        return replace(tuned, dpo=result)
    aligned_model.save_pretrained(folder)
    foreign_tokenizer.save_pretrained(folder)
    quality = evaluate_language_model(aligned_model.to(device()), translation, rows, sids, settings)
    return replace(tuned, aligned=str(folder), dpo=result, aligned_quality=quality)


def tune_window(
    settings: TrainerSettings,
    kafka: KafkaSettings,
    registry: Registry,
    *,
    horizon_ms: int,
    window_ms: int,
    progress: Callable[[str, str, bool], None],
) -> LoraResult:
    """Tune `settings.hf_model` on the window, and align it where there are preference pairs enough.

    Nothing is registered: the merged models lie in <home>/hf. `horizon_ms` and `window_ms`: as of
    `UpdateCycle`.
    """
    if settings.hf_model is None:
        raise SidstreamError("no model is named: give --hf-model, or set SIDSTREAM_TRAINER__HF_MODEL")
    with cycle_lock(settings.home):
        inputs = read_cycle_inputs(
            settings, kafka, registry, from_scratch=True, horizon_ms=horizon_ms, window_ms=window_ms
        )
        own_tokenizer = inputs.tokenizer
        rows = TrainingRows(inputs.split, inputs.catalogue, own_tokenizer, inputs.prompt, settings)
        folder = settings.home / "hf" / Path(settings.hf_model).name
        result = tune_lora(
            settings.hf_model, rows, own_tokenizer, inputs.sids, settings, folder,
            lambda text: progress("lora", text, False),
        )  # fmt: skip
        progress("lora", f"{result.steps} steps, loss {result.loss:.3f} ({result.seconds:.1f} s)", True)
        # Without a context: a foreign vocabulary has no tokens of it.
        pairs = window_rows(inputs, settings.dpo, window_ms, Context()).learned
        if len(pairs) >= settings.dpo.min_pairs:
            result = align_lora(
                result, pairs, rows, own_tokenizer, inputs.sids, settings,
                lambda text: progress("dpo", text, False),
            )  # fmt: skip
            progress("dpo", f"{len(pairs):,} pairs; {result.dpo.stopped if result.dpo else ''}", True)
    return result
