"""The rounding of the released model: FP8 and FP4 blocks with power-of-two scales, and the bytes they are stored in.

    amax  = max |x| over a block, not below a floor
    scale = 2 ^ ceil(log2(amax / limit))          one E8M0 byte b, meaning 2 ^ (b - 127)
    code  = nearest representable value of x / scale, ties to the even mantissa

| what                          | values | block       | limit | floor    |
| KV entry without its rotary   | E4M3   | 64          | 448   | 1e-4     |
| activation of an FP8 linear   | E4M3   | 128         | 448   | 1e-4     |
| index query and key           | E2M1   | 32          | 6     | 6*2^-126 |
| FP8 weight                    | E4M3   | 128x128     | 448   | none     |
| FP4 weight                    | E2M1   | 32 inputs   | 6     | none     |

E4M3 is `torch.float8_e4m3fn`; E2M1 is the eight magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 with a sign, two codes per byte,
low nibble first. Because scales are powers of two, dividing by them and multiplying back is exact: all error is in
the code. A block that holds an infinity or a NaN decodes to NaN throughout, never to a plausible number.

`*_roundtrip` is what the model computes with, `*_quantize` / `*_dequantize` and `pack_*` / `unpack_*` what it stores;
the two agree to the bit (tests/test_quant.py), so a cache kept in bytes gives the same logits as one kept in floats.
Source: released inference code (kernel file); technical report arXiv 2606.19348, sections on FP4 training and KV
storage.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.errors import ShapeError

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126

KV_BLOCK = 64
INDEX_BLOCK = 32
WEIGHT_TILE = 128
FP4_WEIGHT_BLOCK = 32

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of E2M1 code 0..7; bit 3 of a code is the sign."""

_E8M0_BIAS = 127
_E8M0_NAN = 255


# ---- scales -------------------------------------------------------------------------------------------------------


def ceil_pow2_scale(amax: Tensor, limit: float) -> Tensor:
    """Smallest power of two not below `amax * float32(1 / limit)`, as its E8M0 byte.

    The product is rounded in float32, as the released kernel does, and its logarithm is then read exactly from the
    float's bits. For the limits 448 and 6 the rounding never moves a product across a power of two, so this is the
    exact rule.

    Args:
        amax: positive block maxima, any float dtype.
        limit: largest magnitude of the code: 448 or 6.

    Returns:
        uint8, same shape; 255 (NaN) where `amax` is infinite or NaN.
    """
    reciprocal = torch.tensor(1.0 / limit, dtype=torch.float32, device=amax.device)
    bits = (amax.float() * reciprocal).view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0)
    # A NaN or infinite amax already carries exponent field 255; its mantissa must not wrap the byte to 0.
    return exponent.clamp(max=_E8M0_NAN).to(torch.uint8)


def e8m0_to_float(scale: Tensor) -> Tensor:
    """uint8 E8M0 bytes as float32: 2^(b-127), byte 255 as NaN. Exact, by placing the byte in a float's exponent."""
    exponent = scale.to(torch.int32)
    bits = exponent << 23
    bits = torch.where(exponent == 0, 0x00400000, bits)  # 2^-127 is a subnormal float32
    bits = torch.where(exponent == _E8M0_NAN, 0x7FC00000, bits)
    return bits.to(torch.int32).view(torch.float32)


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """[..., n] float32 as [..., blocks, block]; a short last block is filled up with zeros, which change no maximum."""
    if block < 1:
        raise ShapeError(f"block={block} must be at least 1")
    width = x.shape[-1]
    blocks = -(-width // block)
    if missing := blocks * block - width:
        x = F.pad(x, (0, missing))
    return x.float().reshape(*x.shape[:-1], blocks, block)


def _out_of_blocks(blocks: Tensor, width: int) -> Tensor:
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])[..., :width]


