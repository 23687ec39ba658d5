"""What is asked for of a language model's neurons by the Polysemanticity Index, in the same two halves as `config.py`.

Which question it answers: *which sweep is this?* Place in the flow: derives from `config.py`, which picks this one
where `science.method` is `psi_text`. Only what shows, cuts out and encodes differs from images: subject, probe, encoder
and extract. What is drawn, clustered and calibrated is asked for in the same sections.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from polyray.config import Config, Science
from polyray.settings import Dtype, NeuronsByLayer, Section
from polyray.text_config import CorpusConfig


class LanguageSubject(Section):
    """The language model under study and the neurons that are read out of it."""

    path: str
    """A local folder or hub name in transformers' format, or `all-MiniLM-L6-v2` of the package of that name."""
    layers: Literal["all"] | list[Annotated[int, Field(ge=0)]] = "all"
    """Blocks whose MLP neurons are swept, from 0; no block after the last of them is held or run."""
    neurons: NeuronsByLayer = None
    """Optional choice of neurons: by layer a list of indices and ranges, `{h.3: [3, 10-19]}` (`h.3` is block 3, `10-19`
    ten neurons, 10 and 19 among them), or a JSON or YAML file with the same. Layers that it does not name are swept
    whole."""
    context: int | None = Field(None, ge=4, le=131_072)
    """Tokens of a window in which a document is read, special ones included; by default what the model was made for,
    at most 1,024."""
    dtype: Dtype = "float32"
    """Floating point of the subject's forward pass; part of the run's identity."""
    micro_batch: int = Field(8, ge=1, le=4096)
    """Windows per forward pass. Fixed, the last one padded, since batch size changes the last bits."""


class SentenceEncoder(Section):
    """A BERT whose last hidden states, averaged over a text's tokens, say where it lies: one space for geometry and
    names."""

    same_space: ClassVar[bool] = True
    standardise: ClassVar[bool] = False

    kind: Literal["sentence"]
    path: str = "all-MiniLM-L6-v2"
    """A folder or hub name of a BERT in transformers' format, or `all-MiniLM-L6-v2` of the package of that name."""
    max_tokens: int = Field(128, ge=8, le=512)
    """Of a longer text only the last so many tokens are read, since that is where the peak is."""
    dtype: Dtype = "float32"
    """Floating point of the encoder's forward pass."""
    micro_batch: int = Field(64, ge=1, le=4096)
    """Snippets per forward pass, the last one padded."""


class SnippetConfig(Section):
    """Which part of a document stands for a peak."""

    span: int = Field(24, ge=1, le=256)
    """Tokens of a snippet: up to the peak for a causal model, which has seen no further, else around it."""
    snippets: bool = True
    """Store the text of each cluster's prototypes, so that reports need no corpus."""


class PsiTextScience(Science):
    """Everything that decides a number."""

    items: ClassVar[str] = "documents"

    # Another medium, not a narrower one: what reads these four is written for text or for images.
    method: Literal["psi_text"]  # type: ignore[assignment]
    """`psi_text`: the null-calibrated Polysemanticity Index (arXiv 2508.16950) over the documents of a corpus."""
    subject: LanguageSubject  # type: ignore[assignment]
    probe: CorpusConfig  # type: ignore[assignment]
    encoder: SentenceEncoder  # type: ignore[assignment]
    extract: SnippetConfig = SnippetConfig()  # type: ignore[assignment]
    vocabulary: str = "builtin"
    """`builtin` (about 400 topics, registers and grammatical phenomena), or a text file with one prompt a line."""
    plant: None = None
    """For images alone."""
    swap: None = None
    """For images alone."""

    @model_validator(mode="before")
    @classmethod
    def _images_alone(cls, raw: Any) -> Any:
        for section in ("plant", "swap"):
            if isinstance(raw, dict) and raw.get(section) is not None:
                raise ValueError(f"{section} is for images alone; leave it out where science.method is 'psi_text'")
        return raw


class PsiTextConfig(Config):
    """A whole config file."""

    science: PsiTextScience
