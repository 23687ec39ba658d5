"""Estimate of a PSI sweep over documents: what will it cost, before it is run?

Place in the flow: as `estimate.py`, whose figures these are. How long documents are is told from the first ones.
"""

from itertools import islice

import torch

from polyray.cluster import plan
from polyray.cluster.estimate import Estimate, lacking, layer_line, seconds_of, seconds_per_set
from polyray.cluster.psi_text_resolve import documents_read
from polyray.errors import DataError, ModelError
from polyray.models.documents import Reader
from polyray.models.language import ModelInfo
from polyray.models.sentence_encoder import SentenceEncoder
from polyray.models.vocabulary import load_prompts, topic_prompts
from polyray.probes.reading import Passage, Passages, windows
from polyray.probes.text import open_corpus
from polyray.psi import cluster
from polyray.psi_text_config import PsiTextConfig
from polyray.schema import NULL_KINDS
from polyray.selection import neurons_swept

_SAMPLE = 32
"""Documents that are read for how long they are."""
_GIB = 1024**3
_PASSAGES = 0.3 * _GIB
"""Passages that are kept, and the longest document under way."""


def estimate(config: PsiTextConfig) -> Estimate:
    """Plans a sweep without running it; a corpus or an encoder that cannot be reached here is a problem, not an end.

    Raises:
        ConfigError: layers, neurons or prompts that do not exist, fewer documents than K.
        ModelError: there is no such subject.
    """
    science = config.science
    e = Estimate(items=science.items)
    torch.set_num_threads(science.numerics.threads)
    n_prompts = len(load_prompts(science.vocabulary, topic_prompts))
    has_gpu = torch.cuda.is_available()
    here = science.numerics if has_gpu else science.numerics.model_copy(update={"device": "cpu"})
    reader = Reader(science.subject, science.extract.span, here)
    infos = reader.layers()
    chosen = neurons_swept(science.subject.neurons, {info.name: info.width for info in infos}, "subject.neurons")
    n_neurons = {name: len(neurons) for name, neurons in chosen.items()}
    unknown = {"grid": "1×tokens", "receptive_px": None}
    e.layers = [layer_line(info, n_neurons[info.name]) | unknown for info in infos if info.name in n_neurons]
    e.n_neurons = sum(n_neurons.values())
    sample = _sample(config, reader, e)
    try:
        encoder = SentenceEncoder(science.encoder, here)
    except ModelError as error:
        e.problems.append(f"encoder: {error}")
        encoder = None
    lengths = [len(p.ids) for p in sample] or [reader.room]
    n_tokens = sum(lengths) / len(lengths)
    shape = plan.Shape(science, e.n_images, n_neurons)
    n_pool, n_keep = (min(n, e.n_images) for n in (science.embed.n_pool, science.mine.K_keep))
    n_patches = {x: min(n * n_keep + n_pool, int(e.n_images * n_tokens) + 1) for x, n in n_neurons.items()}
    sizes = {x: cluster.sizes(science.mine.K, science.mine.k_min)[:1] for x in n_neurons}
    known = {
        "mine": plan.document_works([round(n_tokens)] * e.n_images),
        "embed": plan.embed_works(n_patches),
        "draw": plan.draw_works(shape, sizes),
    }
    for stage in plan.stages(science):
        e.units[stage] = len(known[stage] if stage in known else plan.fixed_works(stage, shape))
    _size(e, config, reader, encoder, n_patches, n_prompts)
    if sample:
        n_windows = e.n_images * sum(len(windows(n, reader.room, reader.beside)) for n in lengths) / len(lengths)
        full = [p for p in sample if len(p.ids) >= reader.room][:1] or sample[:1]
        keep = {info.depth: torch.from_numpy(chosen[info.name]) for info in infos if info.name in n_neurons}
        documents = list(enumerate(full * reader.micro_batch))
        n_measured = sum(len(windows(len(p.ids), reader.room, reader.beside)) for _, p in documents)
        per_window = seconds_of(lambda: list(reader.responses(documents, keep))) / n_measured
        e.device_hours["mine"] = per_window * n_windows / 3600
        if encoder is not None:
            texts = [p.snippet(0, min(len(p.ids), science.extract.span)) for p in sample] * encoder.micro_batch
            texts = texts[: encoder.micro_batch]
            per_patch = seconds_of(lambda: encoder.encode(texts)) / len(texts)
            e.device_hours["embed"] = per_patch * sum(n_patches.values()) / 3600
    per_set = seconds_per_set(config)
    e.device_hours["cluster"] = per_set * e.n_neurons / 3600
    n_draws = science.calibrate.B * ((2 + science.calibrate.permute_dims) * len(n_neurons) + 1)
    e.device_hours["draw"] = per_set * (n_draws + len(NULL_KINDS) * e.n_neurons) / 3600
    return e


