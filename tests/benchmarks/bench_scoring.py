"""What scoring costs beside scikit-learn.

`python tests/benchmarks/bench_scoring.py --json` prints one JSON object. ratio_draw is the median, over repetitions, of
scikit-learn's time to cluster a set of 100 unit vectors of dimension 512 for every k from 2 to 6 (KMeans with n_init 4,
and silhouette_score) divided by ours, Gram matrices included. The two alternate, so that a slow spell of the machine
hits both; both may use all threads. With one thread on the CPU what counts is processor time, which other processes'
load distorts less than it does the clock. silhouette_difference is our mean kept silhouette less scikit-learn's.

ratio_layer is a whole calibrated layer through the project's own functions, against the pipeline that would give every
neuron draws of its own: B rotation, B pool and B one_concept draws, each clustered by scikit-learn, and B label
permutations, each with normalized_mutual_info_score. That pipeline is extrapolated from a few draws of each kind, and
names cost it nothing; it would take days.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score, silhouette_score
from threadpoolctl import threadpool_limits
from timing import medians, ratios, seconds

from polyray import columns
from polyray.config import Science, parse_config
from polyray.kernels import cluster as kmeans
from polyray.kernels import random
from polyray.psi import calibrate, cluster, draw, space
from polyray.psi.mine import Images

K, D, N_CONCEPTS, N_PATCHES, N_PROMPTS, N_CLASSES = 100, 512, 60, 20_000, 1602, 200
K_RANGE, N_INIT = (2, 6), 4


def unit(x: NDArray[np.floating]) -> NDArray[np.float32]:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class World:
    """Vectors around concepts: noise as long as the concept, its spectrum falling as in image embeddings."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        spectrum = unit(1 / np.sqrt(np.arange(1.0, D + 1)))
        self.concepts = unit(self.rng.standard_normal((N_CONCEPTS, D)) * spectrum)
        self.concept_of = self.rng.integers(0, N_CONCEPTS, N_PATCHES)
        noise = self.rng.uniform(0.6, 1.4, (N_PATCHES, 1)) * self.rng.standard_normal((N_PATCHES, D)) * spectrum
        self.patches = unit(self.concepts[self.concept_of] + noise)
        stray = self.rng.random(N_PATCHES) < 0.3
        self.label = np.where(stray, self.rng.integers(0, N_CLASSES, N_PATCHES), 3 * self.concept_of)

    def neurons(self, count: int) -> NDArray[np.int64]:
        """Rows of the K patches of neurons that respond to one to four concepts, [count, K]."""
        rows = np.empty((count, K), dtype=np.int64)
        for i in range(count):
            liked = self.rng.choice(N_CONCEPTS, 1 + i % 4, replace=False)
            rows[i] = self.rng.choice(np.flatnonzero(np.isin(self.concept_of, liked)), K, replace=False)
        return rows


def scikit_learn(vectors: NDArray[np.float32]) -> float:
    """The kept silhouette of one set."""
    found = [KMeans(k, n_init=N_INIT, random_state=0).fit_predict(vectors) for k in range(K_RANGE[0], K_RANGE[1] + 1)]
    return float(max(silhouette_score(vectors, labels) for labels in found))


def measure_draws(world: World, n_sets: int, repeats: int, device: str) -> dict[str, Any]:
    """scikit-learn on a few sets and ours on all of them, in turn."""
    x = world.patches[world.neurons(n_sets)]
    vectors, item = torch.from_numpy(x).to(device), torch.arange(n_sets, device=device)
    theirs: list[float] = []

    def ours() -> kmeans.Clustering:
        return kmeans.cluster(vectors, K_RANGE, N_INIT, 50, 0, item)

    S = ours().S.cpu().numpy()
    scikit_learn(x[0])
    times: list[tuple[float, float]] = []
    for part in np.array_split(np.arange(n_sets), repeats):
        # The median of three, since one run takes so little that a moment's load would be most of it.
        mine = statistics.median(seconds(ours, device) for _ in range(3)) / n_sets
        reference = seconds(lambda part=part: theirs.extend(scikit_learn(x[i]) for i in part)) / len(part)
        times.append((mine, reference))
    mine, reference = medians(times)
    ratio, lowest, highest = ratios(times, 1, 0, digits=1)
    return {
        "ratio_draw": ratio,
        "ratio_draw_lowest": lowest,
        "ratio_draw_highest": highest,
        "us_per_draw": round(1e6 * mine, 1),
        "sklearn_us_per_draw": round(1e6 * reference, 1),
        "silhouette_difference": round(float(np.mean(S - np.array(theirs))), 6),
        "sets": n_sets,
        "repeats": repeats,
    }


def settings(B: int, n_pool: int) -> Science:
    return parse_config(
        {
            "science": {
                "subject": {"name": "torchvision:resnet50", "weights": "none"},
                "probe": {"kind": "generated"},
                "encoder": {"kind": "standin"},
                "mine": {"K": K, "K_keep": K},
                "embed": {"n_pool": n_pool},
                "cluster": {"k_range": list(K_RANGE), "n_init": N_INIT},
                "calibrate": {"B": B},
            }
        }
    ).science


