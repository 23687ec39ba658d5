"""Which question it answers: *which labelled pictures is the subject shown?*

Place in the flow: the door to every probe set. The driver opens one to digest and describe it; each worker opens its
own and reads the examples of its units. The sources stand in files of their own: `tiny_imagenet`, `image_folder`,
`image_table` and `generated`.
"""

from polyray.config import Generated, ImageFolder, ImageTable, ProbeConfig, TinyImageNet
from polyray.probes.generated import GeneratedSet
from polyray.probes.image_folder import FolderSet
from polyray.probes.image_table import TableSet
from polyray.probes.pixels import Pixels, decode, pixel_hash, view
from polyray.probes.probe_set import ProbeSet
from polyray.probes.tiny_imagenet import TinyImageNetSet

__all__ = ["Pixels", "ProbeSet", "decode", "open_probe", "pixel_hash", "view"]


def open_probe(config: ProbeConfig) -> ProbeSet:
    """Opens the probe set of a config: lists its examples, reads no picture.

    Args:
        config: the `science.probe` section.

    Returns:
        The set; its order and digest depend on the contents and the config alone, not on where the set lies.

    Raises:
        DataError: the set as a whole cannot be used: missing, damaged, without images, without the column asked for,
            or not to be downloaded. The message says what to place where.
    """
    match config:
        case TinyImageNet():
            return TinyImageNetSet(config)
        case ImageFolder():
            return FolderSet(config)
        case ImageTable():
            return TableSet(config)
        case Generated():
            return GeneratedSet(config)
