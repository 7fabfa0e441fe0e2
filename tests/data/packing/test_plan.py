from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.data.packing.items import Item, Source
from mae.data.packing.plan import PackRules, Plan, load_plan, packing_order, plan_split, shard_starts, shuffled
from mae.errors import UserError

RULES = PackRules(shard_samples=4)


def source(count: int = 10, name: str = "here", classes: Sequence[str] = ()) -> Source:
    return Source(name, iter([Item(f"item {n}", "png", bytes(n)) for n in range(count)]), list(classes))


def names(plan: Plan) -> list[str]:
    return [item.name for number in range(plan.shards) for _, item in plan.items(number)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 9), st.floats(1, 200))
def test_every_shard_but_the_last_is_full_and_none_is_fuller(sizes: list[int], count: int, most: float) -> None:
    starts = shard_starts(np.array(sizes), count, most)
    assert (starts[0], starts[-1]) == (0, len(sizes))
    shards = [sizes[begin:end] for begin, end in pairwise(starts)]
    assert all(len(shard) <= count and sum(shard[:-1]) < most for shard in shards)
    assert all(shard and (len(shard) == count or sum(shard) >= most) for shard in shards[:-1])


def test_a_plan_lists_each_image_once_with_its_place_in_the_order(tmp_path: Path) -> None:
    plan = plan_split(source(), tmp_path, "train", RULES)
    assert (plan.shards, plan.images, plan.starts) == (3, 10, (0, 4, 8, 10))
    assert sorted(names(plan)) == sorted(f"item {n}" for n in range(10))
    assert [position for number in range(3) for position, _ in plan.items(number)] == list(range(10))
    assert load_plan(tmp_path, "train") == plan


def test_the_order_is_keyed_by_the_seed(tmp_path: Path) -> None:
    seeds: list[int | None] = [None, 0, 1, 2]
    orders = [names(plan_split(source(), tmp_path / str(s), "train", replace(RULES, seed=s))) for s in seeds]
    assert orders[0] == [f"item {n}" for n in range(10)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[1] == shuffled(orders[0], 0)


GOLDEN = [6, 9, 0, 2, 3, 5, 4, 1, 8, 7]


def test_the_order_of_every_release_is_the_same() -> None:
    """Another order would mix the shards of an interrupted pack with others."""
    assert packing_order(10, 0).tolist() == GOLDEN
    assert np.array_equal(np.sort(packing_order(3_000_000, 1)), np.arange(3_000_000))


def test_the_same_plan_is_taken_up_again(tmp_path: Path) -> None:
    first = plan_split(source(classes=["a"]), tmp_path, "train", RULES)
    assert plan_split(source(classes=["a"]), tmp_path, "train", RULES) == first
    assert sorted(p.name for p in first.parts.iterdir()) == ["plan", "plan.lock"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": source(11)}, "its images are different"),
        ({"source": source(classes=["a"])}, "its images are different"),
        ({"source": source(name="there")}, "source was here, now there"),
        ({"rules": replace(RULES, shard_samples=5)}, "shard_samples was 4, now 5"),
        ({"rules": replace(RULES, shard_bytes=5.0)}, r"shard_bytes was 1000000000\.0, now 5\.0"),
        ({"rules": replace(RULES, seed=1)}, "seed was 0, now 1"),
        ({"rules": replace(RULES, provenance=True)}, "provenance was False, now True"),
        ({"rules": replace(RULES, short_side=9)}, "short_side was None, now 9"),
    ],
)
def test_another_plan_is_refused_until_the_first_is_deleted(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    first = plan_split(source(), tmp_path, "train", RULES)
    given_now = {"source": source(), "rules": RULES} | changed
    with pytest.raises(UserError, match=rf"\.train\.parts contains an unfinished pack that differs: {message}; finish"):
        plan_split(out=tmp_path, split="train", **given_now)
    assert load_plan(tmp_path, "train") == first
    assert names(first) == shuffled([f"item {n}" for n in range(10)], 0)


def test_the_version_of_pillow_counts_only_where_it_writes_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(extension: str) -> Source:
        return Source("here", iter([Item("a", extension, b"")]))

    for name in ("png", "gif"):
        plan_split(one(name), tmp_path, name, RULES)
    monkeypatch.setattr(PIL, "__version__", "0.1")
    plan_split(one("png"), tmp_path, "png", RULES)
    with pytest.raises(UserError, match=r"Pillow was .*, now 0\.1"):
        plan_split(one("gif"), tmp_path, "gif", RULES)


def test_quality_counts_only_where_images_are_reduced(tmp_path: Path) -> None:
    first = plan_split(source(), tmp_path, "train", RULES)
    assert plan_split(source(), tmp_path, "train", replace(RULES, quality=50)) == first


def test_a_trusted_plan_is_not_listed_again(tmp_path: Path) -> None:
    first = plan_split(source(), tmp_path, "train", RULES, is_trusted=True)
    again = source(2)
    assert plan_split(again, tmp_path, "train", RULES, is_trusted=True) == first
    assert len(list(again.items)) == 1, "one was looked at, to see that there is something"
    with pytest.raises(UserError, match="shard_samples was 4, now 5"):
        plan_split(source(), tmp_path, "train", replace(RULES, shard_samples=5), is_trusted=True)


def test_nothing_is_written_for_a_source_of_nothing(tmp_path: Path) -> None:
    def items() -> Any:
        raise UserError("no image")
        yield

    with pytest.raises(UserError, match="no image"):
        plan_split(Source("here", items()), tmp_path / "out", "train", RULES)
    assert not (tmp_path / "out").exists()


def test_a_listing_that_fails_in_the_middle_leaves_no_plan(tmp_path: Path) -> None:
    def items() -> Any:
        yield Item("a", "png", b"")
        raise UserError("mixed")

    with pytest.raises(UserError, match="mixed"):
        plan_split(Source("here", items()), tmp_path, "train", RULES)
    assert plan_split(source(), tmp_path, "train", RULES).images == 10


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    plan = plan_split(source(), tmp_path, "train", RULES)
    for text in ("[]", "{}", '{"facts": [], "rules": {}, "starts": []}', "{"):
        (plan.parts / "plan" / "plan.json").write_text(text)
        with pytest.raises(UserError, match=r"plan\.json cannot be read "):
            load_plan(tmp_path, "train")
    with pytest.raises(UserError, match=r"plan\.json cannot be read .*; delete .*\.train\.parts to start again"):
        load_plan(tmp_path, "train")
    with pytest.raises(UserError, match=r"delete .*\.train\.parts to start again"):
        plan_split(source(), tmp_path, "train", RULES)
