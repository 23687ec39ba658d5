"""What mining costs beside the forward that it listens to.

`python tests/benchmarks/bench_mine.py --json` prints one JSON object. ratio_mine is the median, over pairs, of the time
to get the responses and positions of all 22,720 census neurons of ResNet-50 from a batch, divided by the time of the
bare forward on the same batch. The two alternate, so that a slow spell of the machine hits both; with one thread on the
CPU what counts is processor time, which other processes' load distorts less than it does the clock.
"""

import argparse
import json

import torch
from timing import in_turn, medians, ratios
from torch import Tensor

from polyray.config import NumericsConfig, SubjectConfig
from polyray.models.vision import load_subject


def measure(device: str, threads: int, micro_batch: int, input_px: int, pairs: int) -> dict[str, float | int | str]:
    """Runs bare and mining forwards in turn and returns the figures to print."""
    torch.set_num_threads(threads)
    config = SubjectConfig(name="torchvision:resnet50", weights="none", input_px=input_px, micro_batch=micro_batch)
    subject = load_subject(config, NumericsConfig(device="cuda" if device == "cuda" else "cpu", threads=threads))
    layers = subject.readouts.layers("census")
    names = [info.name for info in layers]
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (micro_batch, input_px, input_px, 3), dtype=torch.uint8, generator=generator)
    x = subject.prepare(views)

    def bare_forward() -> Tensor:
        return subject.module(x)

    def mining() -> dict[str, tuple[Tensor, Tensor]]:
        return subject.readouts.run(x, names)

    with torch.no_grad():
        bare_forward()
        mining()
        times = [in_turn((bare_forward, mining), pair, device) for pair in range(pairs)]
    bare, mine = medians(times)
    ratio, lowest, highest = ratios(times, 1, 0)
    return {
        "ratio_mine": ratio,
        "ratio_lowest": lowest,
        "ratio_highest": highest,
        "bare_ms_per_image": round(1e3 * bare / micro_batch, 3),
        "mine_ms_per_image": round(1e3 * mine / micro_batch, 3),
        "neurons": sum(info.width for info in layers),
        "pairs": pairs,
        "micro_batch": micro_batch,
        "input_px": input_px,
        "threads": threads,
        "device": device,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--input-px", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    result = measure(arguments.device, arguments.threads, arguments.micro_batch, arguments.input_px, arguments.pairs)
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