def _sample(config: PsiTextConfig, reader: Reader, e: Estimate) -> list[Passage]:
    """The first documents that can be used; how many there are goes into the estimate."""
    probe = config.science.probe
    try:
        corpus = open_corpus(probe.path, probe.text_column, probe.label_column)
        e.n_images = documents_read(config, corpus)
        found = Passages(corpus, reader.tokenizer, reader.n_vocab).read(range(e.n_images))
        return [p for _, p in islice(found, _SAMPLE) if isinstance(p, Passage)]
    except DataError as error:
        e.problems.append(f"corpus: {error}")
        return []


def _forward_bytes(info: ModelInfo, n_blocks: int, n_tokens: int) -> float:
    """Weights of embeddings and blocks, and what a forward pass of so many tokens holds at a time, in float32."""
    weights = info.vocab * info.width + n_blocks * (4 * info.width**2 + (2 + info.gated) * info.width * info.n_neurons)
    return 4.0 * (weights + n_tokens * (6 * info.n_neurons + 12 * info.width))


def _size(
    e: Estimate,
    config: PsiTextConfig,
    reader: Reader,
    encoder: SentenceEncoder | None,
    n_patches: dict[str, int],
    n_prompts: int,
) -> None:
    science = config.science
    dim = 0 if encoder is None else encoder.text_dim
    n_pool, n_keep = (min(n, e.n_images) for n in (science.embed.n_pool, science.mine.K_keep))
    per_range = e.n_images / max(e.units["mine"], 1)
    kept = per_range if science.mine.band is not None else min(n_keep, per_range)
    e.disk_gb = {
        "mine_parts": e.n_neurons * e.units["mine"] * (12 * kept + 400) / _GIB,
        "mined and examples": e.n_neurons * n_keep * 78 / _GIB,
        "embeddings": sum(n_patches.values()) * dim * 2 / _GIB,
        "clusters": e.n_neurons * 3 * (cluster.N_PROTOTYPES * 6 * science.extract.span + 300) / _GIB,
        "all others": e.n_neurons * 4 * 600 / _GIB + len(e.layers) * 2 * science.calibrate.B * 100 / _GIB,
    }
    subject = _forward_bytes(reader.model.info, reader.blocks[-1] + 1, reader.micro_batch * reader.context)
    encoding = 0.0
    if encoder is not None:
        encoding = _forward_bytes(encoder.info, encoder.info.n_layers, encoder.micro_batch * encoder.max_tokens)
    vectors = min(config.execution.scoring_vectors_gb * _GIB, max(n_patches.values(), default=0) * dim * 2)
    e.memory_gb = {
        "subject": (subject + plan.MINE_IMAGES * e.n_neurons * 8 + _PASSAGES) / _GIB,
        "encoder": (encoding + _PASSAGES) / _GIB,
        "scoring": (vectors + n_pool * dim * 10 + 8 * n_pool**2 + 8 * n_prompts**2 + _PASSAGES + 0.4 * _GIB) / _GIB,
    }
    e.problems += lacking(config.execution, e.memory_gb)
