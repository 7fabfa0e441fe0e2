"""What holds for every decoder of `DECODERS`, and for one that is added as its base class says."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.decoders import DECODERS, Decoder
from mae.models.encoder import build_encoder
from mae.models.execution import Checkpointing, checkpoint_activations, compile_blocks
from mae.models.flops import autoencoder_flops
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.sizes import SIZES
from mae.models.weights import encoder_part, file_tensors, has_decoder, load_autoencoder, load_encoder, read_weights
from mae.training.optimizer import OptimSettings, build_optimizer, parameter_groups, set_learning_rate
from tests.models.test_flops import BATCH, counted
from tests.models.toy_decoder import ToyDecoder

Build = Callable[..., MaskedAutoencoder]
Draw = Callable[..., tuple[Tensor, Tensor]]
NAMES = [*DECODERS, "toy"]
TINY: dict[str, Any] = {
    "width": 16, "depth": 3, "heads": 2, "patch_size": (4,), "predict_ratio": 0.5,
    "decoder_width": 12, "decoder_depth": 2, "decoder_heads": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _with_a_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that adds a decoder."""
    monkeypatch.setitem(DECODERS, "toy", ToyDecoder)


@pytest.fixture(params=NAMES)
def settings(request: pytest.FixtureRequest) -> MaskedAutoencoderSettings:
    return MaskedAutoencoderSettings(**TINY, decoder=request.param)


def build(settings: MaskedAutoencoderSettings, seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(settings, (16, 16), 3)


def test_flops_are_those_that_torch_counts(settings: MaskedAutoencoderSettings, draw: Draw) -> None:
    model = build(settings)
    images, noise = draw(model, BATCH)
    assert autoencoder_flops(settings, (16, 16), 3) == counted(lambda: model(images, noise).loss)


def test_counting_flops_draws_no_random_number(settings: MaskedAutoencoderSettings) -> None:
    before = torch.get_rng_state()
    autoencoder_flops(settings, (16, 16), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shape_where_none_is_set_is_valid(settings: MaskedAutoencoderSettings) -> None:
    for size in SIZES:
        shape = MaskedAutoencoderSettings(size=size, decoder=settings.decoder).decoder_shape
        assert shape == DECODERS[settings.decoder].default_shape(SIZES[size])
    assert settings.decoder_shape == (12, 2, 3)


def test_a_few_steps_reach_all_parameters_and_lower_the_loss(settings: MaskedAutoencoderSettings, draw: Draw) -> None:
    model = build(settings)
    images, noise = draw(model)
    optimizer = build_optimizer(parameter_groups(model, 0.05), OptimSettings(), torch.device("cpu"))
    set_learning_rate(optimizer, 0.01)
    losses = []
    for _ in range(5):
        losses.append(model(images, noise).loss)
        losses[-1].backward()
        assert [
            n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ] == []
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert model.predict_all(images, noise).shape == (2, 16, 48)


def test_every_block_is_compiled(settings: MaskedAutoencoderSettings) -> None:
    model = build(settings)
    names = list(model.state_dict())
    compile_blocks(model, "eager")
    blocks = [*model.encoder.blocks, *model.decoder.decoder_blocks]
    assert len(blocks) == 3 + 2
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("checkpointing", ["gelu", "blocks"])
def test_every_block_is_checkpointed_and_no_bit_changes(
    settings: MaskedAutoencoderSettings, draw: Draw, checkpointing: Checkpointing
) -> None:
    results, runs = [], list[nn.Module]()
    for chosen in ("none", checkpointing):
        model = build(settings)
        images, noise = draw(model)
        checkpoint_activations(model, chosen)
        blocks = [*model.encoder.blocks, *model.decoder.decoder_blocks]
        runs.clear()
        for block in blocks:
            block.mlp.act.register_forward_hook(lambda module, *_: runs.append(module))
        loss = model(images, noise).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
        times = 1 if chosen == "none" else 2
        assert [runs.count(block.mlp.act) for block in blocks] == [times] * 5
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_encoder_part_of_a_file_is_the_encoder(settings: MaskedAutoencoderSettings, tmp_path: Path) -> None:
    model = build(settings)
    save_file(file_tensors(model), tmp_path / "m.safetensors")
    weights = read_weights(tmp_path / "m.safetensors")
    assert has_decoder(weights)
    encoder = build_encoder(settings, (16, 16), 3)
    part = encoder_part(weights)
    assert part.keys() == encoder.state_dict().keys()
    assert not has_decoder(part)
    load_encoder(encoder, weights, tmp_path)
    assert all(torch.equal(tensor, model.encoder.state_dict()[n]) for n, tensor in encoder.state_dict().items())


def test_a_model_survives_the_trip_through_a_file(settings: MaskedAutoencoderSettings, tmp_path: Path) -> None:
    model, other = build(settings), build(settings, seed=1)
    save_file(file_tensors(model), tmp_path / "m.safetensors")
    load_autoencoder(other, read_weights(tmp_path / "m.safetensors"), tmp_path)
    assert len(file_tensors(model)) == len(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[n]) for n, tensor in other.state_dict().items())


def test_only_layers_and_what_the_decoder_names_have_weight_decay(settings: MaskedAutoencoderSettings) -> None:
    model = build(settings)
    found = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.3) for p in group["params"]}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    decayed = {id(layer.weight) for layer in layers} | {id(getattr(model.decoder, n)) for n in model.decoder.decayed}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert found[id(parameter)] == (0.3 if id(parameter) in decayed else 0.0), name


