"""What mining the tokens costs beside the forward that it listens to.

`python tests/benchmarks/bench_tokens.py --json` prints one JSON object. ratio_mine is the median, over pairs, of the
time to run a batch of contexts through a model of GPT-2's shape and add the activations of all its MLP neurons to the
sums of their tokens, divided by the time of the bare forward of the same batch in transformers. The two alternate, so
that a slow spell of the machine hits both; with one thread on the CPU what counts is processor time, which other
processes' load distorts less than it does the clock. Weights are random: the time does not depend on them.
"""

import argparse
import json
import tempfile

import torch
from timing import in_turn, medians, ratios
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from polyray.categorical.count import count_tokens, select
from polyray.categorical.mine import TokenStatistics, batches
from polyray.models.language import LanguageModel, Shard

N_KEPT = 8_000
"""Tokens with sums, 25 kB each and layer: far more than caches hold, and few enough for a small machine."""


def measure(device: str, threads: int, n_layers: int, micro_batch: int, pairs: int) -> dict[str, float | int | str]:
    """Runs bare and mining forwards in turn and returns the figures to print."""
    torch.set_num_threads(threads)
    config = GPT2Config(n_layer=n_layers)
    context = config.n_positions
    torch.manual_seed(0)
    network = GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory(prefix="polyray-bench-") as folder:
        network.save_pretrained(folder)
        shard = Shard(LanguageModel(folder), range(n_layers), device=device)
    bare = network.transformer.to(device)
    # As rare words are rare: by Zipf's law, most tokens are of few kinds.
    generator = torch.Generator().manual_seed(0)
    tokens = (config.vocab_size ** torch.rand(micro_batch, context, generator=generator)).int() - 1
    everywhere = torch.ones(micro_batch, context, dtype=torch.bool)
    # A kept vocabulary as large as that of a corpus, though this batch sees little of it.
    counts = count_tokens(tokens, everywhere, config.vocab_size)
    counts[:N_KEPT] += 5
    kept = select(counts, 5)
    layers = range(n_layers)
    sums = TokenStatistics(kept, layers, shard.info.n_neurons, device)
    batch = next(batches(tokens, everywhere, everywhere, kept, micro_batch))
    x = batch.tokens.to(device)

    def bare_forward() -> Tensor:
        return bare(x).last_hidden_state

    def mining() -> Tensor:
        return shard(x, batch.mask, sums.reader(batch.rows), layers)

    with torch.inference_mode():
        bare_forward()
        mining()
        times = [in_turn((bare_forward, mining), pair, device) for pair in range(pairs)]
    ratio, lowest, highest = ratios(times, 1, 0)
    plain, mined = medians(times)
    return {
        "ratio_mine": ratio,
        "ratio_lowest": lowest,
        "ratio_highest": highest,
        "bare_tokens_per_s": round(tokens.numel() / plain),
        "mine_tokens_per_s": round(tokens.numel() / mined),
        "neurons": n_layers * shard.info.n_neurons,
        "kept_tokens": len(kept.ids),
        "pairs": pairs,
        "micro_batch": micro_batch,
        "context": context,
        "threads": threads,
        "device": device,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    result = measure(arguments.device, arguments.threads, arguments.layers, arguments.micro_batch, arguments.pairs)
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
