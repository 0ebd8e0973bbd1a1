"""Every stage on a GPU: no tensor of the CPU meets one of the GPU, and no step makes the host wait for it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from registry.bundles.prompt import PAD
from tests.pretend_gpu import MixedDevices, pretend_gpu
from tests.tiny_shop import ITEMS, Shop, shop
from trainer.alignment.objective import PreferenceObjective
from trainer.alignment.rows import PreferenceRow, collate_preferences
from trainer.codebooks.rqvae import fit_rqvae
from trainer.generator.model import GeneratorForCausalLM
from trainer.settings import DpoSettings
from trainer.tuning.checkpoint import snapshot
from trainer.tuning.devices import device
from trainer.tuning.ensemble import train_ensemble
from trainer.tuning.next_item import LogReplay
from trainer.tuning.optimization import ClippedAdamW
from trainer.tuning.sft import train

# What the losses of a step are made of: both heads, texts, contexts, items of the past, purchases, smoothing.
SETTINGS: dict[str, Any] = {
    "arithmetic": "float32", "smoothing": 0.1, "weights": {"purchase": 2.0}, "epochs": 1, "max_items": 5
}  # fmt: skip


def tuned(steps: int, **settings: Any) -> tuple[GeneratorForCausalLM, float, dict[str, torch.Tensor]]:
    """A model after so many steps of fine-tuning, its running loss, and its weights on the CPU."""
    tiny = shop(scenes=True, **SETTINGS | settings, max_steps=steps)
    model = tiny.model(dropout=0.2, item_dropout=0.2)
    result = train(model, tiny.rows, tiny.sids, tiny.settings)
    return model, result.loss, {name: value.cpu() for name, value in snapshot(model).items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_mixed_device_and_a_wait_are_seen() -> None:
    with pretend_gpu() as waits:
        numbers = torch.arange(4, device=device())
        with pytest.raises(MixedDevices):
            torch.searchsorted(numbers, torch.tensor([1, 2]))
        with pytest.raises(TypeError, match=r"use Tensor\.cpu"):
            numbers.numpy()
        assert not waits
        assert int(numbers.sum()) == 6
        assert numbers[numbers > 1].tolist() == [2, 3]
        assert len(waits) == 3


def test_fine_tuning_on_a_gpu_gives_the_weights_and_the_quality_of_the_cpu() -> None:
    model, loss, weights = tuned(6)
    with pretend_gpu():
        other, other_loss, other_weights = tuned(6)
        assert (model.device.type, other.device.type) == ("cpu", "cuda")
    assert loss == other_loss
    assert same_weights(weights, other_weights)


def test_no_step_of_fine_tuning_waits_for_the_gpu() -> None:
    with pretend_gpu() as waits:
        tuned(2, validation_users=0)
        after_two = len(waits)
        tuned(7, validation_users=0)
    assert waits[after_two:] == waits[:after_two]


def test_members_are_merged_where_they_were_trained() -> None:
    tiny = shop(**SETTINGS | {"members": 2, "max_steps": 3})

    def merged() -> dict[str, torch.Tensor]:
        model, _ = train_ensemble(
            lambda own, rows, folder: tiny.model(seed=own.seed, dropout=0.2),
            tiny.rows,
            tiny.sids,
            tiny.settings,
        )
        return {name: value.cpu() for name, value in snapshot(model).items()}

    on_cpu = merged()
    with pretend_gpu():
        assert same_weights(on_cpu, merged())


def preference_batch(tiny: Shop) -> dict[str, torch.Tensor]:
    codes = tiny.catalogue.codes
    rows = [
        PreferenceRow(
            prompt_ids=[1, *codes[[n % ITEMS, (5 * n) % ITEMS]].flatten().tolist(), *context],
            chosen_ids=codes[(n + 1) % ITEMS].tolist(),
            rejected_ids=[codes[(n + k) % ITEMS].tolist() for k in range(2, 3 + n % 2)],
        )
        for n in range(12)
        for context in ([tiny.context.first], [])
    ]
    return collate_preferences(rows, PAD)


def aligned(steps: int, **dpo: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The losses and the weights of so many steps of alignment."""
    tiny = shop(scenes=True, **SETTINGS)
    settings = DpoSettings.model_validate(dpo)
    policy = tiny.outspoken()
    reference, replay = copy.deepcopy(policy), LogReplay(tiny.rows)
    objective = PreferenceObjective(settings, reference, replay, 0, "float32")
    # Moved when all is ready, as a training loop does.
    policy.to(device()).train(), reference.to(device())
    batch = {name: part.to(device(), non_blocking=True) for name, part in preference_batch(tiny).items()}
    optimizer = ClippedAdamW(policy.parameters(), lr=1e-3)
    torch.manual_seed(0)
    losses = [optimizer.minimise(objective(policy, batch)[0]) for _ in range(steps)]
    return losses, {name: value.detach() for name, value in policy.named_parameters()}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "softmax_dpo"])
def test_alignment_on_a_gpu_gives_the_losses_of_the_cpu_and_waits_for_nothing(
    loss: str, dynamic: bool
) -> None:
    losses, weights = aligned(4, loss=loss, dynamic_beta=dynamic)
    with pretend_gpu() as waits:
        aligned(1, loss=loss, dynamic_beta=dynamic)
        after_one = len(waits)
        other_losses, other_weights = aligned(4, loss=loss, dynamic_beta=dynamic)
        assert waits[after_one:] == waits[:after_one]
        assert [float(value) for value in losses] == [float(value) for value in other_losses]
        assert same_weights(weights, {name: value.cpu() for name, value in other_weights.items()})


def test_a_codebook_is_fitted_on_a_gpu_as_on_the_cpu() -> None:
    rows = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    on_cpu = fit_rqvae(rows, (4, 3), seed=1, optional=2)
    with pretend_gpu():
        on_gpu = fit_rqvae(rows, (4, 3), seed=1, optional=2)
    for one, other in zip(on_cpu.centroids, on_gpu.centroids, strict=True):
        np.testing.assert_array_equal(one, other)
