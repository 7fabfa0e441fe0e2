import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing.packs import listed
from mae.data.packing.items import Extent, Item, from_line, shown, to_line

NAMES = st.text(min_size=1) | st.binary(min_size=1).map(os.fsdecode)
EXTENTS = st.builds(Extent, NAMES, st.integers(0, 2**40), st.integers(0, 2**32), st.booleans())


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Item,
        name=NAMES,
        extension=st.text(),
        image=st.binary() | EXTENTS,
        label=st.integers(-1, 10**18),
        side_files=st.lists(st.tuples(st.text(), EXTENTS)).map(tuple),
    )
)
def test_an_item_survives_being_written_down(item: Item) -> None:
    line = to_line(item, "/root")
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert from_line(line, "/root") == item


def test_a_file_of_a_tree_is_written_short(tree: Path) -> None:
    found, items = listed(tree)
    item = items["ant/00.png"]
    line = to_line(item, found.name)
    assert len(line) < 40
    assert from_line(line, found.name) == item


def test_a_name_is_shown_on_one_line() -> None:
    assert shown("a b/é.png") == "a b/é.png"
    assert shown("a\nb.png") == "'a\\nb.png'"
