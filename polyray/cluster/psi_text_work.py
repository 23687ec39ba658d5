"""Work of a PSI sweep over documents: what is done otherwise than for images.

Which question it answers: *who reads documents, cuts snippets and encodes them?* Place in the flow: as `work.py` and
`scoring.py`, from which all else comes: merge, extract, cluster, draw, calibrate, summarise.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polyray import columns
from polyray.cluster.plan import Sweep, Work
from polyray.cluster.scoring import WORKERS, Kept, ScoringWorker
from polyray.cluster.work import Worker, filed_patches
from polyray.models.documents import Opened, Reader
from polyray.models.sentence_encoder import SentenceEncoder
from polyray.models.vocabulary import load_prompts, prompts_digest, topic_prompts
from polyray.probes.reading import Passages
from polyray.probes.text import open_corpus
from polyray.psi import documents, embed, extract, mine, snippets
from polyray.psi_text_config import PsiTextScience
from polyray.records import PartInfo


class TextSide(Worker):
    """What every worker of such a sweep knows: the subject's tokens, and how snippets are cut from documents."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        assert isinstance(sweep.science, PsiTextScience)
        self.text = sweep.science

    @cached_property
    def opened(self) -> Opened:
        """The subject without its weights."""
        return Opened(self.text.subject, self.text.extract.span)

    @cached_property
    def passages(self) -> Passages:
        """The corpus, opened when first needed."""
        probe = self.text.probe
        corpus = open_corpus(probe.path, probe.text_column, probe.label_column)
        return Passages(corpus, self.opened.tokenizer, self.opened.n_vocab)

    @cached_property
    def frame(self) -> extract.Frame:
        """What of a document stands for a peak."""
        rows = self.store.read("images", columns=["example", "width_px"]).sort_by("example")
        n_tokens = np.nan_to_num(columns.floats(rows, "width_px")).astype(np.int64)
        return snippets.SnippetFrame(self.opened.beside, n_tokens)


class TextSubjectWorker(TextSide):
    """Holds the language model: index, window, mine, merge, extract."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.reader = Reader(self.text.subject, self.text.extract.span, self.text.numerics)
        self._require_layers(self.reader.layers())
        self._require("subject", self.reader.digest)

    @cached_property
    def opened(self) -> Opened:
        """The subject."""
        return self.reader

    def parts(self, work: Work) -> list[PartInfo]:
        match work.stage:
            case "index":
                rows, failed = documents.index(self.passages, work.items)
                return self.write(work, {"images": rows}, failed)
            case "window":
                n_neurons = len(self.sweep.neurons[work.of_layer])
                row = snippets.layer_row(self.infos[work.of_layer], n_neurons, self.opened.beside)
                return [self.store.write_part("layers", work.key, row, None)]
            case "mine":
                layers, neurons = self.sweep.layers, self.sweep.neurons
                mined = documents.mine(self.reader, self.passages, self.text, self.images, layers, neurons, work.items)
                return self.write(work, {"mine_parts": mined.parts, "pool_peaks": mined.pool_peaks}, mined.failed)
            case "merge":
                return self.merge(work)
            case "extract":
                return self.extract(work)
        raise ValueError(f"a subject actor cannot do {work.key!r}")


class TextEncoderWorker(TextSide):
    """Holds the sentence encoder: embed."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.encoder = SentenceEncoder(self.text.encoder, self.text.numerics)
        self._require("encoder", self.encoder.digest)
        self.prompts = load_prompts(self.text.vocabulary, topic_prompts)
        self._require("vocabulary", prompts_digest(self.prompts))
        self._ids: tuple[str, NDArray[np.int64]] | None = None

    def parts(self, work: Work) -> list[PartInfo]:
        if work.kind == "vocabulary":
            return self.write(work, {"vocabulary": embed.vocabulary(self.encoder, self.prompts)})
        if self._ids is None or self._ids[0] != work.of_layer:
            self._ids = (work.of_layer, filed_patches(self.store, work.of_layer))
        rows, failed = snippets.embed(self.encoder, self.passages, self._ids[1][work.start : work.stop])
        return self.write(work, {"embeddings": rows}, failed)


class TextScoringWorker(TextSide, ScoringWorker):
    """As `ScoringWorker`, with texts for pictures."""

    def pictured(self, clusters: pa.Table, kept: Mapping[int, Kept]) -> tuple[pa.Table, list[mine.Failure]]:
        """Rows of `clusters` with the texts of their prototypes, where they are asked for."""
        if not self.text.extract.snippets or not len(clusters):
            return clusters, []
        peaks = {n: dict(zip(k.patch.tolist(), k.position.tolist(), strict=True)) for n, k in kept.items()}
        return snippets.with_snippets(clusters, peaks, self.passages)


TEXT_WORKERS: dict[str, type[Worker]] = {
    "subject": TextSubjectWorker,
    "encoder": TextEncoderWorker,
    "scoring": TextScoringWorker,
}
"""Who does the units of each kind of actor."""


def workers_of(sweep: Sweep) -> dict[str, type[Worker]]:
    """Who does the units of a PSI sweep: `scoring.WORKERS`, or `TEXT_WORKERS` over documents."""
    return TEXT_WORKERS if isinstance(sweep.science, PsiTextScience) else WORKERS
