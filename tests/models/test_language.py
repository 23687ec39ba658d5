"""Shards against transformers' own forward; weights against the tensors of the module; what is refused."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from languages import CONFIGS, CONTEXT, INNER, LAYERS, VOCAB, WIDTH, block, reference, saved
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from polyray.errors import ModelError
from polyray.models import checkpoint
from polyray.models.checkpoint import MINILM, Checkpoint
from polyray.models.language import LanguageModel, Shard, describe

KINDS = list(CONFIGS)
CUTS = [(0, 4), (0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)]


def some_ids(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three contexts and where they have tokens; the last one has none."""
    ids = torch.randint(0, VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, CONTEXT, dtype=torch.bool)
    mask[1, 15:] = False
    mask[2] = False
    return ids, mask


def through(shards: list[Shard], ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[dict, list[torch.Tensor]]:
    """Activations by layer, and what each shard returns."""
    activations: dict[int, torch.Tensor] = {}
    x, outputs = ids, []
    with torch.inference_mode():
        for shard in shards:
            x = shard(x, mask, activations.__setitem__, range(LAYERS))
            outputs.append(x)
    return activations, outputs


@pytest.mark.parametrize("kind", KINDS)
def test_shards_in_a_row_are_the_model(kind: str, tmp_path: Path) -> None:
    network, folder = saved(kind, tmp_path)
    model = LanguageModel(str(folder))
    ids, mask = some_ids(kind)
    whole: dict[int, torch.Tensor] = {}
    for cut in CUTS:
        shards = [Shard(model, range(a, b), with_head=b == LAYERS) for a, b in pairwise(cut)]
        activations, outputs = through(shards, ids, mask)
        want, hidden, logits = reference(network, ids, None if model.info.causal else mask)
        seen = mask if not model.info.causal else torch.ones_like(mask)
        seen[2] = model.info.causal  # a context without tokens means nothing where attention sees the padding
        assert sorted(activations) == list(range(LAYERS))
        for layer in range(LAYERS):
            assert activations[layer].shape == (3, CONTEXT, INNER)
            torch.testing.assert_close(activations[layer][seen], want[layer][seen], atol=1e-5, rtol=0)
        for end, output in zip(cut[1:], outputs, strict=True):
            torch.testing.assert_close(output[seen], hidden[end][seen], atol=1e-5, rtol=0)
        torch.testing.assert_close(shards[-1].logits(outputs[-1])[seen], logits[seen], atol=1e-5, rtol=0)
        whole = whole or activations
        assert all(torch.equal(whole[layer], activations[layer]) for layer in range(LAYERS))


def test_a_causal_models_tokens_do_not_see_the_padding(tmp_path: Path) -> None:
    _, folder = saved("gpt2", tmp_path)
    shard = Shard(LanguageModel(str(folder)), range(LAYERS))
    ids, mask = some_ids("gpt2")
    other = torch.where(mask, ids, (ids + 1) % VOCAB)
    with torch.inference_mode():
        assert torch.equal(shard(ids, mask)[mask], shard(other, mask)[mask])
        assert torch.equal(shard(ids, mask), shard(ids))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_nothing_behind_the_last_layer_is_run(kind: str, tmp_path: Path) -> None:
    network, folder = saved(kind, tmp_path)
    shard = Shard(LanguageModel(str(folder)), range(1, LAYERS))
    ids, _ = some_ids(kind)
    _, hidden, _ = reference(network, ids)
    read: list[int] = []
    with torch.inference_mode():
        out = shard(hidden[1], read=lambda layer, _: read.append(layer), layers=[0, 2, 3], last=2)
        late = shard(hidden[2], start=2, last=2)
    assert read == [2]
    torch.testing.assert_close(out, hidden[3], atol=1e-5, rtol=0)
    torch.testing.assert_close(late, hidden[3], atol=1e-5, rtol=0)


def test_what_a_reader_returns_takes_the_activations_place(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    model = LanguageModel(str(folder))
    shard = Shard(model, range(0, 1))
    ids, _ = some_ids("llama")
    with torch.inference_mode():
        plain = shard(ids)
        same = shard(ids, read=lambda _, a: a.clone(), layers=[0])
        none = shard(ids, read=lambda _, a: torch.zeros_like(a), layers=[0])
        seen: list[torch.Tensor] = []
        shard(ids, read=lambda _, a: seen.append(a), layers=[0])
        written = seen[0] @ model.w_out(0)
    assert torch.equal(plain, same)
    torch.testing.assert_close(plain - none, written, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_modules(kind: str, tmp_path: Path) -> None:
    network, folder = saved(kind, tmp_path)
    model = LanguageModel(str(folder))
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))
    h = torch.randn(7, INNER, generator=torch.Generator().manual_seed(3))
    for layer in range(LAYERS):
        own, before = block(network, layer), block(network, max(layer - 1, 0))
        if kind == "bert":
            up, down, gate = own.intermediate.dense, own.output.dense, None
            gains = before.output.LayerNorm.weight * own.attention.output.LayerNorm.weight
        elif kind == "gpt2":
            up, down, gate, gains = own.mlp.c_fc, own.mlp.c_proj, None, own.ln_2.weight
        elif kind.startswith("gpt_neox"):
            up, down, gate = own.mlp.dense_h_to_4h, own.mlp.dense_4h_to_h, None
            gains = own.post_attention_layernorm.weight
        else:
            up, down, gate = own.mlp.up_proj, own.mlp.down_proj, own.mlp.gate_proj
            gains = own.post_attention_layernorm.weight
        with torch.no_grad():
            # As maps, whichever way round the tensors are stored: what the module adds beyond its bias.
            for linear, weight, z in ((up, model.w_in(layer), x), (down, model.w_out(layer), h), (gate, None, x)):
                if linear is not None:
                    given = model.gate(layer) if weight is None else weight
                    torch.testing.assert_close(linear(z) - linear(torch.zeros_like(z)), z @ given, atol=1e-5, rtol=0)
            if layer:
                torch.testing.assert_close(model.gains(layer), gains)
        assert (model.gate(layer) is None) == (gate is None)
    torch.testing.assert_close(model.input_embeddings(), network.get_input_embeddings().weight.detach())
    assert model.info.gated == (model.gate(0) is not None)


def test_a_description_needs_no_weights(tmp_path: Path) -> None:
    CONFIGS["mistral"].save_pretrained(tmp_path)
    info = describe(str(tmp_path))
    assert (info.family, info.n_layers, info.n_neurons, info.width, info.context, info.vocab) == (
        "Llama", LAYERS, INNER, WIDTH, CONTEXT, VOCAB,
    )  # fmt: skip
    assert info.causal
    assert info.gated


def test_minilm_is_a_built_in_model() -> None:
    from polyray.models.minilm import load_minilm

    model = LanguageModel(MINILM)
    assert (model.info.family, model.info.n_layers, model.info.n_neurons) == ("BERT", 6, 1536)
    assert not model.has_head()
    network, tokenizer = load_minilm()
    given = tokenizer(["A short one.", "And a sentence that is longer than it."], padding=True, return_tensors="pt")
    shards = [Shard(model, range(0, 2)), Shard(model, range(2, 6))]
    mask = given["attention_mask"].bool()
    with torch.inference_mode():
        out = shards[1](shards[0](given["input_ids"], mask), mask)
        want = network(**given).last_hidden_state
    torch.testing.assert_close(out[mask], want[mask], atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="no head"):
        Shard(model, range(5, 6), with_head=True)


def test_several_files_half_precision_and_files_without_a_head(tmp_path: Path) -> None:
    network, folder = saved("gpt2", tmp_path, max_shard_size="8KB")
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2
    ids, _ = some_ids("gpt2")
    with torch.inference_mode():
        want = Shard(LanguageModel(str(folder)), range(LAYERS))(ids)
    # Without head and prefix, as the model itself saves it; in float16.
    bare = tmp_path / "bare"
    network.get_submodule("transformer").half().save_pretrained(bare)
    assert all(not name.startswith("transformer.") for name in load_file(bare / "model.safetensors"))
    model = LanguageModel(str(bare))
    with torch.inference_mode():
        got = Shard(model, range(LAYERS))(ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    assert model.has_head()  # tied to the input embeddings


def test_pytorch_files_and_old_names(tmp_path: Path) -> None:
    network, folder = saved("bert", tmp_path)
    ids, mask = some_ids("bert")
    with torch.inference_mode():
        want = Shard(LanguageModel(str(folder)), range(LAYERS), with_head=True)
        logits = want.logits(want(ids, mask))
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in network.state_dict().items()
    }
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model = LanguageModel(str(folder))
    with torch.inference_mode():
        shard = Shard(model, range(LAYERS), with_head=True)
        assert torch.equal(shard.logits(shard(ids, mask)), logits)


def test_a_shard_reads_its_own_tensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved("gpt2", tmp_path)
    asked: list[str] = []
    original = Checkpoint.tensor

    def tensor(self: Checkpoint, name: str) -> torch.Tensor:
        asked.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    model = LanguageModel(str(folder))
    Shard(model, range(1, 3))
    assert {name.split(".")[2] for name in asked} == {"1", "2"}
    asked.clear()
    Shard(model, range(0, 1))
    assert {name for name in asked if ".h." not in name} == {"transformer.wte.weight", "transformer.wpe.weight"}
    asked.clear()
    model.w_in(2)
    assert asked == ["transformer.h.2.mlp.c_fc.weight"]


def test_an_unknown_family_is_told_the_known_ones(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'t5'.*'gpt2', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'qwen3', 'bert'"):
        describe(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(ModelError, match="'own'"):
        describe(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "gpt2", "n_layer": "many"}'])
def test_a_damaged_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError):
        describe(str(tmp_path))


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    _, folder = saved("gpt2", tmp_path, max_shard_size="8KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["transformer.h.2.mlp.c_fc.weight"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(ModelError, match=f"{file.name}.* is damaged or no file of weights"):
        Shard(LanguageModel(str(folder)), range(2, 3))
    file.write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=f"{file.name}.* is damaged or no file of weights"):
        Shard(LanguageModel(str(folder)), range(2, 3))
    file.unlink()
    with pytest.raises(ModelError, match=f"{file.name}.* is missing in"):
        Shard(LanguageModel(str(folder)), range(2, 3))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ModelError, match="no file of its folder"):
        Shard(LanguageModel(str(folder)), range(2, 3))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="no weights"):
        Shard(LanguageModel(str(folder)), range(2, 3))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        describe(str(folder))


