"""Every fault case of the data path has a test that bears its code."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
# Shards, samples, order, security, remote: the cases that docs/data.md promises to cover.
CODES = {
    *(f"d{n:02}" for n in range(1, 20)),
    *(f"s{n:02}" for n in range(1, 15)),
    *(f"o{n:02}" for n in range(1, 17)),
    *("x01", "x02", "x05", "x06", "x08", "x10"),
    *(f"r{n:02}" for n in range(5, 12)),
}


def test_every_fault_case_has_a_test_of_its_name() -> None:
    # In the name of a test function, or in the id of one of its parameters.
    words = [
        words
        for path in TESTS.rglob("test_*.py")
        if path != Path(__file__)
        for words in re.findall(r"def test_\w+|\bids?=(?:f?[\"'][^\"']*[\"']|\[[^\]]*\])", path.read_text())
    ]
    found = {code for text in words for code in re.findall(r"(?<![a-z0-9])[dsoxr][0-9]{2}(?![0-9])", _parted(text))}
    assert sorted(CODES - found) == []


def _parted(text: str) -> str:
    return text.lower().replace("_", " ")
