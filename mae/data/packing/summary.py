"""Summary of a pack in one line."""

from mae.data.packing.plan import Plan
from mae.data.packing.publish import BAD_FILE, Packed


def describe(plan: Plan, packed: Packed) -> str:
    """Describe a split that is published."""
    parts = [f"{plan.split}: {packed.samples:,} images in {len(packed.filenames)} shards at {plan.out}"]
    if plan.classes:
        parts.append(f"{len(plan.classes)} classes")
    if packed.statistics:
        parts.append(str(packed.statistics))
    if plan.rules.short_side:
        parts.append(f"{packed.shrunk:,} images made smaller (short side {plan.rules.short_side})")
    if packed.unsuited:
        parts.append(f"{packed.unsuited:,} larger ones left as they are: no 8-bit gray or RGB")
    if packed.bad:
        parts.append(f"{len(packed.bad)} bad images left out, listed in {plan.split}-{BAD_FILE}")
    return ", ".join(parts)


def describe_part(plan: Plan, shards: range) -> str:
    """Describe a split of which only `shards` were packed."""
    which = f"shards {shards.start} to {shards.stop - 1}" if shards else "none"
    return (
        f"{plan.split}: {plan.images:,} images make {plan.shards} shards, of which {which} are packed; "
        "when all are, the same command without --shard_range publishes them"
    )
