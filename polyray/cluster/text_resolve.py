"""Resolve: from the config of a categorical sweep to a sweep, before anything is written.

Which question it answers: *does everything that the config names exist, and what does it hold?* Place in the flow: as
`resolve.py`.
"""

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyray import __version__
from polyray.categorical.published import published_digest
from polyray.cluster.resolve import neurons_digest, package_versions, require_device
from polyray.cluster.text_layers import layers_of
from polyray.cluster.text_memory import Sizes, positions_of, sizes_of
from polyray.cluster.text_plan import TextSweep, text_stages
from polyray.cluster.text_rows import context_length
from polyray.config import identity
from polyray.errors import DataError
from polyray.models.blocks import layer_index, layer_name
from polyray.models.language import LanguageModel
from polyray.probes.text import open_corpus
from polyray.probes.tokens import Tokenizer
from polyray.schema import VERSION
from polyray.text_config import TextConfig


@dataclass(frozen=True)
class TextResolved:
    """A sweep that can start, and what its run.json says."""

    sweep: TextSweep
    sizes: Sizes
    """What its memory follows from."""
    identity: dict[str, Any]
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know."""


def resolve(config: TextConfig, out: str) -> TextResolved:
    """Opens and checks everything once.

    Raises:
        ConfigError, DataError, ModelError: something does not exist or does not fit; nothing has been written.
    """
    science = config.science
    require_device(science.numerics, config.execution.address)
    model = LanguageModel(science.model.path)
    info = model.info
    layers = layers_of(science, info)
    context_length(science, info)
    tokenizer = Tokenizer(model.folder)
    corpus = open_corpus(science.corpus.path, science.corpus.text_column, science.corpus.label_column)
    n_documents = min(len(corpus), science.corpus.limit or len(corpus))
    if n_documents == 0:
        raise DataError(f"corpus {science.corpus.path!r} has no documents.")
    contents = {"model": model.checkpoint.digest(), "tokenizer": tokenizer.digest(), "corpus": corpus.digest()}
    if science.model.neurons is not None:
        contents["neurons"] = neurons_digest(layers.swept)
    if science.core.published is not None:
        neurons = {layer_index(name): chosen.tolist() for name, chosen in layers.mined.items()}
        contents["published"] = published_digest(Path(science.core.published).expanduser(), neurons)
    notes = []
    if layer_name(0) in layers.swept:
        notes.append("neurons of layer 0 have no layer before them: they are excluded")
    provenance = {
        "polyray": __version__,
        "python": platform.python_version(),
        "device_class": science.numerics.device,
        **package_versions(),
        "model": {"name": science.model.path, "family": info.family, "weights_digest": contents["model"]},
        "corpus": corpus.describe(),
        "n_documents": n_documents,
        "layers": {name: len(neurons) for name, neurons in layers.mined.items()},
        "swept": list(layers.swept),
        "n_swept": {name: len(neurons) for name, neurons in layers.swept.items()},
        "notes": notes,
    }
    sweep = TextSweep(config, out, n_documents, layers, contents, text_stages(science))
    sizes = sizes_of(model, science, layers, positions_of(corpus, tokenizer, science, info, n_documents))
    return TextResolved(sweep, sizes, identity(config, contents, VERSION), provenance, notes)