def _scaled(x: Tensor, block: int, limit: float, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x / scale clamped to +-limit in blocks, scale as float32 [..., blocks, 1], E8M0 bytes [..., blocks])."""
    blocks = _in_blocks(x, block)
    if blocks.shape[-2] == 0:
        empty = blocks.new_zeros(blocks.shape[:-1])
        return blocks, empty.unsqueeze(-1), empty.to(torch.uint8)
    # Only one tensor of x's size is allocated: on a CPU, fresh memory costs more here than the arithmetic.
    amax = torch.maximum(blocks.amax(dim=-1), -blocks.amin(dim=-1)).clamp(min=floor)
    scale = ceil_pow2_scale(amax, limit)
    factor = e8m0_to_float(scale).unsqueeze(-1)
    return (blocks / factor).clamp_(-limit, limit), factor, scale


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounded value. Backward: the gradient unchanged, as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    # x + (rounded - x).detach() would be shorter but is not the rounded value to the last bit.
    return _StraightThrough.apply(x, rounded) if torch.is_grad_enabled() and x.requires_grad else rounded


# ---- FP8 activations and KV entries -------------------------------------------------------------------------------


def fp8_quantize(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes of `x` with one scale per `block` channels of the last dimension.

    Args:
        x: [..., n], any float dtype. The last block is shorter when `block` does not divide n.
        block: channels per scale: 64 for KV entries, 128 for the input of an FP8 linear.

    Returns:
        (float8_e4m3fn [..., n], uint8 E8M0 [..., ceil(n / block)]).
    """
    scaled, _, scale = _scaled(x.detach(), block, E4M3_MAX, FP8_AMAX_FLOOR)
    return _out_of_blocks(scaled, x.shape[-1]).to(torch.float8_e4m3fn), scale


