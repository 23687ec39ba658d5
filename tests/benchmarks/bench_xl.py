"""What mining takes at GPT2-XL's width: memory of each shard beside what `plan` says, and tokens per second.

`python tests/benchmarks/bench_xl.py --json` prints one JSON object. The model has GPT2-XL's configuration and untrained
weights of its first two blocks, which are cut into two shards of one block on this machine; all 50,257 tokens of the
vocabulary get statistics, in both layers (2.4 GiB each), while about 4,000 tokens go through. Then one scoring actor
takes the core-tokens of a layer. peak: the most that the process held (VmHWM), libraries included; planned: what `plan`
says, without about 0.9 GiB for them. Takes 6 GiB of memory and 1 GB of disk.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from polyray import columns
from polyray.cluster import chain, service
from polyray.cluster.plan import Work
from polyray.cluster.text_memory import scoring_memory, shard_memory
from polyray.cluster.text_resolve import resolve
from polyray.cluster.text_score import TextScorer
from polyray.config import parse_any
from polyray.models.language import LanguageModel
from polyray.records import PartInfo, Receipt
from polyray.store import Store
from polyray.text_config import TextConfig

GIB = 1024**3
N_BLOCKS = 2
WIDTH, VOCAB = 1600, 50_257


def peak_bytes() -> int:
    """The most that this process has held so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


class MeasuredShard(chain.ShardActor):
    """A shard that writes beside OUT what it held at most before it was saved, and after."""

    def save(self, unit_key: str) -> list[PartInfo]:
        before = peak_bytes()
        parts = super().save(unit_key)
        note = Path(self._worker.out).parent / f"peak-{os.getpid()}.json"
        first = min(part.layer or "" for part in parts)
        note.write_text(json.dumps({"layer": first, "mining": before, "saving": peak_bytes()}))
        return parts


def make_model(folder: Path) -> None:
    """GPT2-XL's config.json, a tokenizer of one-word tokens, and random weights of the first blocks."""
    config = GPT2Config(n_embd=WIDTH, n_layer=48, n_head=25)
    config.save_pretrained(folder)
    words = [f"w{i}" for i in range(VOCAB - 1)]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate([*words, "<eot>"])}, unk_token="<eot>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eot>", unk_token="<eot>").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    model = LanguageModel(str(folder))
    wanted = ("wte.", "wpe.", *(f"h.{i}." for i in range(N_BLOCKS)))
    weights = {}
    for name, empty in model.skeleton.base_model.state_dict().items():
        if name.startswith(wanted):
            noise = 0.02 * torch.randn(empty.shape, generator=generator)
            weights[name] = 1 + noise if ".ln_" in name and name.endswith("weight") else noise
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configured(folder: Path, threads: int) -> TextConfig:
    config = parse_any(
        {
            "science": {
                "method": "categorical",
                "model": {"path": str(folder), "layers": [1], "micro_batch": 1},
                "corpus": {"path": str(folder / "corpus.jsonl")},
                "core": {"min_count": 1},
                "numerics": {"threads": threads},
            },
            "execution": {"shard": {"max": N_BLOCKS, "num_cpus": 0.5}, "scoring": {"num_cpus": 0.5}},
        }
    )
    if not isinstance(config, TextConfig):
        raise TypeError("not the config of a categorical sweep")
    return config


@ray.remote(max_calls=1)
def core_peak(sweep_ref: object, layer: str) -> tuple[int, float]:
    """What a scoring actor holds at most, and the seconds that it takes, for the core-tokens of a layer."""
    worker = TextScorer(sweep_ref)  # type: ignore[arg-type] - Ray has put the sweep in its place
    started_s = time.monotonic()
    worker.parts(Work("core", layer))
    return peak_bytes(), time.monotonic() - started_s


def measure(folder: Path, n_tokens: int, threads: int) -> dict[str, object]:
    """Mines on the current Ray cluster, or a local one."""
    make_model(folder)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, VOCAB - 1, 500)) for _ in range(n_tokens // 500)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    config = configured(folder, threads)
    resolved = resolve(config, str(folder / "out"))
    sweep = resolved.sweep
    store = Store(sweep.out)
    store.create_or_resume(resolved.identity, resolved.provenance, config.model_dump(mode="json"))
    lease = store.acquire()
    worker = TextScorer(sweep)
    for work in sweep.works("tokenise", store):
        store.commit(Receipt(work.key, worker.parts(work), 0.0, "", work.stage))
    # Every token of the vocabulary, as a large corpus would have it.
    every = {"token": np.arange(VOCAB), "count": np.ones(VOCAB, np.int64), "text": [f"w{i}" for i in range(VOCAB)]}
    part = store.write_part("tokens", "count", columns.table("tokens", every), None)
    store.commit(Receipt("count", [part], 0.0, "", "count"))
    speeds: list[float] = []
    usual, chain.ShardActor = chain.ShardActor, MeasuredShard  # type: ignore[misc]
    try:
        with service.cluster(config.execution):
            started_s = time.monotonic()
            told = lambda _, progress: speeds.append(progress.units_per_s)  # noqa: E731
            chain.mine(sweep, store, sweep.works("mine", store), N_BLOCKS, told, lambda _: None)
            mine_s = time.monotonic() - started_s
            peak, core_s = ray.get(core_peak.remote(ray.put(sweep), "h.1"))
    finally:
        chain.ShardActor = usual  # type: ignore[misc]
        lease.release()
    notes = sorted((json.loads(p.read_text()) for p in folder.glob("peak-*.json")), key=lambda n: n["layer"])
    held = shard_memory(resolved.sizes, sweep.science, config.execution, N_BLOCKS)
    core = scoring_memory(resolved.sizes, sweep.science, ["core"])["core"]
    return {
        "tokens": 500 * len(texts),
        "tokens_per_s": round(speeds[-1] * 1024, 1),
        "mine_s": round(mine_s, 1),
        "shards": [
            {
                "layer": n["layer"],
                "planned_gib": round(m.total / GIB, 2),
                "mining_gib": round(n["mining"] / GIB, 2),
                "saving_gib": round(n["saving"] / GIB, 2),
            }
            for m, n in zip(held, notes, strict=True)
        ],
        "core": {"planned_gib": round(core / GIB, 2), "peak_gib": round(peak / GIB, 2), "seconds": round(core_s, 1)},
        "kept_tokens": VOCAB,
        "threads": threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polyray-xl-") as folder:
        result = measure(Path(folder), arguments.tokens, arguments.threads)
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