def test_the_encoders_norm_learns_if_the_decoder_reads_it(settings: MaskedAutoencoderSettings, draw: Draw) -> None:
    model = build(settings)
    images, noise = draw(model)
    before = model(images, noise).predicted
    nn.init.normal_(model.encoder.norm.weight)
    is_read = not torch.equal(model(images, noise).predicted, before)
    assert is_read == model.decoder.reads_normed_output
    assert all(p.requires_grad == is_read for p in model.encoder.norm.parameters())


def test_an_unknown_decoder_is_refused_with_those_that_are_allowed() -> None:
    with pytest.raises(UserError, match=rf"^model\.decoder is slef; allowed: {', '.join(DECODERS)}$"):
        MaskedAutoencoderSettings(decoder="slef")


@pytest.mark.parametrize("missing", ["flops", "forward", "reads_normed_output"])
def test_a_decoder_that_leaves_something_out_is_refused_by_its_name(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {name: part for name, part in vars(ToyDecoder).items() if name != missing and not name.startswith("_")}
    monkeypatch.setitem(DECODERS, "toy", type("Incomplete", (Decoder,), parts))
    with pytest.raises(TypeError, match=rf"Incomplete .*{missing}"):
        build(MaskedAutoencoderSettings(**TINY, decoder="toy"))


def test_a_decoder_whose_blocks_have_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed(ToyDecoder):
        def __init__(self, *shapes: Any) -> None:
            super().__init__(*shapes)
            self.layers = self.decoder_blocks
            del self.decoder_blocks

    monkeypatch.setitem(DECODERS, "toy", Renamed)
    with pytest.raises(TypeError, match=r"Renamed has no decoder_blocks; keep its blocks in an nn\.ModuleList"):
        build(MaskedAutoencoderSettings(**TINY, decoder="toy"))


def test_a_block_without_timms_mlp_cannot_forget_its_gelu() -> None:
    model = build(MaskedAutoencoderSettings(**TINY, decoder="toy"))
    model.decoder.decoder_blocks[1].mlp = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12))
    message = (
        "activation_checkpointing is gelu, but QueryBlock has no `mlp` of timm's class Mlp; allowed .*none, blocks"
    )
    with pytest.raises(UserError, match=message):
        checkpoint_activations(model, "gelu")
    checkpoint_activations(model, "blocks")


def test_the_help_text_names_every_decoder() -> None:
    source = inspect.getsource(MaskedAutoencoderSettings)
    assert [name for name in DECODERS if name != "toy" and f"{name}: " not in source] == []
