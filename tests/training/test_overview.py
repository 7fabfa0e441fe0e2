"""What a run says that it begins with."""

import pytest

from mae.data.store.shards import Shard
from mae.training.overview import splits_of


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-000000.tar", "train-000001.tar", "val-000000.tar"], {"train": 2, "val": 1}),
        (["fashion-mnist-train-000000.tar.gz", "fashion-mnist-test-000000.tar.gz"],
         {"fashion-mnist-train": 1, "fashion-mnist-test": 1}),
        (["00000.tar", "00001.tgz"], {"": 2}),
        (["cc3m_0001.tar", "cc3m_0002.tar", "v2.tar"], {"cc3m": 2, "v": 1}),
    ],
)  # fmt: skip
def test_a_split_is_what_the_names_of_shards_begin_with(names: list[str], splits: dict[str, int]) -> None:
    assert splits_of([Shard(f"/folder/{name}", 1, "") for name in names]) == splits
