"""Pictures: whole probe images, where the viewer may look for them.

Which question it answers: *where in its image does a patch lie?* Place in the flow: opens the probe set that the run's
own config names, once, when the viewer starts. An image is asked for by its number alone, and shown only where it has
the name that the dataset knows it by.
"""

import io
import threading

from PIL import Image

from polyray.config import ProbeConfig, parse_config
from polyray.errors import ConfigError, DataError
from polyray.probes.images import ProbeSet, open_probe, view
from polyray.report.catalog import Catalog

_QUALITY = 85


class Pictures:
    """The probe set of a run, as its subject saw it.

    Args:
        catalog: the run.
        path: where the probe set lies, if not where the config says.

    Raises:
        DataError: the sweep has no images, or the probe set is not where the config says, or another one.
    """

    def __init__(self, catalog: Catalog, path: str | None = None) -> None:
        raw = catalog.dataset.run["config"]
        if raw["science"].get("method", "psi") != "psi":
            raise DataError("only sweeps over images have probe images to be shown; leave --probe away.")
        try:
            config = parse_config(raw)
        except ConfigError as e:
            raise DataError(f"the run's config is none that this version knows: {e}") from e
        self._subject = config.science.subject
        self.side_px: int = self._subject.input_px
        self._set: ProbeSet = open_probe(probe_of(config.science.probe, path))
        expected = catalog.dataset.run["provenance"].get("n_images")
        if expected is not None and expected != len(self._set):
            raise DataError(
                f"the probe set has {len(self._set)} images, the run saw {expected}: it is another one. Put the run's "
                "own where its config says, or leave --probe away."
            )
        self._lock = threading.Lock()
        self._catalog = catalog

    def __len__(self) -> int:
        return len(self._set)

    def jpeg(self, example: int) -> bytes | None:
        """An image, cut and scaled as the subject saw it; None where it cannot be read, or has another name than the
        dataset knows it by.

        Raises:
            IndexError: there is no such image.
        """
        known = self._catalog.at("images", ["name"], example=example)
        if known and known[0]["name"] != self._set.names[example]:
            return None
        try:
            with self._lock:
                pixels = self._set.read(example)
        except DataError:
            return None
        out = io.BytesIO()
        seen = view(pixels, self._subject.input_px, self._subject.resize)
        Image.fromarray(seen).save(out, format="JPEG", quality=_QUALITY)
        return out.getvalue()


def probe_of(config: ProbeConfig, path: str | None) -> ProbeConfig:
    """A probe set's config with another place for it.

    Raises:
        DataError: the set is drawn, and lies nowhere.
    """
    if path is None:
        return config
    if "path" not in type(config).model_fields:
        raise DataError(f"a probe set of kind {config.kind!r} lies nowhere: leave the path away.")
    return config.model_copy(update={"path": path})
