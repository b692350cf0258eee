"""Independent implementation of the noise contract in NumPy, as a check of all the others."""

from __future__ import annotations

import numpy as np

U32, U64 = np.uint32, np.uint64


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Computes Philox4x32-10 of counters (..., 4) and keys (..., 2) of uint32; words (..., 4)."""
    c = [counter[..., i].astype(U32) for i in range(4)]
    k = [key[..., i].astype(U32) for i in range(2)]
    with np.errstate(over="ignore"):
        for _ in range(10):
            product0 = c[0].astype(U64) * U64(0xD2511F53)
            product1 = c[2].astype(U64) * U64(0xCD9E8D57)
            high0, low0 = (product0 >> U64(32)).astype(U32), product0.astype(U32)
            high1, low1 = (product1 >> U64(32)).astype(U32), product1.astype(U32)
            c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
            k = [k[0] + U32(0x9E3779B9), k[1] + U32(0xBB67AE85)]
    return np.stack(c, axis=-1)


def words(seed: int, samples: list[int], stream: int, step: int, numel: int) -> np.ndarray:
    """Returns words (B, ceil(numel / 4), 4) of uint32."""
    quads = (numel + 3) // 4
    counter = np.zeros((len(samples), quads, 4), U32)
    counter[..., 0] = np.arange(quads)
    counter[..., 1] = step
    counter[..., 2] = stream
    key = np.zeros((len(samples), quads, 2), U32)
    key[..., 0] = seed
    key[..., 1] = np.array(samples, U32)[:, None]
    return philox4x32(counter, key)


def uniform(seed: int, samples: list[int], stream: int, step: int, numel: int) -> np.ndarray:
    """Returns uniforms (B, numel), float32."""
    w = words(seed, samples, stream, step, numel).reshape(len(samples), -1)[:, :numel]
    return (w >> U32(8)).astype(np.float32) * np.float32(2.0**-24)


def box_muller(w: np.ndarray) -> np.ndarray:
    """Computes normals in float64, without rounding, from words (..., 2k).

    Pairs on the last axis.
    """
    u1 = ((w[..., 0::2] >> U32(8)).astype(np.float64) + 1) * 2.0**-24
    turns = (w[..., 1::2] >> U32(8)).astype(np.float64) * 2.0**-24
    radius = np.sqrt(-2 * np.log(u1))
    # Reduced to an eighth of a turn about the nearest quarter, so that zeros are exact.
    quarter = np.floor(4 * turns + 0.5)
    angle = (4 * turns - quarter) * (np.pi / 2)
    rotation = np.exp(1j * angle) * np.array([1, 1j, -1, -1j])[quarter.astype(int) % 4]
    z = np.stack((radius * rotation.real, radius * rotation.imag), axis=-1)
    return z.reshape(*w.shape)


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Counts float32 values between a and b, elementwise; +0 and -0 are equal."""

    def ordered(x: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(x, np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return np.abs(ordered(a) - ordered(b))
