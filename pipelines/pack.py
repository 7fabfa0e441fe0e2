"""Pack images into WebDataset shards.

mae pack images/train --out shards
"""

import sys
from collections.abc import Mapping, Sequence

from mae.data.packing.class_list import fixed_classes
from mae.data.packing.engines import process_engine, ray_engine
from mae.data.packing.items import Source, shown
from mae.data.packing.label_table import read_label_table
from mae.data.packing.pack import describe_part, pack_shards
from mae.data.packing.plan import PackRules, plan_splits
from mae.data.packing.publish import Packed, describe, publish
from mae.data.packing.settings import DIGITS, PackSettings
from mae.data.packing.sources import find_splits
from mae.data.store.unpacked import default_cache_dir
from mae.errors import UserError, one_line_errors
from mae.output import say
from mae.processes import default_workers
from mae.progress import progress_bar, working
from mae.settings import check, parse


def run(settings: PackSettings) -> dict[str, Packed]:
    """Pack every split of the source; return the published splits by name."""
    sources = _sources(settings)
    rules = PackRules(
        shard_samples=settings.shard_samples,
        shard_bytes=settings.shard_bytes,
        seed=0 if settings.shuffle and settings.source != DIGITS else None,  # digits are shuffled before they are split
        provenance=settings.provenance,
        short_side=settings.short_side,
        quality=settings.quality,
    )
    workers = default_workers() if settings.workers is None else settings.workers
    is_part = settings.shard_range is not None
    with working("looking at the source"):
        plans, published = plan_splits(sources, settings.out, rules, is_trusted=is_part), dict[str, Packed]()
    for split in sorted(sources.keys() - {plan.split for plan in plans}):
        say(f"{split}: packed before this command was interrupted")
    for plan in plans:
        for notice in plan.notices:
            say(f"{plan.split}: {notice}")
        shards = range(*(min(number, plan.shards) for number in settings.shard_range or (0, plan.shards)))
        with progress_bar(f"packing {plan.split}", plan.starts[shards.stop] - plan.starts[shards.start]) as advance:
            engine = ray_engine(workers) if settings.engine == "ray" else process_engine(workers)
            pack_shards(plan, shards, engine, advance)
        if is_part:
            say(describe_part(plan, shards), is_result=True)
        else:
            published[plan.split] = publish(plan, settings.skip_bad)
            say(describe(plan, published[plan.split]), is_result=True)
    return published


def _sources(settings: PackSettings) -> Mapping[str, Source]:
    """Return the source of each split by its name."""
    if settings.source == DIGITS:
        from mae.data.packing.digits import digit_sources  # noqa: PLC0415 (scikit-learn is slow to import)

        for name, usual in (("split", None), ("labels", "auto"), ("label_file", None), ("classes", None)):
            found = getattr(settings, name)
            check(found == usual, name, found, f"{usual} for the source digits")
        return digit_sources()
    known = fixed_classes(settings.classes, settings.out)
    table = read_label_table(settings.label_file) if settings.label_file else None
    return find_splits(settings.source, settings.split, default_cache_dir(), known, settings.labels, table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae pack`."""
    with one_line_errors():
        settings = parse(PackSettings, sys.argv[1:] if argv is None else argv, prog="mae pack")
        try:
            run(settings)
        except OSError as error:
            where, reason = shown(str(error.filename or settings.out)), error.strerror or error
            raise UserError(f"{where}: {reason}; correct that, then run the same command again") from None


if __name__ == "__main__":
    main()
