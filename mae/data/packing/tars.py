"""Images in existing tar shards, with their side files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mae.data.classes import CLASSES_FILE
from mae.data.packing.class_list import NO_CLASSES, ClassList, known_classes, require_equal
from mae.data.packing.convert import is_image
from mae.data.packing.items import Extent, Item, Source, no_image
from mae.data.scan import LABEL_EXTENSION, Sample, samples, split_name
from mae.data.store.shards import Shard
from mae.data.store.unpacked import plain_tar
from mae.data.tar import Member, members
from mae.errors import UserError, first_of


def list_tars(
    source: Source, shards: Sequence[Shard], cache_dir: Path, known: ClassList, has_labels: bool
) -> Iterator[Item]:
    """Yield the images of shards, and fill in the other attributes of `source`; without labels, .cls files stay out.

    The files of a key need not be side by side, as long as they are in one shard.
    """
    stored = _stored_classes(shards, known) if has_labels else NO_CLASSES
    source.classes = list(stored.names or known.names) if has_labels else []
    images, labelled, empty = 0, 0, list[str]()
    for shard in shards:
        before = images
        for item in _list_tar(source, shard, plain_tar(shard, cache_dir).resolve()):
            images += 1
            is_labelled = any(ending == LABEL_EXTENSION for ending, _ in item.side_files)
            if is_labelled and not has_labels:
                yield item._replace(side_files=tuple(file for file in item.side_files if file[0] != LABEL_EXTENSION))
            else:
                labelled += is_labelled
                yield item
        if images == before:
            empty.append(str(shard))
    if not images:
        raise no_image(source.name)
    if empty:
        source.remarks.append(f"{len(empty)} of {len(shards)} shards contain no image: {first_of(empty)}")
    if labelled and not stored.names:
        meaning = f"class N is line N + 1 of {known.origin}" if known.names else "--classes FILE gives them names"
        source.remarks.append(f"no {CLASSES_FILE} is beside the shards; labels are taken as numbers: {meaning}")


def _stored_classes(shards: Sequence[Shard], known: ClassList) -> ClassList:
    """Return the class list beside the shards, which must agree with a known list."""
    found = NO_CLASSES
    for folder in dict.fromkeys(Path(shard.url).parent for shard in shards if not shard.is_remote):
        classes = ClassList(known_classes(folder), str(folder / CLASSES_FILE))
        for other in (found, known):
            if classes.names and other.names:
                require_equal(classes, other)
        found = classes if classes.names else found
    return found


def _list_tar(source: Source, shard: Shard, tar: Path) -> Iterator[Item]:
    listing = members(tar, str(shard), lambda kind, name: source.left_out.add(name, kind))
    packed = set[str]()
    for sample in samples(_side_by_side(listing, str(shard)), str(shard)):
        image = sample.image or _other_image(sample, str(shard))
        if not image:
            continue
        packed.update(member.name for member in sample.files.values())
        extents = {ending: Extent(str(tar), member.offset, member.size) for ending, member in sample.files.items()}
        side = tuple((ending, extent) for ending, extent in extents.items() if ending != image)
        yield Item(f"{shard.name}/{sample.key}", image, extents[image], side_files=side)
    for member in listing:
        if member.name not in packed:
            source.left_out.add(member.name)


def _side_by_side(listing: Sequence[Member], shard: str) -> list[Member]:
    """Return the files with those of one key next to each other, for keys that end at the first or the last dot."""
    keys, stems, seen = dict[str, int](), dict[str, int](), set[tuple[str, str]]()
    places = []
    for number, member in enumerate(listing):
        stem, _, ending = member.name.rpartition(".")
        key, extension = split_name(member.name)
        if extension and (stem, ending.lower()) in seen:
            raise UserError(f"shard {shard}: file {member.name!r} occurs twice; remove one of them")
        seen.add((stem, ending.lower()))
        places.append((keys.setdefault(key, number), stems.setdefault(stem, number), number))
    return [listing[number] for _, _, number in sorted(places)]


def _other_image(sample: Sample, shard: str) -> str:
    """Return the extension of an image that only packing knows; "" if there is none."""
    found = [ending for ending in sample.files if is_image(ending)]
    if len(found) > 1:
        raise UserError(
            f"shard {shard}: sample {sample.key!r} has {len(found)} images ({', '.join(found)}); leave one in it"
        )
    return found[0] if found else ""
