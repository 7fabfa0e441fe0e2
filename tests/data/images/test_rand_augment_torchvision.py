import pytest
import torch
from torchvision.transforms import v2

from mae.data.images.rand_augment_torchvision import rand_augment


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_it_is_torchvisions_of_the_same_seed(channels: int, magnitude: int) -> None:
    image = torch.randint(0, 256, (channels, 37, 29), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = v2.RandAugment(num_ops=2, magnitude=magnitude)
    changed = 0
    for word in (*range(150), 2**63, 2**64 - 1):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(word)
            expected = theirs(image)
        found = rand_augment(image, magnitude, word)
        assert torch.equal(found, expected)
        changed += not torch.equal(found, image)
    assert changed > 50 or magnitude == 0


def test_it_leaves_torchs_generator_and_the_image_as_they_were() -> None:
    image = torch.arange(300, dtype=torch.uint8).reshape(3, 10, 10)
    before, pixels = torch.random.get_rng_state(), image.clone()
    for word in range(50):
        rand_augment(image, 20, word)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(image, pixels)
