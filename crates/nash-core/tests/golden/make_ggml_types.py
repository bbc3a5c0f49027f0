#!/usr/bin/env python3
"""Writes ggml_types.gguf: a few blocks of every ggml type, and their values according to PyPI `gguf`.

For each type there is a tensor `TYPE` (random codes, sane scales) and a tensor `TYPE.f32` (what
`gguf.quants.dequantize`, the reference implementation, makes of it). The file is written by the reference writer, so
it is a test of the reader as well.

    pip install gguf numpy && python make_ggml_types.py
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T

SEED = 20261123
# Byte offsets of binary16 scales in a block.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q8_1: [0, 2],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.Q8_K: [],
    T.IQ1_S: [0], T.IQ1_M: [], T.IQ2_XXS: [0], T.IQ2_XS: [0], T.IQ2_S: [0], T.IQ3_XXS: [0], T.IQ3_S: [0],
    T.IQ4_NL: [0], T.IQ4_XS: [0], T.TQ1_0: [52], T.TQ2_0: [64], T.MXFP4: [], T.NVFP4: [],
    T.F16: [0], T.BF16: [], T.F64: [],
}
# The package has an outdated size: ggml's block is two binary16 and 32 codes.
GGML_QUANT_SIZES[T.Q8_1] = (32, 36)


def scales(rng, count):
    """Scales of both signs over many magnitudes; the last is a subnormal number, or zero."""
    d = (rng.choice([-1.0, 1.0], count) * 2.0 ** rng.uniform(-12, 2, count)).astype(np.float16)
    d[-1] = rng.choice(np.array([0, 3e-7], dtype=np.float16))
    return d


def blocks(rng, kind, count):
    """`count` random blocks, `uint8 [count, bytes]`."""
    length, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for offset in HALVES[kind]:
        raw[:, offset:offset + 2] = scales(rng, count).view(np.uint8).reshape(count, 2)
    if kind == T.Q8_K:
        raw[:, :4] = rng.normal(0, 0.1, count).astype("<f4").view(np.uint8).reshape(count, 4)
    if kind == T.IQ1_M:
        # The four nibbles of the scale are the upper nibbles of four words.
        bits = scales(rng, count).view("<u2")
        words = raw[:, 48:].copy().view("<u2") & 0x0FFF
        for i in range(4):
            words[:, i] |= (bits >> (4 * i) & 15) << 12
        raw[:, 48:] = words.view(np.uint8)
    if kind == T.MXFP4:
        raw[:, 0] = np.resize([0, 1, 2, 127, 119, 130], count)
    if kind == T.NVFP4:
        raw[0, :4] = [0x00, 0x7F, 0xFF, 0x05]
    if kind == T.BF16:
        raw = rng.normal(0, 1, count).astype("<f4").view("<u2").reshape(-1, 2)[:, 1:].copy().view(np.uint8)
    if kind == T.F64:
        raw = rng.normal(0, 1, count).astype("<f8").view(np.uint8).reshape(count, 8)
    return raw


def values(kind, raw):
    """The values of blocks, `f32 [count·length]`."""
    with np.errstate(over="ignore"):
        if kind == T.F64:
            return raw.reshape(-1).view("<f8").astype(np.float32)
        # These two are never stored and not in the package: scale times code.
        if kind == T.Q8_1:
            return (raw[:, :2].copy().view("<f2").astype(np.float32) * raw[:, 4:].view(np.int8)).reshape(-1)
        if kind == T.Q8_K:
            return (raw[:, :4].copy().view("<f4") * raw[:, 4:260].view(np.int8).astype(np.float32)).reshape(-1)
        return gguf.quants.dequantize(raw.reshape(-1), kind).reshape(-1)


def main():
    rng = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(Path(__file__).with_name("ggml_types.gguf"), "test")
    writer.add_uint32("test.seed", SEED)
    writer.add_array("test.strings", ["", "a", "naïve ☃"])
    for kind in HALVES:
        length = GGML_QUANT_SIZES[kind][0]
        count = {1: 64, 32: 6, 64: 4}.get(length, 3)
        raw = blocks(rng, kind, count)
        expected = values(kind, raw)
        assert np.isfinite(expected).all(), kind
        rows = 1 if count == 3 else 2
        writer.add_tensor(kind.name, raw.reshape(rows, -1), raw_dtype=kind)
        writer.add_tensor(kind.name + ".f32", expected.reshape(rows, -1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
