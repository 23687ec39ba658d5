"""What patch swaps cost beside the forward that they are shown to.

`python tests/benchmarks/bench_swap.py --json` prints one JSON object. ratio_swap is the median, over pairs, of the
throughput of a unit of swap (images read and decoded, composed, shown, thumbnails and rows made) as a share of the
throughput of the bare forward over the same number of images, in batches of the same size, that ends at the same layer
(`ratio_whole`: of the whole network's forward). Bare and swap alternate, so that a slow spell of the machine hits both;
with one thread on the CPU what counts is processor time, which other processes' load distorts less than it does the
clock. Every repetition swaps other neurons, whose images nobody has decoded yet.
"""

import argparse
import json
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import in_turn, medians, ratios

from polyray.config import Science, parse_config
from polyray.models.vision import load_subject
from polyray.probes.images import open_probe
from polyray.psi import hosts, mine, swap

N_NEURONS, K, N_HOSTS = 4, 100, 20


def settings(device: str, threads: int, input_px: int, micro_batch: int) -> Science:
    raw: dict[str, Any] = {
        "subject": {"name": "efficientnet_lite0", "input_px": input_px, "micro_batch": micro_batch},
        "probe": {"kind": "generated", "n_per_class": 40},
        "encoder": {"kind": "standin"},
        "swap": {"n_hosts": N_HOSTS},
        "numerics": {"device": device, "threads": threads},
    }
    gpu = {"subject": {"num_gpus": 1}, "encoder": {"num_gpus": 1}} if device == "cuda" else {}
    return parse_config({"science": raw, "execution": gpu}).science


def measure(science: Science, layer: str, pairs: int) -> dict[str, float | int | str]:
    """Runs bare forwards and swaps in turn and returns the figures to print."""
    device, threads = science.numerics.device, science.numerics.threads
    torch.set_num_threads(threads)
    subject = load_subject(science.subject, science.numerics)
    (info,) = subject.readouts.layers([layer])
    probe = open_probe(science.probe)
    rows, _ = mine.index(probe, range(200))
    fill = swap.fill_colour(rows, mine.distinct_images(rows))
    geometry = ("layout", "grid_w", "grid_h", "center_x_px", "center_y_px", "stride_px")
    of_layer = {"layer": layer, "swap_side_px": 80} | {c: getattr(info, c) for c in geometry}
    rng = np.random.Generator(np.random.Philox(0))
    n_images = N_NEURONS * N_HOSTS * 7
    n_batches = -(-n_images // subject.micro_batch)
    px = subject.input_px
    x = subject.prepare(rng.integers(0, 256, (subject.micro_batch, px, px, 3), dtype=np.uint8))
    nobody = torch.zeros(subject.micro_batch, dtype=torch.int64)

    def neurons(first: int) -> list[swap.Neuron]:
        n_positions = info.grid_h * info.grid_w
        found = []
        for n in range(first, first + N_NEURONS):
            image = rng.permutation(len(probe))[: K + 256]
            position = rng.integers(0, n_positions, len(image))
            peaks = hosts.Peaks(np.sort(image[K:]), position[K:])
            examples = hosts.Examples(image[:K], position[:K], np.arange(K) % 3, rng.random(K))
            found.append(swap.Neuron(n % info.width, examples, peaks))
        return found

    def whole() -> None:
        for _ in range(n_batches):
            subject.module(x)

    def ended() -> None:
        for _ in range(n_batches):
            subject.readouts.run_at(x, layer, nobody, nobody)

    def swaps(chosen: list[swap.Neuron]) -> None:
        found, failed = swap.swap(subject, swap.Views(probe, science), science, of_layer, chosen, "real", fill)
        if len(found) != N_NEURONS * N_HOSTS * 8 or failed:
            raise RuntimeError(f"{len(found)} rows and {len(failed)} failures: not what was to be measured")

    times: list[tuple[float, ...]] = []
    with torch.no_grad():
        ended()
        for pair in range(pairs):
            times.append(in_turn((whole, ended, partial(swaps, neurons(N_NEURONS * pair))), pair, device))
    ratio, lowest, highest = ratios(times, 1, 2)
    median = [s / n_images * 1e3 for s in medians(times)]
    return {
        "ratio_swap": ratio,
        "ratio_lowest": lowest,
        "ratio_highest": highest,
        "ratio_whole": ratios(times, 0, 2)[0],
        "whole_ms_per_image": round(median[0], 3),
        "bare_ms_per_image": round(median[1], 3),
        "swap_ms_per_image": round(median[2], 3),
        "layer": layer,
        "n_images": n_images,
        "pairs": pairs,
        "micro_batch": subject.micro_batch,
        "input_px": px,
        "threads": threads,
        "device": device,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layer", default="conv_head")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--input-px", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=5)
    a = parser.parse_args()
    result = measure(settings(a.device, a.threads, a.input_px, a.micro_batch), a.layer, a.pairs)
    print(json.dumps(result, indent=None if a.json else 2))


if __name__ == "__main__":
    main()