def layer_space(world: World, n_pool: int) -> space.Space:
    return space.Space(
        ids=np.arange(N_PATCHES),
        geometry=world.patches.astype(np.float16),
        text=None,
        good=np.ones(N_PATCHES, dtype=bool),
        center=np.zeros(D, dtype=np.float32),
        scale=np.ones(D, dtype=np.float32),
        pool=np.arange(n_pool),
        pool_label=world.label[:n_pool],
        prompts=[f"prompt {i}" for i in range(N_PROMPTS)],
        vocabulary=torch.from_numpy(unit(world.rng.standard_normal((N_PROMPTS, D)))),
    )


def layer_steps(world: World, n_neurons: int, science: Science, n_pool: int) -> dict[str, Callable[[], object]]:
    """The stages of one layer, in order; each leaves its rows in the tables that the last one reads."""
    data = layer_space(world, n_pool)
    at = world.neurons(n_neurons)
    images = Images(np.arange(N_PATCHES), world.label, [f"class {i}" for i in range(N_CLASSES)])
    examples = [cluster.Examples(i, np.arange(K), at[i], world.label[at[i]], K) for i in range(n_neurons)]
    word, B = random.layer_word("layer"), science.calibrate.B
    null_of = partial(draw.null_neurons, layer=word, science=science, data=data)
    scores: list[pa.Table] = []
    nulls: list[pa.Table] = []

    def real() -> None:
        scores.append(cluster.cluster_neurons(examples, "layer", science, images, data).scores)

    def null(kind: str) -> None:
        scores.append(null_of(kind, np.arange(n_neurons), K, world.label[at]))

    def calibrated() -> None:
        draws = calibrate.nulls(columns.concat("nulls", nulls))
        calibrate.calibrated(columns.concat("scores", scores), draws, science)

    steps: dict[str, Callable[[], object]] = {"neurons": real}
    for kind in ("pool", "one_concept"):
        steps[f"{kind}_draws"] = lambda kind=kind: nulls.append(draw.draw(kind, K, range(B), word, science, data))
    steps["rotation_draws"] = lambda: nulls.append(draw.rotation_draws(K, range(B), science, D))
    steps["shuffle_text"] = lambda: nulls.append(draw.shuffle_text(science, data.similarity))
    for kind in ("rotation", "pool", "one_concept"):
        steps[f"{kind}_null_neurons"] = lambda kind=kind: null(kind)
    steps["calibrate"] = calibrated
    return steps


def measure_layer(world: World, n_neurons: int, B: int, n_sampled: int) -> dict[str, Any]:
    n_pool = 5000
    parts = {name: seconds(step) for name, step in layer_steps(world, n_neurons, settings(B, n_pool), n_pool).items()}
    ours = sum(parts.values())

    rng = np.random.default_rng(1)
    neurons = world.neurons(n_sampled)
    pool = world.patches[:n_pool]
    near = [np.argsort(-(pool @ pool[i]))[:K] for i in rng.integers(0, n_pool, n_sampled)]
    samples = {
        "neuron": list(world.patches[neurons]),
        "rotation": list(unit(rng.standard_normal((n_sampled, K, D)))),
        "pool": [pool[rng.choice(n_pool, K, replace=False)] for _ in range(n_sampled)],
        "one_concept": [pool[rows] for rows in near],
    }
    sets = {
        kind: statistics.median(seconds(partial(scikit_learn, x)) for x in vectors) for kind, vectors in samples.items()
    }
    clusters, label = rng.integers(0, 3, K), world.label[neurons[0]]
    nmi = statistics.median(
        seconds(partial(normalized_mutual_info_score, rng.permutation(label), clusters)) for _ in range(50)
    )
    theirs = n_neurons * (sets["neuron"] + B * (sets["rotation"] + sets["pool"] + sets["one_concept"] + nmi))
    return {
        "ratio_layer": round(theirs / ours, 1),
        "layer_seconds": round(ours, 2),
        "layer_sklearn_seconds": round(theirs),
        "layer_parts_seconds": {name: round(value, 2) for name, value in parts.items()},
        "neurons": n_neurons,
        "B": B,
        "n_pool": n_pool,
        "prompts": N_PROMPTS,
    }


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "device_name": name,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sklearn": sklearn.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of ratio_draw; the layer is on the CPU"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sets", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--neurons", type=int, default=2048, help="of the layer, which is scored on the CPU; 0: none")
    parser.add_argument("--B", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world = World(seed=0)
    with torch.no_grad(), threadpool_limits(arguments.threads):
        result = measure_draws(world, arguments.sets, arguments.repeats, arguments.device)
        if arguments.neurons:
            result |= measure_layer(world, arguments.neurons, arguments.B, n_sampled=5)
    result |= machine(arguments.device)
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
