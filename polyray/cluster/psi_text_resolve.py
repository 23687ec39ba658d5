"""Resolve: from the config of a PSI sweep over documents to a sweep, before anything is written.

Which question it answers: *does everything that the config names exist, and what does it hold?* Place in the flow: as
`resolve.py`, whose sweeps these are.
"""

import platform

from polyray import __version__
from polyray.cluster.plan import Sweep, stages
from polyray.cluster.resolve import Resolved, floor_note, neurons_digest, package_versions, pool_notes, require_device
from polyray.config import identity
from polyray.errors import ConfigError
from polyray.models.documents import Opened
from polyray.models.sentence_encoder import SentenceEncoder
from polyray.models.vocabulary import load_prompts, prompts_digest, topic_prompts
from polyray.probes.text import Corpus, open_corpus
from polyray.psi.snippets import MAX_DOCUMENTS
from polyray.psi_text_config import PsiTextConfig
from polyray.schema import VERSION
from polyray.selection import neurons_swept


def resolve(config: PsiTextConfig, out: str) -> Resolved:
    """Loads and checks everything once, and lets go of it again; of the subject one block at a time.

    Raises:
        ConfigError, DataError, ModelError: something does not exist or does not fit; nothing has been written.
    """
    science = config.science
    require_device(science.numerics, config.execution.address)
    here = science.numerics.model_copy(update={"device": "cpu"})
    prompts = load_prompts(science.vocabulary, topic_prompts)
    corpus = open_corpus(science.probe.path, science.probe.text_column, science.probe.label_column)
    n_documents = documents_read(config, corpus)
    subject = Opened(science.subject, science.extract.span)
    subject.check_weights()
    found = subject.layers()
    neurons = neurons_swept(science.subject.neurons, {info.name: info.width for info in found}, "subject.neurons")
    layers = tuple(info for info in found if info.name in neurons)
    encoder = SentenceEncoder(science.encoder, here)
    labels = [label or "" for label in corpus.labels[:n_documents]]
    notes = [*encoder.notes, *_label_notes(labels)]
    if encoder.weights_digest == subject.model.checkpoint.digest():
        notes.append("circular: the encoder and the subject are the same network, which judges itself")
    if n_documents < science.embed.n_pool:
        notes.append(f"the pool is all that is mined: {n_documents} documents, fewer than {science.embed.n_pool}")
    notes += pool_notes(config, labels)
    notes += floor_note(config, sum(len(n) for n in neurons.values()), n_documents)
    contents = {
        "subject": subject.digest,
        "encoder": encoder.digest,
        "probe": corpus.digest(),
        "vocabulary": prompts_digest(prompts),
        "neurons": neurons_digest(neurons),
    }
    provenance = {
        "polyray": __version__,
        "python": platform.python_version(),
        "device_class": science.numerics.device,
        **package_versions(),
        "subject": {
            "name": science.subject.path,
            "family": subject.model.info.family,
            "context": subject.context,
            "weights_digest": contents["subject"],
        },
        "encoder": {"kind": science.encoder.kind, "name": encoder.name, "weights_digest": encoder.digest},
        "probe": corpus.describe(),
        "n_images": n_documents,
        "n_prompts": len(prompts),
        "layers": {info.name: len(neurons[info.name]) for info in layers},
        "notes": notes,
    }
    swept = {info.name: neurons[info.name] for info in layers}
    sweep = Sweep(config, out, n_documents, layers, swept, contents, stages(science))
    return Resolved(sweep, identity(config, contents, VERSION), provenance, notes)


def documents_read(config: PsiTextConfig, corpus: Corpus) -> int:
    """Documents of the corpus that are read.

    Raises:
        ConfigError: they are fewer than a neuron's top examples, or too many to be numbered.
    """
    science = config.science
    n = min(len(corpus), science.probe.limit or len(corpus))
    if n < science.mine.K:
        raise ConfigError(
            f"science.mine.K is {science.mine.K}, but corpus {science.probe.path!r} has {n} documents to read, and a "
            "document is one example: lower mine.K (and mine.k_min), or give more or shorter documents."
        )
    if n > MAX_DOCUMENTS:
        raise ConfigError(f"{n:,} documents are too many to number snippets; at most {MAX_DOCUMENTS:,} fit.")
    return n


def _label_notes(labels: list[str]) -> list[str]:
    """A warning where labels tell nothing apart."""
    if len(set(labels)) > 1:
        return []
    what = "have no labels" if labels[0] == "" else f"all have the label {labels[0]!r}"
    return [
        f"the documents {what}: Q is 0 for every neuron and every draw, its p is 1, and so is p under every preset; S "
        "and D and their own p hold. Say in science.probe.label_column which column is the label"
    ]
