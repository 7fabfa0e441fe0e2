"""What makes features others, so that the cache must not take one for the other."""

from dataclasses import replace

import torch

from mae.evaluation.features import untrained_features
from mae.models.description import describe_model
from mae.models.settings import EncoderSettings


def test_the_features_of_an_untrained_encoder_are_those_of_its_positions() -> None:
    settings = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))
    plain = describe_model("classifier", settings, (8, 8), (0.5,), (0.3,), 1.0)
    warm = replace(plain, position_temperature=10.0)
    found = [untrained_features(each, 0, torch.device("cpu")) for each in (plain, warm)]
    assert found[0].identity != found[1].identity
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    assert not torch.equal(*(each.build()(images) for each in found))
