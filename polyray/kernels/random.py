"""Counter-based randomness: every random value is a function of what it is for.

Which question it answers: *which random number belongs to this neuron, restart and step?* Place in the flow: under
every kernel that draws. A value depends on (seed, stream, up to four counter words) and on nothing else, so it is
the same on every device, in every batch and in every order.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
"""

import hashlib
import math
from typing import TypeVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

# What a random value is for. A new use takes a new number; a number is never used twice.
TIES, POOL_IMAGE, POOL_NEURON, WINDOW_SAMPLE, WINDOW_SIGNS = 1, 2, 3, 4, 5
KMEANS_REAL = 8
KMEANS_DRAW = {"rotation": 9, "pool": 10, "one_concept": 11, "permute_dims": 46}
KMEANS_NULL = {"rotation": 12, "pool": 13, "one_concept": 14}
PERMUTE, DRAW_POOL, DRAW_CONCEPT, DRAW_ROTATION, DRAW_TEXT = 16, 17, 18, 19, 20
NULL_POOL, NULL_ROTATION, NULL_ROTATION_TEXT = 24, 26, 27
BOOTSTRAP, BOOTSTRAP_NEURONS = 32, 33
PLANT_SPLIT, PLANT_CLASSES, PLANT_NOISE = 40, 41, 42
DRAW_DIMS, PERMUTE_DIMS = 44, 45
TREND = 47
SWAP_NEURON, SWAP_IMAGE, SWAP_ROLE, SWAP_RANDOM, SWAP_PLACE, SWAP_ELSEWHERE = 50, 51, 52, 54, 55, 56
SWAP_UNFIRED, SWAP_NULL, SWAP_BOOTSTRAP, SWAP_NULL_LABELS = 57, 58, 59, 60
CLAMP_SAMPLE, CLAMP_CONTEXT, CLAMP_CONTROL, CLAMP_NEURON = 70, 71, 72, 73
PROXIMITY_ORDER, PROXIMITY_PRECURSORS, PROXIMITY_TOKENS, PROXIMITY_MEMBERS = 80, 81, 82, 83
PROXIMITY_BOOTSTRAP, PROXIMITY_DIRECTIONS, PROXIMITY_GROUPS = 84, 85, 86


def philox(counter: Int64[Tensor, "*n 4"], key: Int64[Tensor, "*k 2"]) -> Int64[Tensor, "*n 4"]:
    """Philox4x32-10.

    Args:
        counter: four 32-bit words as non-negative int64.
        key: two 32-bit words as non-negative int64; broadcast against the counter.

    Returns:
        Four random 32-bit words, each in [0, 2^32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    return torch.stack(torch.broadcast_tensors(*_rounds(c0, c1, c2, c3, k0, k1)), dim=-1)


_Key = TypeVar("_Key", int, Tensor)


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: _Key, k1: _Key) -> tuple[Tensor, ...]:
    """The ten rounds, on words apart."""
    for _ in range(10):
        # int64 products wrap, which keeps the low 64 bits exact: both halves are right.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _words(seed: int, stream: int, words: tuple[int | Tensor, ...]) -> Int64[Tensor, "*n 4"]:
    if len(words) > 4:
        raise ValueError(f"at most four counter words, got {len(words)}")
    device = next((w.device for w in words if isinstance(w, Tensor)), torch.device("cpu"))
    padded = [*words, *[0] * (4 - len(words))]
    tensors = torch.broadcast_tensors(*(torch.as_tensor(w, dtype=torch.int64, device=device) for w in padded))
    c0, c1, c2, c3 = (t & _MASK for t in tensors)
    return torch.stack(_rounds(c0, c1, c2, c3, seed & _MASK, stream & _MASK), dim=-1)


def bits(seed: int, stream: int, *words: int | Tensor) -> Int64[Tensor, "*n"]:
    """32 random bits for each (broadcast) combination of counter words, in [0, 2^32)."""
    return _words(seed, stream, words)[..., 0]


def uniform(seed: int, stream: int, *words: int | Tensor) -> Float64[Tensor, "*n"]:
    """Uniform on the open interval (0, 1) with 52 random bits, one for each combination of counter words."""
    w = _words(seed, stream, words)
    return (((w[..., 0] << 20) | (w[..., 1] >> 12)).double() + 0.5) * 2.0**-52


def uniform4(seed: int, stream: int, *words: int | Tensor) -> Float64[Tensor, "*n 4"]:
    """Four uniforms on the open interval (0, 1) with 32 random bits each, for each combination of counter words."""
    return (_words(seed, stream, words).double() + 0.5) * 2.0**-32


def normal(seed: int, stream: int, *words: int | Tensor) -> Float64[Tensor, "*n"]:
    """Standard normal by Box-Muller, one for each combination of counter words."""
    w = _words(seed, stream, words)
    radius = torch.sqrt(-2.0 * torch.log((w[..., 0].double() + 0.5) * 2.0**-32))
    return radius * torch.cos((2.0 * math.pi * 2.0**-32) * w[..., 1].double())


def directions(seed: int, stream: int, items: Int64[Tensor, " g"], n: int, d: int, word: int = 0) -> Tensor:
    """Haar-random unit vectors.

    Args:
        items: one counter word for each set of vectors.
        n: vectors in a set.
        d: dimension.
        word: a further counter word.

    Returns:
        float32 [g, n, d] with unit rows; every Philox call serves four coordinates.
    """
    quads = torch.arange(-(-d // 4), device=items.device)
    rows = torch.arange(n, device=items.device)
    w = _words(seed, stream, (items[:, None, None], rows[None, :, None], quads[None, None, :], word)).double()
    radius = torch.sqrt(-2.0 * torch.log((w[..., :2] + 0.5) * 2.0**-32))
    angle = (2.0 * math.pi * 2.0**-32) * w[..., 2:]
    x = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return torch.nn.functional.normalize(x.flatten(2)[..., :d], dim=-1).float()


def permutations(seed: int, stream: int, n: int, B: int, *words: int | Tensor) -> Int64[Tensor, "B n"]:
    """B random permutations of 0 … n−1, drawn by sorting random bits (ties, 1 in 2^32, keep their order)."""
    b = torch.arange(B)[:, None]
    return torch.argsort(bits(seed, stream, b, torch.arange(n)[None, :], *words), dim=1, stable=True)


def _mix(x: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """A bijection of [0, 2^32) with full avalanche (MurmurHash3's 32-bit finaliser)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def tie_hash(
    seed: int, layer: int, neuron: Int64[Tensor, "..."], example: Int64[Tensor, "..."]
) -> Int64[Tensor, "..."]:
    """Hash of (seed, layer, neuron, example) by which ties are broken, in [0, 2^32).

    For fixed seed, layer and neuron it is a bijection of the example, so two examples never tie again. Neuron and
    example broadcast against each other.
    """
    key = _words(seed, TIES, (layer, neuron))
    return _mix((_mix(example ^ key[..., 0]) + key[..., 1]) & _MASK)


def layer_word(layer: str) -> int:
    """A 32-bit counter word for a layer's name, so that sweeping other layers beside it changes nothing."""
    return int.from_bytes(hashlib.blake2b(layer.encode(), digest_size=4).digest(), "little")
