"""Rounding to FP8 and FP4: literals worked out by hand, then the properties storage relies on."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from longreach.errors import ShapeError
from longreach.ops import quant

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FLOATS = [torch.float32, torch.bfloat16]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amax", "limit", "byte"),
    [
        (448.0, 448.0, 127),  # ratio 1 = 2^0
        (449.0, 448.0, 128),
        (447.0, 448.0, 127),
        (224.0, 448.0, 126),
        (225.0, 448.0, 127),
        (1e-4, 448.0, 105),  # 1e-4 / 448 = 2^-22.09
        (6.0, 6.0, 127),
        (6.5, 6.0, 128),
        (3.0, 6.0, 126),
        (6 * 2.0**-126, 6.0, 1),  # the FP4 floor is the smallest normal scale
        (math.inf, 448.0, 255),
        (math.nan, 448.0, 255),
    ],
)
def test_a_scale_is_the_smallest_power_of_two_that_fits_amax_under_the_limit(amax, limit, byte):
    assert quant.ceil_pow2_scale(torch.tensor([amax]), limit).item() == byte


@pytest.mark.parametrize("limit", [448.0, 6.0])
def test_a_scale_is_exact_on_both_sides_of_every_power_of_two(limit):
    edges = torch.tensor([limit * 2.0**k for k in range(-100, 100)])
    for amax in (torch.nextafter(edges, torch.zeros(1)), edges, torch.nextafter(edges, torch.full((1,), math.inf))):
        expected = []
        for value in amax.tolist():
            mantissa, exponent = math.frexp(Fraction(value) / Fraction(limit))  # a double holds this to 2^-53
            expected.append(127 + exponent - (mantissa == 0.5))
        assert quant.ceil_pow2_scale(amax, limit).tolist() == expected


def test_e8m0_bytes_are_powers_of_two_and_255_is_nan():
    values = quant.e8m0_to_float(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert values[255].isnan()
    reference = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    torch.testing.assert_close(values, reference, rtol=0, atol=0, equal_nan=True)


# ---- E4M3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (0.3, 0.3125),  # 1.2 * 2^-2: 9.6 eighths, nearest 10
        (17.0, 16.0),  # 8.5 eighths of 16: tie, 8 is even
        (19.0, 20.0),  # 9.5 eighths: tie, 10 is even
        (18.9, 18.0),
        (-19.0, -20.0),
        (440.0, 448.0),  # 13.75 eighths of 256
        (2.0**-9, 2.0**-9),  # the smallest subnormal
        (2.0**-10, 0.0),  # half of it: tie, 0 is even
        (3 * 2.0**-10, 2.0**-8),  # between 1 and 2 smallest steps: 2 is even
        (5 * 2.0**-10, 2.0**-8),  # between 2 and 3: 2 is even
        (7.5 * 2.0**-9, 2.0**-6),  # rounds out of the subnormals
    ],
)
def test_e4m3_rounds_to_nearest_with_ties_to_the_even_mantissa(value, rounded):
    # 448 in the block makes its scale 1.
    assert quant.fp8_roundtrip(torch.tensor([value, 448.0]), 64)[0].item() == rounded


def test_small_fp8_blocks_use_the_amax_floor_of_1e_minus_4():
    # Scale 2^-22; 1e-5 is 41.9 of it, and between 32 and 64 the codes are 4 apart: 40 * 2^-22.
    assert quant.fp8_roundtrip(torch.tensor([1e-5]), 64).item() == 40 * 2.0**-22
    codes, scale = quant.fp8_quantize(torch.zeros(3), 64)
    assert scale.tolist() == [105]
    assert codes.float().tolist() == [0, 0, 0]


def test_each_fp8_block_has_its_own_scale_and_the_last_may_be_short():
    x = torch.tensor([448.0, 0.3, 448 * 4.0, 17 * 4.0, 448.0])
    codes, scale = quant.fp8_quantize(x, 2)
    assert scale.tolist() == [127, 129, 127]
    assert codes.float().tolist() == [448, 0.3125, 448, 16, 448]
    assert quant.fp8_dequantize(codes, scale, 2).tolist() == [448, 0.3125, 1792, 64, 448]


def test_all_e4m3_codes_survive_decoding_and_encoding():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = codes.float()
    finite = ~values.isnan()
    assert finite.sum() == 254
    # With 448 in the block the scale is 1, so the values meet the same grid again.
    padded = torch.stack([values[finite], torch.full((254,), 448.0)], dim=1)
    again, scale = quant.fp8_quantize(padded, 2)
    assert scale.eq(127).all()
    assert torch.equal(again[:, 0].view(torch.uint8), codes[finite].view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(448,), (3, 5, 448), (2, 24), (2, 100), (2, 0)])
def test_fp8_roundtrip_is_quantise_then_dequantise_to_the_bit(shape, dtype):
    x = (randn(*shape) * 30).to(dtype)
    codes, scale = quant.fp8_quantize(x, 64)
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 64))
    rounded = quant.fp8_roundtrip(x, 64)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, quant.fp8_dequantize(codes, scale, 64, dtype))


def test_fp8_rounding_finds_the_nearest_of_all_254_values():
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[~grid.isnan()]
    x = randn(4, 64, seed=1) * torch.tensor([[1e-3], [1.0], [30.0], [1e4]])
    rounded = quant.fp8_roundtrip(x, 64)
    for row, out in zip(x, rounded, strict=True):
        scale = 2.0 ** math.ceil(math.log2(row.abs().max().item() / 448))
        best = (row.double()[:, None] / scale - grid[None]).abs().amin(dim=1)
        torch.testing.assert_close((row.double() / scale - out.double() / scale).abs(), best, rtol=0, atol=0)


# ---- E2M1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0),  # ties
        (0.26, 0.5), (0.74, 0.5), (1.26, 1.5), (1.74, 1.5), (2.51, 3.0), (3.49, 3.0), (5.01, 6.0), (4.99, 4.0),
    ],
)  # fmt: skip
def test_e2m1_rounds_to_nearest_with_ties_to_the_even_mantissa(value, rounded):
    for sign in (1, -1):
        x = torch.tensor([sign * value, 6.0])
        assert quant.fp4_roundtrip(x)[0].item() == sign * rounded
        packed, scale = quant.fp4_quantize(x)
        assert quant.fp4_dequantize(packed, scale)[0].item() == sign * rounded


def test_all_e2m1_codes_survive_decoding_and_encoding():
    codes = torch.arange(16, dtype=torch.uint8)
    values = quant.e2m1_decode(codes)
    assert values.tolist() == E2M1 + [-v for v in E2M1]
    assert torch.equal(quant.e2m1_encode(values), codes)


def test_the_fast_fp4_rounding_equals_the_spelled_out_one():
    x = torch.cat([torch.linspace(-6, 6, 24_001), torch.tensor([1e-40, -1e-40, -0.0])])
    slow = quant.e2m1_decode(quant.e2m1_encode(x))
    fast = quant.e2m1_round(x)
    assert torch.equal(slow, fast)
    assert torch.equal(slow.signbit(), fast.signbit())


def test_fp4_bytes_hold_the_earlier_channel_in_the_low_nibble():
    # 6, -6, 0.5, -1 with scale 1 are codes 7, 15, 1, 10.
    packed, scale = quant.fp4_quantize(torch.tensor([6.0, -6.0, 0.5, -1.0]))
    assert packed.tolist() == [0xF7, 0xA1]
    assert scale.tolist() == [127]


def test_tiny_fp4_blocks_use_the_smallest_normal_scale():
    packed, scale = quant.fp4_quantize(torch.zeros(4))
    assert scale.tolist() == [1]
    assert packed.tolist() == [0, 0]
    assert quant.fp4_roundtrip(torch.full((2,), 2.0**-126)).tolist() == [2.0**-126] * 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(128,), (2, 3, 128), (2, 16), (2, 40)])
def test_fp4_roundtrip_is_quantise_then_dequantise_to_the_bit(shape, dtype):
    x = randn(*shape).to(dtype)
    packed, scale = quant.fp4_quantize(x)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 32))
    rounded = quant.fp4_roundtrip(x)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, quant.fp4_dequantize(packed, scale, dtype=dtype))


def test_fp4_refuses_an_odd_number_of_channels():
    with pytest.raises(ShapeError, match="even number of channels"):
        quant.fp4_quantize(torch.ones(3))


# ---- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roundtrip", [lambda x: quant.fp8_roundtrip(x, 64), quant.fp4_roundtrip])
def test_the_gradient_passes_through_rounding_unchanged(roundtrip):
    x = randn(2, 64).requires_grad_()
    weight = randn(2, 64, seed=1)
    (roundtrip(x) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_with_a_non_finite_value_becomes_nan_and_others_do_not(bad):
    x = torch.ones(128)
    x[3] = bad
    assert quant.fp8_roundtrip(x, 64).isnan().tolist() == [True] * 64 + [False] * 64
    assert quant.fp4_roundtrip(x).isnan().tolist() == [True] * 32 + [False] * 96
    assert quant.unpack_kv_entry(quant.pack_kv_entry(x, 0), 128, 0).isnan().tolist() == [True] * 64 + [False] * 64
    assert quant.unpack_index_key(quant.pack_index_key(x), 128).isnan().tolist() == [True] * 32 + [False] * 96


def test_rounding_leaves_its_input_alone():
    x = randn(2, 64)
    before = x.clone()
    quant.fp8_roundtrip(x, 64)
    quant.fp4_roundtrip(x)
    quant.hadamard(x)
    assert torch.equal(x, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gpu_rounds_and_packs_to_the_same_bits_as_a_cpu(dtype):
    x = (randn(64, 512) * torch.logspace(-6, 6, 64)[:, None]).to(dtype)
    for function in (
        lambda x: quant.fp8_roundtrip(x, 64),
        quant.fp4_roundtrip,
        quant.hadamard,
        lambda x: quant.pack_kv_entry(x, 64),
        lambda x: quant.unpack_kv_entry(quant.pack_kv_entry(x, 64), 448, 64, dtype),
        quant.pack_index_key,
        lambda x: quant.fp8_weight_decode(*quant.fp8_weight_encode(x)),
        lambda x: quant.fp4_weight_decode(*quant.fp4_weight_encode(x)),
    ):
        assert torch.equal(function(x.cuda()).cpu(), function(x))


# ---- Hadamard -----------------------------------------------------------------------------------------------------


def test_hadamard_of_four_channels_is_sylvesters_matrix_halved():
    rows = quant.hadamard(torch.eye(4)) * 2
    assert rows.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_hadamard_equals_the_matrix_product_and_undoes_itself(n):
    x = randn(5, n)
    torch.testing.assert_close(quant.hadamard(x), quant.hadamard_reference(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quant.hadamard(quant.hadamard(x)), x, rtol=1e-6, atol=1e-6)
    assert quant.hadamard(x.bfloat16()).dtype == torch.bfloat16


def test_hadamard_of_a_row_does_not_depend_on_the_rows_beside_it():
    x = randn(64, 128)
    assert torch.equal(quant.hadamard(x)[7], quant.hadamard(x[7:8])[0])


def test_hadamard_refuses_a_width_that_is_no_power_of_two():
    with pytest.raises(ShapeError, match="power of two"):
        quant.hadamard(torch.ones(2, 24))


# ---- cache bytes --------------------------------------------------------------------------------------------------


def test_the_released_entries_have_584_and_68_bytes():
    assert quant.pack_kv_entry(torch.zeros(3, 512), 64).shape == (3, 584)
    assert quant.pack_index_key(torch.zeros(3, 128)).shape == (3, 68)
    assert quant.kv_entry_nbytes(448, 64) == 584
    assert quant.index_key_nbytes(128) == 68


def test_a_kv_entry_is_e4m3_bytes_then_bf16_rotary_bytes_then_padded_scales():
    # 448 is E4M3 0x7E, -1 is 0xB8; BF16 1.0 is 0x3F80 and -2.0 is 0xC000, little endian; scale 2^0 is 127.
    packed = quant.pack_kv_entry(torch.tensor([448.0, -1.0, 1.0, -2.0]), rope_dim=2)
    assert packed.tolist() == [0x7E, 0xB8, 0x80, 0x3F, 0x00, 0xC0, 127, 0, 0, 0, 0, 0, 0, 0]


def test_an_index_key_is_nibbles_then_one_scale_per_32_channels():
    x = torch.zeros(64)
    x[0], x[1], x[32], x[63] = 6.0, -3.0, 12.0, 4.0  # scales 1 and 2: codes 7, 13, 7, 4
    packed = quant.pack_index_key(x)
    assert packed[:1].tolist() == [0xD7]
    assert packed[16].item() == 0x07
    assert packed[31].item() == 0x40
    assert packed[32:].tolist() == [127, 128]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("nope", "rope"), [(448, 64), (48, 16), (100, 2), (0, 16), (64, 0)])
def test_unpacking_a_kv_entry_gives_the_roundtrip_to_the_bit(nope, rope, dtype):
    x = randn(2, 3, nope + rope).to(dtype)
    packed = quant.pack_kv_entry(x, rope)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, quant.kv_entry_nbytes(nope, rope))
    expected = torch.cat([quant.fp8_roundtrip(x[..., :nope], 64), x[..., nope:].to(torch.bfloat16).to(dtype)], dim=-1)
    assert torch.equal(quant.unpack_kv_entry(packed, nope, rope, dtype), expected)


@pytest.mark.parametrize("width", [128, 32, 16, 96])
def test_unpacking_an_index_key_gives_the_roundtrip_to_the_bit(width):
    x = randn(2, 3, width)
    assert torch.equal(quant.unpack_index_key(quant.pack_index_key(x), width), quant.fp4_roundtrip(x))


def test_single_entries_unpack_from_any_byte_offset():
    x = randn(1, 5)
    buffer = torch.cat([torch.zeros(1, 1, dtype=torch.uint8), quant.pack_kv_entry(x, 4)], dim=1)
    assert torch.equal(quant.unpack_kv_entry(buffer[:, 1:], 1, 4)[0, 1:], x[0, 1:].bfloat16().float())


def test_entries_of_the_wrong_length_are_refused():
    with pytest.raises(ShapeError, match="584 bytes, got 583"):
        quant.unpack_kv_entry(torch.zeros(583, dtype=torch.uint8), 448, 64)
    with pytest.raises(ShapeError, match="68 bytes, got 64"):
        quant.unpack_index_key(torch.zeros(64, dtype=torch.uint8), 128)


# ---- weights ------------------------------------------------------------------------------------------------------


def test_an_fp8_weight_has_one_scale_per_128_by_128_tile():
    weight = torch.ones(130, 200)
    weight[0, 0], weight[129, 0], weight[0, 199] = 448.0, 896.0, 449.0
    codes, scale = quant.fp8_weight_encode(weight)
    # 448 fits scale 1; 896 needs 2; 449 would be clipped with 1, so 2; a tile of ones has 1/256.
    assert scale.tolist() == [[127, 128], [128, 119]]
    decoded = quant.fp8_weight_decode(codes, scale)
    assert decoded[0, 0].item() == 448
    assert decoded[129, 0].item() == 896
    assert decoded[0, 199].item() == 448  # 224.5 * 2, codes are 16 apart there
    assert decoded[129, 199].item() == 1


def test_an_fp4_weight_has_one_scale_per_row_and_32_inputs():
    weight = torch.zeros(2, 40)
    weight[0, 0], weight[0, 33], weight[1, 1] = 6.0, 24.0, -7.0
    packed, scale = quant.fp4_weight_encode(weight)
    assert packed.dtype == torch.int8
    assert packed.shape == (2, 20)
    assert scale.tolist() == [[127, 129], [128, 127]]  # 24 / 6 = 4; 7 / 6 needs 2; a block of zeros has 1
    assert packed[0, 0].item() == 0x07
    assert packed[1, 0].item() == 0xE0 - 256  # -7 / 2 = -3.5, a tie that goes to -4: code 14 in the high nibble
    decoded = quant.fp4_weight_decode(packed, scale)
    assert (decoded[0, 0].item(), decoded[0, 33].item(), decoded[1, 1].item()) == (6.0, 24.0, -8.0)


@pytest.mark.parametrize("encode_decode", [
    lambda w: quant.fp8_weight_decode(*quant.fp8_weight_encode(w)),
    lambda w: quant.fp4_weight_decode(*quant.fp4_weight_encode(w)),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(200, 300), (3, 130, 64), (1, 2)])
def test_encoding_decoded_weights_loses_nothing_whatever_scales_they_had(encode_decode, shape):
    once = encode_decode(randn(*shape) * 0.02)
    assert torch.equal(encode_decode(once), once)


def test_decoding_keeps_the_scales_it_is_given():
    # A checkpoint may have used larger scales than this encoder would: same codes, doubled scales, doubled values.
    codes, scale = quant.fp8_weight_encode(randn(4, 4))
    assert torch.equal(quant.fp8_weight_decode(codes, scale + 1), 2 * quant.fp8_weight_decode(codes, scale))
    assert torch.equal(
        quant.fp8_weight_decode(codes, quant.e8m0_to_float(scale)), quant.fp8_weight_decode(codes, scale)
    )


def test_weights_round_to_the_nearest_representable_value():
    weight = randn(3, 32, seed=2)
    decoded = quant.fp4_weight_decode(*quant.fp4_weight_encode(weight))
    grid = torch.tensor(E2M1 + [-v for v in E2M1])
    for row, out in zip(weight, decoded, strict=True):
        scale = 2.0 ** math.ceil(math.log2(row.abs().max().item() / 6))
        best = (row[:, None] - scale * grid[None]).abs().amin(dim=1)
        torch.testing.assert_close((row - out).abs(), best, rtol=0, atol=0)


def test_fp4_weights_become_fp8_without_loss_while_a_tiles_scales_differ_by_at_most_2_to_the_6():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (128, 64), generator=generator, dtype=torch.uint8).view(torch.int8)
    scale = torch.randint(120, 127, (128, 4), generator=generator, dtype=torch.uint8)
    values = quant.fp4_weight_decode(codes, scale)
    assert torch.equal(quant.fp8_weight_decode(*quant.fp8_weight_encode(values)), values)


def test_scales_that_do_not_cover_a_weight_are_refused():
    codes, scale = quant.fp8_weight_encode(torch.ones(130, 10))
    with pytest.raises(ShapeError, match=r"needs scales \(2, 1\), got \(1, 1\)"):
        quant.fp8_weight_decode(codes, scale[:1])
    packed, scale = quant.fp4_weight_encode(torch.ones(2, 64))
    with pytest.raises(ShapeError, match=r"needs scales \(2, 2\), got \(2, 1\)"):
        quant.fp4_weight_decode(packed, scale[:, :1])
