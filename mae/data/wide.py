"""Check of the range of values before a run: of images of more than 8 bits, whose values decide what is seen."""

from contextlib import suppress

from mae.data.images.decode import count_wide, decode_pixels, is_wide_colour
from mae.data.images.levels import FEW_LEVELS, WideValues
from mae.data.settings import DataSettings
from mae.data.source import Source
from mae.errors import BadImageError, UserError

_INSPECTED_IMAGES = 16


def require_value_range(source: Source, data: DataSettings) -> None:
    """Inspect some images; refuse those of more than 8 bits of which little would be left without a range.

    Raises:
        UserError: naming an image, the values found, and a range that holds them.
    """
    if data.value_range is not None:
        return
    first, found, colour = "", WideValues(), dict[str, int]()
    for name, image in source.some_images(_INSPECTED_IMAGES, data):
        with suppress(BadImageError):  # reported by whoever decodes it
            if isinstance(image, UserError):
                continue
            if count_wide(found, image):
                first = first or name
            elif is_wide_colour(image):
                colour[name] = int(decode_pixels(image, 3).max())
    if colour and (brightest := max(colour.values())) < FEW_LEVELS:
        raise UserError(
            f"{len(colour)} inspected images have colour of 16 bits, of which the upper eight are read, here at most "
            f"{brightest} of 255; the first is {next(iter(colour))}; convert them to .npy arrays of uint16 and "
            "set data.value_range, or set --data.value_range 0 65536 to go on"
        )
    if not found.images:
        return
    remedy = f"the first is {first}; set --data.value_range {found.proposal}"
    if not found.fits_sixteen_bits:
        raise UserError(f"{found}, so their range must be set; {remedy}")
    if found.uses_few_levels:
        left = int(found.greatest) // 256 + 1
        whole = "or 0 65536 to keep the upper eight of 16 bits"
        raise UserError(f"{found}: of 256 levels of gray, {left} would be left; {remedy}, {whole}")
