"""The sentence encoder gives what its model's own code gives, whichever texts come together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import with_words

from polyray.config import NumericsConfig
from polyray.errors import ConfigError, ModelError
from polyray.models.minilm import load_minilm, sentence_vectors
from polyray.models.sentence_encoder import SentenceEncoder
from polyray.models.vocabulary import load_prompts, topic_prompts
from polyray.psi_text_config import SentenceEncoder as Config

CPU = NumericsConfig()
TEXTS = ["the jury said Friday", "", "Straße, naïve 語!", "a " * 40, "[SEP] is no separator", "the jury said Friday"]


def config(**settings: object) -> Config:
    return Config.model_validate({"kind": "sentence", "max_tokens": 48, "micro_batch": 4} | settings)


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    torch.set_num_threads(1)
    return SentenceEncoder(config(), CPU)


def test_vectors_are_those_of_the_models_own_code(encoder: SentenceEncoder) -> None:
    model, tokenizer = load_minilm()
    plain = [t for t in TEXTS if "[" not in t]  # whose tokenizer would take it for a separator
    expected = sentence_vectors(model, tokenizer, plain)
    np.testing.assert_allclose(encoder.encode(plain).float(), expected, atol=5e-4)  # half precision
    np.testing.assert_allclose(encoder.encode_prompts(plain), expected, atol=2e-5)


def test_a_text_has_the_same_bits_whichever_others_are_with_it(encoder: SentenceEncoder) -> None:
    together = encoder.encode(TEXTS)
    assert together.shape == (len(TEXTS), encoder.text_dim)
    assert together.isfinite().all()
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.equal(encoder.encode([text])[0], vector)
    assert torch.equal(encoder.encode(TEXTS[::-1]).flip(0), together)
    assert encoder.encode([]).shape == (0, encoder.text_dim)


def test_of_a_long_text_the_end_is_read(encoder: SentenceEncoder) -> None:
    words = [f"{n}" for n in range(10, 90)]
    whole, end = encoder.encode([" ".join(words), " ".join(words[-46:])])
    assert torch.equal(whole, end)


def test_what_decides_a_vector_is_in_the_digest(encoder: SentenceEncoder) -> None:
    assert SentenceEncoder(config(), CPU).digest == encoder.digest
    other = SentenceEncoder(config(max_tokens=40), CPU)
    assert other.digest != encoder.digest
    assert other.weights_digest == encoder.weights_digest


def test_a_text_that_breaks_the_encoder_costs_itself_alone(tmp_path: Path) -> None:
    model, folder = with_words("bert", tmp_path)
    texts = ["w1 w2", "w7 w1", "w3", "w4 w4"]
    settings = config(path=str(folder), max_tokens=16)
    whole = SentenceEncoder(settings, CPU).encode(texts)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[7] = torch.nan
    model.save_pretrained(folder)
    broken = SentenceEncoder(settings, CPU)
    vectors = broken.encode(texts)
    assert vectors[1].isnan().all()
    assert torch.equal(vectors[[0, 2, 3]], whole[[0, 2, 3]])
    with pytest.raises(ModelError, match="'w7'"):
        broken.encode_prompts(["w1", "w7"])
    with pytest.raises(ConfigError, match="no prompts"):
        broken.encode_prompts([])


def test_the_topics_are_distinct_and_the_built_in_vocabulary_of_text() -> None:
    topics = load_prompts("builtin", topic_prompts)
    assert topics == topic_prompts()
    assert 380 <= len(topics) <= 450
    assert len({t.casefold() for t in topics}) == len(topics)
    assert not any(t != t.strip() or t.startswith("#") for t in topics)


def test_topics_name_what_is_said(encoder: SentenceEncoder) -> None:
    prompts = topic_prompts()
    words = encoder.encode_prompts(prompts)
    said = {
        "the pitcher threw to first base in the ninth inning": "baseball",
        "add two cups of flour, stir and bake for an hour": "recipe",
        "the defendant's attorney asked the judge for a new trial": "trial",
    }
    nearest = (encoder.encode(list(said)).float() @ words.T).topk(5, dim=1).indices.tolist()
    for found, expected in zip(nearest, said.values(), strict=True):
        assert any(expected in prompts[i] for i in found), [prompts[i] for i in found]
