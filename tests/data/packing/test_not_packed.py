from mae.data.packing.not_packed import NotPacked


def test_files_are_counted_by_kind_the_most_frequent_first() -> None:
    found = NotPacked()
    assert not found
    for name in ("b.psd", "x/a.TXT", "x/b.txt", "Thumbs.db", "x/c.PSD", "d.psd", "noext", "2024.0001", "x.a b"):
        found.add(name)
    assert str(found) == "9 files are left out: 3 .psd, 3 without extension, 2 .txt, 1 Thumbs.db"


def test_eight_kinds_are_named_and_the_others_counted() -> None:
    found = NotPacked()
    for number in range(20):
        found.add(f"x.a{number:02}")
        found.add(f"y.a{number:02}")
    assert str(found) == (
        "40 files are left out: 2 .a00, 2 .a01, 2 .a02, 2 .a03, 2 .a04, 2 .a05, 2 .a06, 2 .a07 and 12 more kinds"
    )
