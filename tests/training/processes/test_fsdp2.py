"""FSDP2 on two ranks: losses of DDP, checkpoints for any number of ranks, the guard, a whole model for a while."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mae.data.order import ORDER_VERSION
from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.decoders import DECODERS
from mae.models.settings import MaskedAutoencoderSettings
from mae.training.checkpoints.manifest import DataPosition, RunPosition
from mae.training.checkpoints.reader import verify_checkpoint
from mae.training.checkpoints.writer import CheckpointWriter
from mae.training.guard import nan_gradients_if_nonfinite, step_unless
from mae.training.muon import divide_groups
from mae.training.optimizer import OptimSettings, build_optimizer, parameter_groups, set_learning_rate
from mae.training.processes.fsdp2 import (
    is_sharded,
    local_value,
    shard_each_block,
    shard_on_any_device,
    sharding_asked_for,
    whole,
)
from mae.training.state import TrainingState
from tests.models.toy_decoder import ToyDecoder

Name = Literal["adamw", "muon"]
TwoRanks = Callable[[Callable[[], Any]], list[Any]]
BATCH = 8

# DDP copies the strided gradient of the patch embedding, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")


@pytest.fixture
def fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` puts into the environment."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block")


def tiny_model(decoder: str = "self", decoder_depth: int = 1) -> MaskedAutoencoder:
    torch.manual_seed(0)
    settings = MaskedAutoencoderSettings(
        width=16, depth=2, heads=2, patch_size=(2,),
        decoder=decoder, decoder_width=8, decoder_depth=decoder_depth, decoder_heads=2,
    )  # fmt: skip
    return MaskedAutoencoder(settings, (8, 8), 1)


class Trainer:
    """A training loop in small: accumulation of two, clipping, the guard."""

    def __init__(
        self, precision: str = "no", build: Callable[[], MaskedAutoencoder] = tiny_model, name: Name = "adamw"
    ) -> None:
        plugin = sharding_asked_for()
        self.accelerator = Accelerator(mixed_precision=precision, fsdp_plugin=plugin)
        shard_on_any_device(self.accelerator, plugin)
        model = build()
        groups = parameter_groups(model, 0.05)
        divided = divide_groups(groups, model) if name == "muon" else groups
        optimizer = build_optimizer(divided, OptimSettings(name=name), self.accelerator.device)
        shard_each_block(self.accelerator, model)
        prepared: tuple[nn.Module, Optimizer] = self.accelerator.prepare(model, optimizer)
        self.model, self.optimizer = prepared
        self.bare: nn.Module = self.accelerator.unwrap_model(self.model)
        self.state = TrainingState(self.bare, self.optimizer, ema_decay=0.5)
        self.rank = self.accelerator.process_index

    def step(self, number: int, spoil: Callable[[Tensor], None] = lambda images: None) -> float:
        """Train on global batch `number`, of which this rank takes its share; returns the mean loss of all ranks."""
        generator = torch.Generator().manual_seed(number)
        images, noise = torch.randn(BATCH, 1, 8, 8, generator=generator), torch.rand(BATCH, 16, generator=generator)
        share = BATCH // self.accelerator.num_processes // 2
        losses = []
        for micro in range(2):
            begin = (2 * self.rank + micro) * share
            mine = images[begin : begin + share]
            spoil(mine)
            with nullcontext() if micro else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.model(mine, noise[begin : begin + share]).loss
                self.accelerator.backward(nan_gradients_if_nonfinite(loss) / 2)
            losses.append(loss.detach())
        norm = local_value(self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0 if number % 2 else math.inf))
        set_learning_rate(self.optimizer, 0.01)
        step_unless(self.optimizer, ~norm.isfinite())
        self.optimizer.zero_grad()
        self.state.update_average(number + 1)
        return float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all there is, whole; collective."""
        groups = self.state.tensors()
        return {f"{group}: {name}": local_value(t).clone() for group in groups for name, t in groups[group].items()}


def losses_of_ten_steps(precision: str, name: Name) -> tuple[bool, list[float]]:
    trainer = Trainer(precision, name=name)
    return is_sharded(trainer.bare), [trainer.step(number) for number in range(10)]


