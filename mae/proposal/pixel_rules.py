"""Rules for the channels of the images, and for the range of their values."""

from mae.data.images.decode import CHANNELS
from mae.errors import UserError
from mae.proposal.choice import Choice
from mae.proposal.facts import Facts, ImageFacts


def channels_of(facts: Facts) -> tuple[int, str]:
    """Return the number of channels to train on, and why.

    Raises:
        UserError: if arrays differ in it, or lie beside images that cannot have it.
    """
    images = facts.images
    found = ", ".join(f"{count} with {planes}" for planes, count in sorted(images.planes.items()))
    total = sum(images.planes.values())
    if images.arrays:
        of_arrays = set(images.planes) if images.arrays == total else set(images.planes) | {3}
        if len(of_arrays) > 1 and (images.arrays == total or not of_arrays <= {*CHANNELS}):
            raise UserError(
                f"the sampled images in {facts.source} differ in their channels ({found}), and .npy arrays can be read "
                "only with those that they have; give a folder in which all images have the same number"
            )
        return max(of_arrays), f"as the .npy arrays have it ({found})"
    if set(images.planes) == {1}:
        return 1, f"all {total} sampled images are gray"
    if images.transparent == total:
        return 4, f"all {total} sampled images have an alpha channel in use; 3 drops it"
    why = f"sampled images by colour planes: {found}"
    if images.transparent:
        why += f"; alpha, which {images.transparent} use, is dropped (4 keeps it)"
    return 3, why + ("; gray becomes equal planes" if 1 in images.planes else "")


def value_range_of(images: ImageFacts) -> list[Choice]:
    """Return the range of values of images of more than 8 bits; none for other images."""
    wide = images.wide
    if not wide.images:
        return []
    if wide.fits_sixteen_bits and not wide.uses_few_levels:
        proposal, why = "0 65536", f"{wide}: the upper eight of 16 bits are kept"
    else:
        proposal, why = wide.proposal, f"{wide} in the sample; mae pack prints the range of all"
    return [Choice("data.value_range", [float(number) for number in proposal.split()], why)]
