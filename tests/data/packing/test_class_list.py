from pathlib import Path

import pytest

from mae.data.packing.class_list import ClassList, fixed_classes, labels_of, read_classes, require_equal
from mae.errors import UserError


@pytest.mark.parametrize("text", ["cat\ndog\n", "cat\r\ndog\r\n", "\ufeffcat\ndog", "cat\ndog\n\n"])
def test_a_class_list_has_one_name_per_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text(text, newline="")
    assert read_classes(tmp_path / "names") == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cat\n\ndog\n", "line 2 of .*names is empty"),
        (b"cat\ndog\ncat\n", "lines 1 and 3 of .*names are both 'cat'"),
        (b"cat\ta\n", r"class 'cat\\ta' in .*names has control characters"),
        (b"caf\xe9\n", "names has control characters .* or bytes that are not UTF-8"),
        (b"\n", "names lists no class"),
    ],
)
def test_a_list_that_would_shift_labels_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "names").write_bytes(text)
    with pytest.raises(UserError, match=message):
        fixed_classes(tmp_path / "names", tmp_path)


def test_a_list_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "is not a regular file"), (tmp_path / "none", "lists no class, or does not exist")):
        with pytest.raises(UserError, match=f"{reason}.* one class name per line"):
            fixed_classes(path, tmp_path)


def test_a_given_list_must_be_that_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\nemu\n")
    assert fixed_classes(tmp_path / "names", tmp_path).names == ("cat", "emu")
    (tmp_path / "classes.txt").write_text("cat\nemu\n")
    assert fixed_classes(tmp_path / "names", tmp_path).names == fixed_classes(None, tmp_path).names == ("cat", "emu")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(
        UserError, match=r"names and .*classes\.txt list different classes: label 1 is 'emu' in the first, 'dog' in the"
    ):
        fixed_classes(tmp_path / "names", tmp_path)


def test_a_list_that_ends_earlier_is_different() -> None:
    with pytest.raises(UserError, match="label 1 is 'dog' in the first, absent in the second"):
        require_equal(ClassList(("cat", "dog"), "a"), ClassList(("cat",), "b"))


def test_a_list_may_have_classes_without_a_folder() -> None:
    known = ClassList(("emu", "cat", "dog"), "names")
    assert labels_of(["cat", "dog"], "root", known) == ({"cat": 1, "dog": 2}, ["emu", "cat", "dog"])


def test_a_class_has_the_same_name_in_every_locale() -> None:
    """As a process in the C locale lists a folder that is called caf\u00e9 in UTF-8."""
    assert labels_of(["caf\udcc3\udca9"], "root", ClassList(("tea", "caf\u00e9"))) == (
        {"caf\udcc3\udca9": 1}, ["tea", "caf\u00e9"],
    )  # fmt: skip
