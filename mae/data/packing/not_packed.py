"""Count of the files that are not packed, by kind."""

from collections import Counter

from mae.data.packing.convert import missing_reader

_MAX_KINDS = 8
_MAX_LETTERS = 8
_NO_EXTENSION = "without extension"


class NotPacked:
    """Files that are not packed, counted by extension."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, name: str, kind: str = "") -> None:
        """Count a file, under its extension if no other kind is given."""
        kind = kind or _extension(name)
        self._counts[kind] += 1
        self._first.setdefault(kind, name.rpartition("/")[2])

    def __str__(self) -> str:
        """Return one line, such as `6 files are left out: 3 .txt, 2 .psd, 1 Thumbs.db`."""
        kinds = sorted(self._counts.items(), key=lambda kind: (-kind[1], kind[0]))
        text = ", ".join(f"{count:,} {self._called(kind)}" for kind, count in kinds[:_MAX_KINDS])
        more = f" and {len(kinds) - _MAX_KINDS} more kinds" if len(kinds) > _MAX_KINDS else ""
        remedies = {missing_reader(kind[1:]): None for kind, _ in kinds}
        total = self._counts.total()
        what = "1 file is" if total == 1 else f"{total:,} files are"
        return "; ".join([f"{what} left out: {text}{more}", *filter(None, remedies)])

    def _called(self, kind: str) -> str:
        """Return the name of a kind, or of its only file."""
        first = self._first[kind]
        return first if kind.startswith(".") and self._counts[kind] == 1 and first.isprintable() else kind


def _extension(name: str) -> str:
    extension = name.rpartition("/")[2].rpartition(".")[2].lower()
    is_usual = "." in name and len(extension) <= _MAX_LETTERS and extension.isalnum() and not extension.isdigit()
    return f".{extension}" if is_usual else _NO_EXTENSION