# Muon computes its matrix products in bf16, and timm takes the products of sharded matrices in another order.
@pytest.mark.parametrize(
    ("precision", "name", "tolerance"), [("no", "adamw", 1e-6), ("bf16", "adamw", 1e-5), ("no", "muon", 1e-3)]
)
def test_the_losses_are_those_of_ddp(
    precision: str, name: Name, tolerance: float, on_two_ranks: TwoRanks, fsdp2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded, same = on_two_ranks(lambda: losses_of_ten_steps(precision, name))
    assert sharded == same
    assert sharded[0]
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    is_split, by_ddp = on_two_ranks(lambda: losses_of_ten_steps(precision, name))[0]
    assert not is_split
    assert sharded[1] == pytest.approx(by_ddp, rel=tolerance)
    assert by_ddp[-1] < by_ddp[0] / 2


def train_with_deep_decoder(decoder: str) -> tuple[set[str], list[float]]:
    """Names of the modules whose weights are gathered by themselves, and losses."""
    trainer = Trainer(build=lambda: tiny_model(decoder, decoder_depth=3))
    alone = {name for name, module in trainer.bare.named_modules() if isinstance(module, FSDPModule)}
    return alone, [trainer.step(number) for number in range(4)]


@pytest.mark.parametrize("decoder", [*DECODERS, "toy"])
def test_each_block_of_encoder_and_decoder_is_gathered_by_itself_whatever_its_class(
    decoder: str, on_two_ranks: TwoRanks, fsdp2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DECODERS, "toy", ToyDecoder)
    first, second = on_two_ranks(lambda: train_with_deep_decoder(decoder))
    assert first == second
    blocks = {f"encoder.blocks.{n}" for n in range(2)} | {f"decoder.decoder_blocks.{n}" for n in range(3)}
    assert first[0] == {"", *blocks}  # the whole model holds the rest
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    alone, losses = train_with_deep_decoder(decoder)
    assert not alone
    assert first[1] == pytest.approx(losses, rel=1e-5)


def model_with_two_classes_of_one_name() -> MaskedAutoencoder:
    model = tiny_model()
    model.blocks.append(type("Block", (nn.Identity,), {})())
    return model


def test_blocks_of_two_classes_with_one_name_are_refused(on_two_ranks: TwoRanks, fsdp2: None) -> None:
    first, second = on_two_ranks(lambda: Trainer(build=model_with_two_classes_of_one_name))
    assert first == second
    assert first.startswith("TypeError: FSDP2 finds transformer blocks by the names of their classes (Block, DecoderB")
    assert first.endswith("several classes share one: rename the decoder's")


def test_nothing_is_sharded_unless_the_launcher_asks() -> None:
    assert sharding_asked_for() is None
    model = tiny_model()
    assert not is_sharded(model)
    with whole(model):
        assert not is_sharded(model)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version 1, allowed: 2"),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "fsdp_auto_wrap_policy NO_WRAP, allowed: TRANSFORMER_BASED_WRAP"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "Decoder", "fsdp_transformer_layer_cls_to_wrap Decoder, allowed: Block"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params true, allowed: false"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward false, allowed: true"),
    ],
)
def test_what_has_not_been_tried_is_refused(
    variable: str, value: str, message: str, fsdp2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        sharding_asked_for()


def train_and_look_at_the_whole_model() -> tuple[list[float], list[float]]:
    """Rank 0 runs the model alone more often than rank 1, before and amid the training."""
    trainer = Trainer()
    seen = []
    images, noise = torch.linspace(0, 1, 64).view(1, 1, 8, 8), torch.linspace(0, 1, 16).view(1, 16)
    for number in range(4):
        if number % 2 == 0:
            with whole(trainer.bare), torch.no_grad():
                seen += [float(trainer.bare(images, noise).loss) for _ in range(2 - trainer.rank)][:1]
        trainer.step(number)
    return seen, [trainer.step(number) for number in range(4, 6)]


def test_for_a_while_every_rank_may_run_the_whole_model_alone(
    on_two_ranks: TwoRanks, fsdp2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = on_two_ranks(train_and_look_at_the_whole_model)
    assert first == second
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    seen, losses = train_and_look_at_the_whole_model()
    assert first[0] == pytest.approx(seen, rel=1e-5)
    assert first[1] == pytest.approx(losses, rel=1e-5)


def train_with_a_bad_batch_on_one_rank(value: float) -> tuple[bool, list[str], list[float]]:
    trainer = Trainer()
    trainer.step(0)
    before = trainer.tensors()

    def spoil(images: Tensor) -> None:
        if trainer.rank == 1:
            images[0, 0, 0, 0] = value

    loss = trainer.step(1, spoil)
    after = trainer.tensors()
    changed = [name for name in before if not torch.equal(before[name], after[name]) and not name.startswith("ema: ")]
    return math.isfinite(loss), changed, [trainer.step(number) for number in range(2, 5)]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["n01-nan", "n01-inf"])
def test_a_bad_batch_of_one_rank_is_skipped_by_all(value: float, on_two_ranks: TwoRanks, fsdp2: None) -> None:
    first, second = on_two_ranks(lambda: train_with_a_bad_batch_on_one_rank(value))
    assert first == second
    is_finite, changed, losses = first
    assert not is_finite
    assert changed == []
    assert all(math.isfinite(loss) for loss in losses)


def save(trainer: Trainer, root: Path) -> None:
    writers = trainer.accelerator.num_processes if is_sharded(trainer.bare) else 1
    writer = CheckpointWriter(root, keep=1, rank=trainer.rank, writers=writers, launch_id="first")
    run_position = RunPosition(5, DataPosition(5 * BATCH, "fingerprint", BATCH, ORDER_VERSION), {}, {})
    writer.save(trainer.state.tensors(), {}, run_position)
    writer.wait()
    assert writer.failure is None
    writer.close()


def train_and_save(root: Path, name: Name = "adamw") -> list[float]:
    trainer = Trainer(name=name)
    for number in range(5):
        trainer.step(number)
    save(trainer, root)
    return [trainer.step(number) for number in range(5, 8)]


def load_and_train(root: Path, optimizer: Name = "adamw") -> list[float]:
    trainer = Trainer(name=optimizer)
    found = verify_checkpoint(root / "step-000000005")
    trainer.state.restore(found)
    saved = {
        f"{group}: {name}": t for group in ("model", "optimizer", "ema") for name, t in found.tensors(group).items()
    }
    for name, tensor in trainer.state.tensors()["optimizer"].items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert local.untyped_storage().nbytes() == local.nbytes, f"{name} keeps the whole tensor alive"
    held = trainer.tensors()
    assert held.keys() == saved.keys()
    assert all(torch.equal(held[name], saved[name]) for name in held)
    return [trainer.step(number) for number in range(5, 8)]


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-5), ("muon", 1e-3)])
def test_c18_saved_by_two_ranks_with_parts_it_goes_on_with_two_and_with_one(
    name: Name, tolerance: float, on_two_ranks: TwoRanks, fsdp2: None, tmp_path: Path
) -> None:
    on, same = on_two_ranks(lambda: train_and_save(tmp_path, name))
    assert on == same
    assert len(list((tmp_path / "step-000000005").glob("model-0000?-of-00002.safetensors"))) == 2
    assert on_two_ranks(lambda: load_and_train(tmp_path, name)) == [on, on]  # to the last bit
    assert load_and_train(tmp_path, name) == pytest.approx(on, rel=tolerance)


def test_c18_saved_by_one_rank_it_goes_on_with_parts_on_two(
    on_two_ranks: TwoRanks, fsdp2: None, tmp_path: Path
) -> None:
    on = train_and_save(tmp_path)
    assert (tmp_path / "step-000000005" / "model.safetensors").exists()
    first, second = on_two_ranks(lambda: load_and_train(tmp_path))
    assert first == second
    assert first == pytest.approx(on, rel=1e-5)