def test_tensors_that_are_missing_or_misshapen_are_refused(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in weights.items() if n != name}, path)
    with pytest.raises(ModelError, match=r"lack 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        Shard(LanguageModel(str(folder)), range(1, 2))
    Shard(LanguageModel(str(folder)), range(2, 4))
    save_file(weights | {name: weights[name][:-1].contiguous()}, path)
    with pytest.raises(ModelError, match=rf"\[{INNER - 1}, {WIDTH}\], not \[{INNER}, {WIDTH}\]"):
        Shard(LanguageModel(str(folder)), range(1, 2))


def test_blocks_and_layers_out_of_range_are_refused(tmp_path: Path) -> None:
    _, folder = saved("gpt2", tmp_path)
    model = LanguageModel(str(folder))
    for blocks in (range(0, 5), range(4, 5), range(-1, 2), range(2, 2), range(0, 4, 2)):
        with pytest.raises(ModelError):
            Shard(model, blocks)
    for layer in (-1, 4):
        with pytest.raises(ModelError, match=f"layer {layer} is out of range"):
            model.w_in(layer)
    with pytest.raises(ModelError, match="layer 0 is out of range"):
        model.gains(0)
    with pytest.raises(ModelError, match="not the last ones"):
        Shard(model, range(0, 2), with_head=True)
    with pytest.raises(ModelError, match="holds no head"):
        Shard(model, range(LAYERS)).logits(torch.zeros(1, WIDTH))
    with pytest.raises(ModelError, match=f"context is {CONTEXT}"):
        Shard(model, range(0, 1))(torch.zeros(1, CONTEXT + 1, dtype=torch.long))


def test_numbers_that_leave_half_precision_are_refused(tmp_path: Path) -> None:
    _, folder = saved("gpt2", tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.h.1.mlp.c_proj.bias"] = torch.full((WIDTH,), 1e5)
    save_file(weights, path, metadata={"format": "pt"})
    model = LanguageModel(str(folder))
    ids, _ = some_ids("gpt2")
    with torch.inference_mode():
        Shard(model, range(LAYERS), torch.float32)(ids)
        Shard(model, range(LAYERS), torch.bfloat16)(ids)
        with pytest.raises(ModelError, match=r"not finite in float16\. Use float32, or bfloat16 for its range"):
            Shard(model, range(LAYERS), torch.float16)(ids)


def test_a_name_that_is_neither_a_folder_nor_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"nobody/nothing.*offline"):
        describe("nobody/nothing")
    with pytest.raises(ModelError, match="no such/folder"):
        describe("no such/folder")


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    _, folder = saved("gpt2", tmp_path)
    first = LanguageModel(str(folder)).checkpoint.digest()
    assert first == LanguageModel(str(folder)).checkpoint.digest()
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.wte.weight"][0, 0] += 1
    save_file(weights, path)
    assert LanguageModel(str(folder)).checkpoint.digest() != first
