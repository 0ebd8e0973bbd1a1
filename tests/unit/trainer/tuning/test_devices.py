"""Processes that train together end alike, as one process would that takes all their batches, or end all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from tests.devices_worker import GAPS, SHOP
from tests.tiny_shop import Shop, shop
from trainer.alignment.losses import DynamicBeta
from trainer.generator.model import GeneratorForCausalLM
from trainer.settings import Arithmetic
from trainer.tuning import devices
from trainer.tuning.broadcast import read_training_inputs, write_training_inputs
from trainer.tuning.devices import Devices
from trainer.tuning.next_item import batch_loss
from trainer.tuning.sft import learning_rate_share, train

# Two processes import torch at the same time, on a machine that may be busy.
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[4]
# Processes of this test find one another on the loopback address only.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def launch(
    logs: Path, *command: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[int, str]]:
    """Two processes by torchrun -> how the launcher ended, and what each process wrote to stderr."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
            "--nproc-per-node", "2", "--log-dir", str(logs), "--redirects", "3", "-m", *command,
        ],
        cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    outputs = {int(path.parent.name): path.read_text() for path in logs.rglob("stderr.log")}
    return done, outputs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    done, outputs = launch(folder / "logs", "tests.devices_worker", str(folder), "train")
    assert done.returncode == 0, (done.stderr, outputs)
    return folder


def test_a_dynamic_beta_follows_the_gaps_of_all_processes_as_of_one_batch(trained: Path) -> None:
    alone, expected = DynamicBeta(0.1), []
    for step in GAPS:
        actual = alone(torch.tensor([gap for part in step for gap in part]), training=True)
        expected += [alone.mean, alone.deviation, float(actual.beta)]
    for rank in (0, 1):
        betas = json.loads((trained / f"followed-{rank}.json").read_text())
        assert [number for step in betas for number in step] == pytest.approx(expected)


def weights(folder: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-{rank}.safetensors")


def by_one_process(tiny: Shop, batches: int) -> GeneratorForCausalLM:
    """A training in which every step takes the mean gradient of so many batches."""
    model, settings = tiny.model(), tiny.settings
    table = model.model.items.rows(torch.from_numpy(tiny.catalogue.codes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    model.train()
    for epoch in range(settings.epochs):
        pieces = tiny.rows.sequence_batches(epoch)
        assert len(pieces) % batches, "the last step of an epoch is one with fewer batches"
        for low in range(0, len(pieces), batches):
            group = pieces[low : low + batches]
            losses = [batch_loss(model, piece, [], table, None, settings) for piece in group]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            done = (epoch + low / len(pieces)) / settings.epochs
            for parameters in optimizer.param_groups:
                parameters["lr"] = settings.lr * learning_rate_share(done)
            optimizer.step()
    return model


def test_gradients_are_averaged_over_the_processes_that_have_a_batch(trained: Path) -> None:
    for rank in (0, 1):
        actual = json.loads((trained / f"averaged-{rank}.json").read_text())
        # Nothing reached the bias: it has no gradient, and so no decay.
        assert actual == [[1.5, 1.5], [1.5], None, [5.0, 5.0], [5.0], None]


def test_two_processes_end_in_the_weights_of_one_that_takes_the_batches_of_both(trained: Path) -> None:
    first, second = (weights(trained, "one", rank) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The optimizer divides by the size of a gradient: rounding shows in the fourth place.
    for name, value in by_one_process(shop(**SHOP), 2).named_parameters():
        torch.testing.assert_close(first[name], value.detach(), rtol=1e-3, atol=4e-4)


def test_two_processes_go_on_in_their_stage_and_end_as_if_unbroken(trained: Path) -> None:
    environment = json.loads((trained / "seen.json").read_text())
    # Twice in pretraining, then in the stage after it.
    assert environment["cuts"][0] == 3
    assert environment["cuts"][1] == 6
    whole = weights(trained, "two", 0)
    for name in ("two", "resumed"):
        for rank in (0, 1):
            actual = weights(trained, name, rank)
            assert all(torch.equal(whole[key], actual[key]) for key in whole), (name, rank)


def test_after_the_shared_part_the_main_process_stands_alone(trained: Path) -> None:
    environment = json.loads((trained / "seen.json").read_text())
    assert (environment["left"], environment["processes"], environment["joined"]) == ([], 1, False)


def test_an_error_of_the_main_process_ends_all_with_one_line(tmp_path: Path) -> None:
    done, outputs = launch(tmp_path / "logs", "sidstream", "train", SIDSTREAM_TRAINER__LR="-1")
    assert done.returncode != 0
    lines = [line for line in outputs[0].splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("error: ")] == [lines[0]]
    assert "trainer.lr is '-1'" in lines[0]
    assert not any("Traceback" in text for text in outputs.values())


def test_an_error_of_another_process_ends_all_with_its_line(tmp_path: Path) -> None:
    done, outputs = launch(tmp_path / "logs", "tests.devices_worker", str(tmp_path), "lost")
    assert done.returncode != 0
    assert "nowhere" in outputs[1]
    assert "SIDSTREAM_TRAINER__HOME" in outputs[1]
    assert not any("Traceback" in text for text in outputs.values())


def test_what_is_handed_over_gives_the_same_batches(tmp_path: Path) -> None:
    tiny = shop(max_items=6)
    write_training_inputs(tmp_path, tiny.model(), tiny.tokenizer, tiny.rows, tiny.settings)
    model, rows, settings = read_training_inputs(tmp_path)
    assert settings == tiny.settings
    for expected, actual in zip(tiny.rows.sequence_batches(1), rows.sequence_batches(1), strict=True):
        assert torch.equal(expected.items, actual.items)
        assert torch.equal(expected.learned, actual.learned)
    texts = ([row.ids.tolist() for row in of.text_rows(1)] for of in (tiny.rows, rows))
    assert next(texts) == next(texts)
    for name, value in tiny.model().named_parameters():
        assert torch.equal(value, model.get_parameter(name))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_the_faster_arithmetic_and_a_fixed_one_is_taken_on_every_processor(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "fast_bf16", lambda where: fast)
    where, ones = torch.device("cpu"), torch.ones(2, 2)
    product_types = {}
    for arithmetic in get_args(Arithmetic):
        with devices.training_arithmetic(arithmetic, where):
            product_types[arithmetic] = (ones @ ones).dtype
    assert product_types == {
        "auto": torch.bfloat16 if fast else torch.float32, "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }  # fmt: skip


def test_a_training_rounds_as_the_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(arithmetic: str, fast: bool) -> torch.Tensor:
        monkeypatch.setattr(devices, "fast_bf16", lambda where: fast)
        tiny = shop(epochs=1, arithmetic=arithmetic)
        model = tiny.model()
        train(model, tiny.rows, tiny.sids, tiny.settings)
        return model.model.embed_tokens.weight.detach()

    exact, rounded = trained("float32", True), trained("bfloat16", False)
    assert torch.equal(exact, trained("auto", False))
    assert torch.equal(rounded, trained("auto", True))
    assert not torch.equal(exact, rounded)


def test_one_process_needs_no_launcher() -> None:
    alone = Devices()
    assert (alone.main, alone.count, alone.broadcast([1.5])) == (True, 1, [1.5])
    assert alone.receive() is None
    alone.leave()