def fp8_dequantize(codes: Tensor, scale: Tensor, block: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Exact values of `fp8_quantize`'s codes: float8_e4m3fn [..., n] and uint8 [..., ceil(n / block)] -> [..., n]."""
    blocks = _in_blocks(codes.float(), block)
    return _out_of_blocks(blocks * e8m0_to_float(scale).unsqueeze(-1), codes.shape[-1]).to(dtype)


def fp8_roundtrip(x: Tensor, block: int) -> Tensor:
    """`x` as it reads after storage in E4M3 blocks: same shape and dtype. The gradient passes straight through."""
    scaled, factor, _ = _scaled(x.detach(), block, E4M3_MAX, FP8_AMAX_FLOOR)
    rounded = scaled.copy_(scaled.to(torch.float8_e4m3fn)).mul_(factor)
    return _straight_through(x, _out_of_blocks(rounded, x.shape[-1]).to(x.dtype))


# ---- FP4 index queries and keys -----------------------------------------------------------------------------------


def e2m1_encode(x: Tensor) -> Tensor:
    """Nearest E2M1 code (uint8, 0..15) of values already within +-6; ties go to the even code, NaN to 0 or 8.

    The comparisons spell the rounding out: a midpoint belongs to its upper neighbour exactly when that one is even.
    """
    m = x.abs()
    steps = (m > 0.25, m >= 0.75, m > 1.25, m >= 1.75, m > 2.5, m >= 3.5, m > 5.0)
    code = torch.zeros_like(m, dtype=torch.uint8)
    for step in steps:
        code = code + step.to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def e2m1_decode(codes: Tensor) -> Tensor:
    """float32 values of uint8 codes 0..15."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int64)]


def e2m1_round(x: Tensor) -> Tensor:
    """`e2m1_decode(e2m1_encode(x))` without codes: round to the grid's local step (0.5, 1 or 2), halves to even."""
    # 2^floor(log2|x|) is x without sign and mantissa bits; half of it is the step from 1 up, and 0.5 the step below.
    power = (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.mul_(0.5).clamp_(min=0.5)
    return (x / step).round_().mul_(step)


def _pack_nibbles(codes: Tensor) -> Tensor:
    if codes.shape[-1] % 2:
        raise ShapeError(f"FP4 needs an even number of channels to fill bytes, got {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def fp4_quantize(x: Tensor, block: int = INDEX_BLOCK) -> tuple[Tensor, Tensor]:
    """E2M1 codes of `x`, two per byte with the earlier channel in the low nibble, one scale per `block` channels.

    Args:
        x: [..., n] with n even, any float dtype. The last block is shorter when `block` does not divide n.

    Returns:
        (uint8 [..., n / 2], uint8 E8M0 [..., ceil(n / block)]).
    """
    scaled, _, scale = _scaled(x.detach(), block, E2M1_MAX, FP4_AMAX_FLOOR)
    return _pack_nibbles(e2m1_encode(_out_of_blocks(scaled, x.shape[-1]))), scale


def fp4_dequantize(
    packed: Tensor, scale: Tensor, block: int = INDEX_BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Exact values of `fp4_quantize`'s bytes: uint8 [..., n / 2] and uint8 [..., ceil(n / block)] -> [..., n]."""
    values = e2m1_decode(_unpack_nibbles(packed))
    blocks = _in_blocks(values, block) * e8m0_to_float(scale).unsqueeze(-1)
    return _out_of_blocks(blocks, values.shape[-1]).to(dtype)


def fp4_roundtrip(x: Tensor, block: int = INDEX_BLOCK) -> Tensor:
    """`x` as it reads after storage in E2M1 blocks: same shape and dtype. The gradient passes straight through."""
    scaled, factor, _ = _scaled(x.detach(), block, E2M1_MAX, FP4_AMAX_FLOOR)
    rounded = e2m1_round(scaled).mul_(factor)
    return _straight_through(x, _out_of_blocks(rounded, x.shape[-1]).to(x.dtype))


# ---- Hadamard rotation --------------------------------------------------------------------------------------------


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension by the orthonormal Hadamard matrix H / sqrt(n), in float32, rounded once to x.dtype.

    It spreads an outlier over all channels, so the FP4 rounding that follows loses less; being orthogonal it changes no
    dot product. Written as log2(n) butterflies: each output is the same tree of additions however many rows there are,
    where a matrix product may sum in another order for another batch size.

    Args:
        x: [..., n], n a power of two.

    Raises:
        ShapeError: n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ShapeError(f"the Hadamard rotation needs a power of two of channels, got {n}")
    y = x.float()
    half = 1
    while half < n:
        pairs = y.unflatten(-1, (n // (2 * half), 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return (y * n**-0.5).to(x.dtype)


def hadamard_reference(x: Tensor) -> Tensor:
    """`hadamard` as a product with Sylvester's matrix, H(2n) = [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    while matrix.shape[0] < x.shape[-1]:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return (x.float() @ matrix * x.shape[-1] ** -0.5).to(x.dtype)


# ---- cache entries in bytes ---------------------------------------------------------------------------------------


def kv_entry_nbytes(nope_dim: int, rope_dim: int) -> int:
    """Bytes of one stored KV entry; 584 for the released 448 + 64."""
    scales = -(-nope_dim // KV_BLOCK)
    return nope_dim + 2 * rope_dim + -(-scales // 8) * 8


def index_key_nbytes(dim: int) -> int:
    """Bytes of one stored index key; 68 for the released 128."""
    return dim // 2 + -(-dim // INDEX_BLOCK)


def pack_kv_entry(x: Tensor, rope_dim: int) -> Tensor:
    """A KV entry as the released cache stores it.

    Byte layout: the position-free channels as E4M3 (one byte each, blocks of 64), the `rope_dim` rotary channels as
    BF16 (little endian), one E8M0 scale per block, zeros up to a multiple of 8 scale bytes.

    Args:
        x: [..., nope + rope_dim], any float dtype, rotary channels last.

    Returns:
        uint8 [..., kv_entry_nbytes(nope, rope_dim)].
    """
    nope_dim = x.shape[-1] - rope_dim
    if rope_dim < 0 or nope_dim < 0:
        raise ShapeError(f"rope_dim={rope_dim} does not fit an entry of {x.shape[-1]} channels")
    codes, scale = fp8_quantize(x[..., :nope_dim], KV_BLOCK)
    rope = x[..., nope_dim:].detach().to(torch.bfloat16).contiguous().view(torch.uint8)
    padding = -scale.shape[-1] % 8
    return torch.cat((codes.view(torch.uint8), rope, F.pad(scale, (0, padding))), dim=-1)


def unpack_kv_entry(packed: Tensor, nope_dim: int, rope_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values in `pack_kv_entry`'s bytes: fp8_roundtrip of the first channels, BF16 rounding of the rotary ones.

    Raises:
        ShapeError: the last dimension is not `kv_entry_nbytes(nope_dim, rope_dim)`.
    """
    expected = kv_entry_nbytes(nope_dim, rope_dim)
    if packed.shape[-1] != expected:
        raise ShapeError(f"a KV entry of {nope_dim}+{rope_dim} channels has {expected} bytes, got {packed.shape[-1]}")
    scales = -(-nope_dim // KV_BLOCK)
    codes, rope, scale = packed.split((nope_dim, 2 * rope_dim, expected - nope_dim - 2 * rope_dim), dim=-1)
    nope = fp8_dequantize(codes.contiguous().view(torch.float8_e4m3fn), scale[..., :scales], KV_BLOCK, dtype)
    # clone, not contiguous: a single row is contiguous already but may start at an odd byte, which no BF16 view accepts
    rope = rope.clone(memory_format=torch.contiguous_format).flatten().view(torch.bfloat16).to(dtype)
    return torch.cat((nope, rope.view(*packed.shape[:-1], rope_dim)), dim=-1)


def pack_index_key(x: Tensor) -> Tensor:
    """An index key as the released cache stores it: E2M1 nibbles, then one E8M0 scale per 32 channels.

    Args:
        x: [..., n] with n even, any float dtype.

    Returns:
        uint8 [..., index_key_nbytes(n)].
    """
    return torch.cat(fp4_quantize(x, INDEX_BLOCK), dim=-1)


def unpack_index_key(packed: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values in `pack_index_key`'s bytes, [..., dim]: equal to fp4_roundtrip of what was packed."""
    if packed.shape[-1] != index_key_nbytes(dim):
        raise ShapeError(f"an index key of {dim} channels has {index_key_nbytes(dim)} bytes, got {packed.shape[-1]}")
    return fp4_dequantize(packed[..., : dim // 2], packed[..., dim // 2 :], INDEX_BLOCK, dtype)


# ---- weights ------------------------------------------------------------------------------------------------------


def _fitting_scale(amax: Tensor, limit: float) -> Tensor:
    """E8M0 byte of the smallest power of two s with amax / s <= limit; 1 for a block of zeros."""
    mantissa, exponent = torch.frexp(amax)
    limit_mantissa, limit_exponent = torch.frexp(torch.tensor(limit, dtype=torch.float32))
    power = exponent - int(limit_exponent) + (mantissa > float(limit_mantissa)).to(torch.int32)
    byte = (power + _E8M0_BIAS).clamp(0, _E8M0_NAN - 1)
    byte = torch.where(amax == 0, _E8M0_BIAS, byte)
    return torch.where(torch.isfinite(amax), byte, _E8M0_NAN).to(torch.uint8)


def _per_tile(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The scales of a tile grid as float32, one per element of a [rows, columns] weight."""
    factor = scale if scale.dtype == torch.float32 else e8m0_to_float(scale)
    factor = factor.repeat_interleave(WEIGHT_TILE, dim=-2)[..., :rows, :]
    return factor.repeat_interleave(WEIGHT_TILE, dim=-1)[..., :columns]


def fp8_weight_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as E4M3 with one scale per 128x128 tile, the smallest with which no element is clipped.

    Encoding values that came from such a checkpoint loses nothing: a smaller scale represents all a larger one did.

    Args:
        weight: [..., out, in], any float dtype.

    Returns:
        (float8_e4m3fn [..., out, in], uint8 E8M0 [..., ceil(out / 128), ceil(in / 128)]).
    """
    rows, columns = weight.shape[-2:]
    grid = -(-rows // WEIGHT_TILE), -(-columns // WEIGHT_TILE)
    padded = F.pad(weight.detach().float(), (0, grid[1] * WEIGHT_TILE - columns, 0, grid[0] * WEIGHT_TILE - rows))
    tiles = padded.unflatten(-1, (grid[1], WEIGHT_TILE)).unflatten(-3, (grid[0], WEIGHT_TILE))
    scale = _fitting_scale(tiles.abs().amax(dim=(-3, -1)), E4M3_MAX)
    return (weight.detach().float() / _per_tile(scale, rows, columns)).to(torch.float8_e4m3fn), scale


def fp8_weight_decode(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Exact values of an FP8 weight: float8_e4m3fn [..., out, in] and scales [..., ceil(out/128), ceil(in/128)].

    The scales are uint8 E8M0 bytes, or float32 factors as V3.2 stores them.

    Raises:
        ShapeError: the scale grid does not cover the weight.
    """
    rows, columns = codes.shape[-2:]
    grid = (*codes.shape[:-2], -(-rows // WEIGHT_TILE), -(-columns // WEIGHT_TILE))
    if tuple(scale.shape) != grid:
        raise ShapeError(f"an FP8 weight {tuple(codes.shape)} needs scales {grid}, got {tuple(scale.shape)}")
    if codes.device.type == "cpu":  # torch converts one by one: a look-up takes a quarter of the time
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = table.index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)
    else:
        values = codes.float()
    if rows % WEIGHT_TILE == 0 and columns % WEIGHT_TILE == 0:
        factor = scale if scale.dtype == torch.float32 else e8m0_to_float(scale)
        tiles = values.view(*scale.shape[:-1], WEIGHT_TILE, scale.shape[-1], WEIGHT_TILE)
        tiles.mul_(factor[..., :, None, :, None])
        return values.to(dtype)
    return values.mul_(_per_tile(scale, rows, columns)).to(dtype)


def fp4_weight_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as E2M1 with one scale per row and 32 inputs, the smallest with which no element is clipped.

    Encoding values that came from such a checkpoint loses nothing.

    Args:
        weight: [..., out, in] with `in` even, any float dtype.

    Returns:
        (int8 [..., out, in / 2], low nibble first, uint8 E8M0 [..., out, ceil(in / 32)]).
    """
    blocks = _in_blocks(weight.detach(), FP4_WEIGHT_BLOCK)
    scale = _fitting_scale(blocks.abs().amax(dim=-1), E2M1_MAX)
    codes = e2m1_encode(_out_of_blocks(blocks / e8m0_to_float(scale).unsqueeze(-1), weight.shape[-1]))
    return _pack_nibbles(codes).view(torch.int8), scale


def fp4_weight_decode(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Exact values of an FP4 weight: int8 or uint8 [..., out, in / 2] and uint8 [..., out, ceil(in / 32)].

    Raises:
        ShapeError: the scales do not cover the weight.
    """
    expected = (*packed.shape[:-1], -(-2 * packed.shape[-1] // FP4_WEIGHT_BLOCK))
    if tuple(scale.shape) != expected:
        raise ShapeError(
            f"an FP4 weight packed as {tuple(packed.shape)} needs scales {expected}, got {tuple(scale.shape)}"
        )
    packed, width = packed.view(torch.uint8), 2 * packed.shape[-1]
    if packed.device.type != "cpu" or width % FP4_WEIGHT_BLOCK:
        return fp4_dequantize(packed, scale, FP4_WEIGHT_BLOCK, dtype)
    # Both values of a byte by one look-up of eight bytes: a quarter of the time.
    pairs = e2m1_decode(_unpack_nibbles(torch.arange(256, dtype=torch.uint8))).view(torch.int64)
    values = pairs.index_select(0, packed.reshape(-1).int()).view(torch.float32).view(*scale.shape, FP4_WEIGHT_BLOCK)
    factors = e8m0_to_float(torch.arange(256, dtype=torch.uint8)).index_select(0, scale.reshape(-1).int())
    return values.mul_(factors.view(*scale.shape, 1)).view(*packed.shape[:-1], width).to(dtype)
