"""4-bit leaves against float64 NumPy (reference.py) and kept numbers of bitsandbytes (golden/)."""

import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import lora_jax as lj
from lora_jax.core import codebooks
from lora_jax.kernels import decode, decode_rows

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "bitsandbytes.npz"))
GOLDEN_CASES = sorted({name.split("/")[0] for name in GOLDEN if "/" in name})
DYNAMIC_MAP = GOLDEN["dynamic_map"]
TINY = np.finfo(np.float32).tiny
KINDS = ("nf4", "fp4", "int4", "af4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = ("float32", "bfloat16", "float16")


def assert_bits_equal(actual, expected) -> None:
    """Equal to the last bit, except that zeros may differ in sign."""
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected), strict=True)


def gaussian(shape, seed=0, dtype="float32"):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(w).astype(dtype)


# Codebooks.


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_codebook(kind):
    assert_bits_equal(codebooks.codebook(kind, 64), reference.LEVELS[kind])


def test_scale_codebook_is_that_of_bitsandbytes():
    assert_bits_equal(codebooks.scale_codebook(), DYNAMIC_MAP)
    assert DYNAMIC_MAP[127] == 0


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_af4_levels_are_medians_of_their_cells(block_size):
    """What makes an error least in the mean of absolute values, on a sample of Gaussian blocks."""
    blocks = np.random.default_rng(0).normal(size=(2**20 // block_size, block_size))
    x = (blocks / np.abs(blocks).max(-1, keepdims=True)).ravel()
    levels = codebooks.codebook("af4", block_size).astype(np.float64)
    assert (levels[0], levels[7], levels[15]) == (-1, 0, 1)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    for code in range(1, 15):
        cell = x[nearest == code]
        below = (cell < levels[code]).mean()
        if code != 7:
            assert abs(below - 0.5) < 3 / math.sqrt(cell.size)


# Against bitsandbytes.


def golden_weight(case):
    return jnp.asarray(GOLDEN["weight"]).astype(case.split("_")[0])


def of_golden(case) -> lj.QuantizedArray:
    """The bytes that bitsandbytes made, as a leaf."""
    dtype, kind, block_size = case.split("_")
    arrays = {name: jnp.asarray(GOLDEN[f"{case}/{name}"]) for name in ("codes", "scales", "offset")}
    return lj.QuantizedArray(
        **arrays,
        group_scales=jnp.asarray(GOLDEN[f"{case}/nested"]),
        kind=kind,
        block_size=int(block_size),
        dtype=jnp.dtype(dtype),
        layout="o i",
        axis_sizes=GOLDEN["weight"].shape,
    )


def golden_decoded(case):
    decoded = GOLDEN[f"{case}/decoded"]
    return decoded.view(jnp.bfloat16) if decoded.dtype == np.uint16 else decoded


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_codes_and_absmax_are_those_of_bitsandbytes(case):
    _, kind, block_size = case.split("_")
    options = {"kind": kind, "block_size": int(block_size), "layout": "o i"}
    plain = lj.quantize_array(golden_weight(case), double_quant=False, **options)
    assert_bits_equal(plain.codes, GOLDEN[f"{case}/codes"])
    assert_bits_equal(plain.scales, GOLDEN[f"{case}/absmax"])
    nested = lj.quantize_array(golden_weight(case), **options)
    assert_bits_equal(nested.codes, GOLDEN[f"{case}/codes"])
    # The offset is a mean over the matrix, whose rounding depends on the order of the sum; the
    # scales' codes hang on it.
    np.testing.assert_allclose(nested.offset, GOLDEN[f"{case}/offset"], rtol=1e-6)
    np.testing.assert_allclose(nested.group_scales, GOLDEN[f"{case}/nested"], rtol=1e-5)
    differences = np.asarray(nested.scales, int) - GOLDEN[f"{case}/scales"]
    assert np.abs(differences).max() <= 1
    assert (differences != 0).mean() < 0.01


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_decodes_what_bitsandbytes_stored_bit_for_bit(case):
    q, expected = of_golden(case), golden_decoded(case)
    with jax.disable_jit():
        assert_bits_equal(lj.dequantize(q), expected)
    assert_bits_equal(lj.dequantize(q), expected)
    # Fused into what comes before and after it, where XLA may reassociate and contract.
    fused = jax.jit(lambda q, x: (lj.dequantize(q).T, lj.dequantize(q) @ x))
    assert_bits_equal(fused(q, jnp.ones(512, expected.dtype))[0].T, expected)
    np.testing.assert_array_equal(
        reference.decode(q, DYNAMIC_MAP).astype(expected.dtype), np.asarray(expected)
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_zero_block_of_bitsandbytes(kind):
    codes = np.asarray(lj.quantize_array(jnp.asarray(GOLDEN["weight"]), kind, layout="o i").codes)
    assert (codes[3, 32:64] == {"nf4": 0x77, "fp4": 0x00}[kind]).all()


# Against NumPy, over kinds, block sizes, layouts and dtypes.

LAYOUTS = {
    "i o": lambda n: (n, 6),
    "o i": lambda n: (6, n),
    "i o o": lambda n: (n, 3, 2),
    "i i o": lambda n: (n // 4, 4, 6),
    "o o i": lambda n: (3, 2, n),
    "b i o": lambda n: (3, n, 2),
    "b b o i i": lambda n: (3, 1, 2, 4, n // 4),
}
# Every block size, and every pair of kind and layout, of kind and dtype.
QUANTIZATIONS = [
    *(("nf4", size, "i o", "float32") for size in BLOCK_SIZES),
    *((kind, 64, layout, "float32") for kind, layout in itertools.product(KINDS, LAYOUTS)),
    *((kind, 32, "o i", dtype) for kind, dtype in itertools.product(KINDS, FLOATS)),
]


@pytest.mark.parametrize(("kind", "block_size", "layout", "dtype"), sorted(set(QUANTIZATIONS)))
def test_against_numpy(kind, block_size, layout, dtype):
    w = gaussian(LAYOUTS[layout](2 * block_size), dtype=dtype)
    q = lj.quantize_array(w, kind, block_size=block_size, layout=layout, double_quant=False)
    assert (q.shape, q.dtype, q.size, q.ndim) == (w.shape, w.dtype, w.size, w.ndim)

    trailing = layout.replace("b ", "")
    m = reference.matrix(np.asarray(w).astype(np.float64), trailing)
    absmax = np.abs(m).reshape(*m.shape[:-1], -1, block_size).max(-1)
    assert_bits_equal(q.scales, absmax.astype(np.float32))
    # No other level is nearer than the one chosen, in units of the block's scale.
    levels = codebooks.codebook(kind, block_size).astype(np.float64)
    allowed = levels[1:] if kind == "int4" else levels
    scaled = m / np.repeat(absmax, block_size, -1)
    chosen = np.abs(levels[reference.unpack(q.codes)] - scaled)
    np.testing.assert_allclose(chosen, np.abs(allowed - scaled[..., None]).min(-1), atol=2e-7)
    # The product is exact in float64, so rounding it once is what float32 does.
    expected = levels[reference.unpack(q.codes)] * np.repeat(absmax, block_size, -1)
    expected = jnp.asarray(expected.astype(np.float32)).astype(dtype)
    assert_bits_equal(
        lj.dequantize(q), reference.parameter(np.asarray(expected), trailing, w.shape)
    )
    assert lj.dequantize(q, jnp.float16).dtype == jnp.float16


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_jit_equals_eager(kind, double_quant):
    """Quantization and decoding bit for bit, eagerly, in jit, and under vmap."""
    w = gaussian((3, 128, 40))
    options = {"kind": kind, "double_quant": double_quant}
    with jax.disable_jit():
        eager = lj.quantize_array(w, layout="b i o", **options)
        decoded = lj.dequantize(eager)
    jitted = jax.jit(functools.partial(lj.quantize_array, layout="b i o", **options))(w)
    mapped = jax.vmap(functools.partial(lj.quantize_array, **options))(w)
    assert jax.tree.structure(jitted) == jax.tree.structure(eager) == jax.tree.structure(mapped)
    for q in (jitted, mapped):
        assert_bits_equal(q.codes, eager.codes)
        if not double_quant:
            assert_bits_equal(q.scales, eager.scales)
    for run in (
        jax.jit(lj.dequantize),
        jax.vmap(lj.dequantize),
        jax.jit(lambda q: -lj.dequantize(q)),
    ):
        assert_bits_equal(jnp.abs(run(eager)), jnp.abs(decoded))


@pytest.mark.parametrize("double_quant", [False, True])
def test_constant_of_a_jit(double_quant):
    """A leaf that a jitted function closes over, so that XLA may decode it while compiling."""
    q = lj.quantize_array(gaussian((64, 128)), layout="o i", double_quant=double_quant)
    rows = jnp.array([3, 60])
    decoded = np.asarray(lj.dequantize(q))
    assert_bits_equal(jax.jit(lambda: lj.dequantize(q))(), decoded)
    assert_bits_equal(jax.jit(lambda: decode_rows(q, rows))(), decoded[[3, 60]])


@pytest.mark.parametrize("kind", KINDS)
def test_tie_takes_the_lower_level(kind):
    levels = np.unique(codebooks.codebook(kind, 64))
    if kind == "int4":
        levels = levels[1:]
    ties = (levels[1:] + levels[:-1]) / np.float32(2)
    row = np.zeros(64, np.float32)
    row[: ties.size], row[-1] = ties, 1.0
    for direction, expected in ((1, levels[:-1]), (np.inf, levels[1:]), (-np.inf, levels[:-1])):
        values = row.copy()
        if direction != 1:
            values[: ties.size] = np.nextafter(ties, np.float32(direction))
        q = lj.quantize_array(values[None], kind, layout="o i", double_quant=False)
        assert_bits_equal(lj.dequantize(q)[0, : ties.size], expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros(kind, double_quant):
    w = gaussian((4, 128)).at[1].set(0).at[2, 64:].set(0)
    q = lj.quantize_array(w, kind, layout="o i", double_quant=double_quant)
    decoded = np.asarray(lj.dequantize(q))
    assert (decoded[1] == 0).all()
    assert (decoded[2, 64:] == 0).all()
    nothing = lj.quantize_array(jnp.zeros((4, 128)), kind, layout="o i", double_quant=double_quant)
    assert (np.asarray(lj.dequantize(nothing)) == 0).all()
    if kind == "nf4":
        assert (np.asarray(nothing.codes) == 0x77).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("size", [1e-37, 1e-38, 1e-39, 1e-42, 1e-45])
def test_subnormal_blocks(size, double_quant):
    """They decode to within the smallest normal number of zero, and spoil no other block."""
    w = np.array(gaussian((4, 128)))
    w[1, :64] = np.clip(w[1, :64], -1, 1) * np.float32(size)
    q = lj.quantize_array(w, layout="o i", double_quant=double_quant)
    decoded = np.asarray(lj.dequantize(q)).astype(np.float64)
    if not double_quant:  # eight bits for the scales of large and small blocks alike see no 1e-38
        assert np.abs(decoded[1, :64]).max() < max(size, TINY) * 1.01
    rest = np.delete(w.reshape(8, 64), 2, axis=0)
    error = np.abs(np.delete(decoded.reshape(8, 64), 2, axis=0) - rest)
    assert error.max() < 0.2 * np.abs(rest).max()
    alone = lj.quantize_array(w[1:2, :64].repeat(4, 0), layout="o i", double_quant=double_quant)
    decoded = np.asarray(lj.dequantize(alone)).astype(np.float64)
    assert np.abs(decoded).max() < max(size, TINY) * 1.01


@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.0728), ("fp4", 0.0965)])
def test_mean_absolute_error_on_gaussian_values(kind, bound):
    """The bounds of bitsandbytes' own tests, at block size 64."""
    w = gaussian((1024, 1024))
    decoded = lj.dequantize(lj.quantize_array(w, kind))
    error = float(jnp.abs(decoded - w).mean())
    assert 0.98 * bound < error < 1.002 * bound


def test_kinds_rank_as_published():
    w = gaussian((1024, 256))
    error = {
        kind: float(jnp.abs(lj.dequantize(lj.quantize_array(w, kind)) - w).mean()) for kind in KINDS
    }
    assert error["nf4"] < error["af4"] < error["int4"]
    assert error["nf4"] < error["fp4"]


# Storage and double quantization.


@pytest.mark.parametrize(
    ("block_size", "double_quant", "bits"),
    [
        (64, True, 4 + 8 / 64 + 32 / (64 * 256)),
        (64, False, 4.5),
        (32, True, 4.254),
        (4096, True, 4.002),
    ],
)
def test_bits_of_a_parameter(block_size, double_quant, bits):
    w = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
    quantized = functools.partial(
        lj.quantize_array, block_size=block_size, double_quant=double_quant
    )
    q = jax.eval_shape(quantized, w)
    assert 8 * q.nbytes / q.size == pytest.approx(bits, abs=1e-3)
    if block_size == 64 and double_quant:
        assert f"{8 * q.nbytes / q.size:.3f}" == "4.127"


def test_nbytes_is_what_the_buffers_hold():
    q = lj.quantize_array(gaussian((128, 320)))
    assert q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))
    assert (q.codes.dtype, q.scales.dtype) == (jnp.uint8, jnp.uint8)
    assert (q.group_scales.dtype, q.offset.dtype) == (jnp.float32, jnp.float32)
    assert q.group_scales.shape == (-(-128 * 320 // 64 // 256),)


def test_double_quantized_scales_are_near():
    w = gaussian((256, 320)) * jnp.logspace(-3, 0, 320)
    plain = np.asarray(lj.quantize_array(w, double_quant=False).scales, np.float64)
    q = lj.quantize_array(w)
    error = np.abs(reference.scales(q, DYNAMIC_MAP) - plain).ravel()
    centred = np.abs(plain.ravel() - plain.mean())
    largest = [centred[k : k + 256].max() for k in range(0, centred.size, 256)]
    np.testing.assert_allclose(q.group_scales, largest, rtol=1e-5)
    assert float(q.offset) == pytest.approx(plain.mean(), rel=1e-6)
    half_gap = np.diff(DYNAMIC_MAP.astype(np.float64)).max() / 2
    assert (error <= np.repeat(largest, 256)[: error.size] * half_gap * 1.001).all()


@pytest.mark.parametrize("batch", [(3,), (2, 2)])
def test_groups_restart_at_each_leading_index(batch):
    """A stack of matrices is quantized as each of them alone, though groups end within rows."""
    w = gaussian((*batch, 192, 100))  # 300 blocks a matrix
    layout = "b " * len(batch) + "i o"
    stacked = lj.quantize_array(w, layout=layout)
    for index in np.ndindex(batch):
        alone = lj.quantize_array(w[index])
        part = jax.tree.map(lambda x: x[index], stacked)  # noqa: B023
        assert part.shape == (192, 100)
        assert_bits_equal(part.codes, alone.codes)
        np.testing.assert_allclose(part.offset, alone.offset, rtol=1e-6)
        np.testing.assert_allclose(part.group_scales, alone.group_scales, rtol=1e-5)
        decoded = reference.decode(part, DYNAMIC_MAP)
        assert_bits_equal(lj.dequantize(part), decoded)
        assert_bits_equal(lj.dequantize(stacked)[index], decoded)


# Other ways to decode.


@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_are_those_of_the_whole(double_quant):
    q = lj.quantize_array(gaussian((300, 128)), layout="o i", double_quant=double_quant)
    rows = np.array([[0, 299], [7, 7], [256, 131]])
    for run in (decode_rows, jax.jit(decode_rows)):
        assert_bits_equal(run(q, jnp.asarray(rows)), np.asarray(decode(q))[rows])


def test_affine_blocks():
    """`level · scale + minimum`, rounded twice as NumPy does, eagerly and in jit."""
    q = lj.quantize_array(gaussian((40, 256)), "int4", layout="o i", double_quant=False)
    minimum = np.random.default_rng(1).normal(size=q.scales.shape).astype(np.float32)
    affine = lj.QuantizedArray(
        q.codes,
        q.scales,
        minimum=jnp.asarray(minimum),
        kind="int4",
        layout="o i",
        axis_sizes=q.shape,
    )
    product = reference.LEVELS["int4"][reference.unpack(q.codes)] * np.repeat(q.scales, 64, -1)
    expected = product.astype(np.float32) + np.repeat(minimum, 64, -1)
    with jax.disable_jit():
        assert_bits_equal(lj.dequantize(affine), expected)
    assert_bits_equal(lj.dequantize(affine), expected)
    assert_bits_equal(jax.jit(lambda q: lj.dequantize(q).T)(affine).T, expected)


def test_abstract():
    w = jax.ShapeDtypeStruct((3, 128, 2, 8), jnp.bfloat16)
    quantized = functools.partial(lj.quantize_array, layout="b i o o")
    abstract = jax.eval_shape(quantized, w)
    actual = quantized(jnp.ones(w.shape, w.dtype))
    assert jax.tree.structure(abstract) == jax.tree.structure(actual)
    for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(actual), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    dense = jax.eval_shape(lj.dequantize, abstract)
    assert (dense.shape, dense.dtype) == (w.shape, w.dtype)
    assert jax.eval_shape(lambda q: lj.dequantize(q, jnp.float32), abstract).dtype == jnp.float32


def test_says_what_it_is():
    q = lj.quantize_array(gaussian((64, 32)))
    assert repr(q) == (
        "QuantizedArray(nf4, shape=(64, 32), dtype=float32, layout='i o', block_size=64, "
        "double-quantized scales)"
    )
    assert "QuantizedArray" in repr(jax.tree.map(lambda x: None, q))


# What is refused, and how.

ONES = np.ones((64, 32), np.float32)
REFUSED = {
    "list": (TypeError, [ONES.tolist()], {}, ["list", "array"]),
    "none": (TypeError, [None], {}, ["NoneType", "array"]),
    "integers": (TypeError, [ONES.astype(int)], {}, ["int64", "float32, bfloat16 or float16"]),
    "bool": (TypeError, [ONES > 0], {}, ["bool", "float32"]),
    "float64": (TypeError, [ONES.astype(float)], {}, ["float64", "astype(jnp.float32)"]),
    "complex": (TypeError, [ONES.astype(np.complex64)], {}, ["complex64", "float32"]),
    "nan": (ValueError, [ONES * np.nan], {}, ["NaN"]),
    "infinite": (ValueError, [ONES * np.inf], {}, ["infinite"]),
    "kind": (ValueError, [ONES, "nf5"], {}, ["'nf5'", "'nf4'", "'af4'"]),
    "kind of another type": (ValueError, [ONES, ["nf4"]], {}, ["['nf4']", "'nf4', 'fp4'"]),
    "block size": (ValueError, [ONES], {"block_size": 48}, ["48", "32, 64"]),
    "block size in words": (ValueError, [ONES], {"block_size": "64"}, ["'64'", "32, 64"]),
    "block too large": (ValueError, [ONES], {"block_size": 128}, ["64", "128", "block_size=64"]),
    "nothing fits": (ValueError, [np.ones((33, 64), np.float32)], {}, ["33", "leave it out"]),
    "vector": (ValueError, [np.ones(64, np.float32)], {}, ["(64,)", "matrix"]),
    "scalar": (ValueError, [np.float32(1)], {}, ["()", "matrix"]),
    "three axes": (ValueError, [np.ones((2, 64, 3), np.float32)], {}, ["3 axes", 'layout="b i o"']),
    "letters": (ValueError, [ONES], {"layout": "x o"}, ["'x o'", '"b i o"']),
    "not separated": (ValueError, [ONES], {"layout": "io"}, ["'io'", "separated by blanks"]),
    "no inputs": (ValueError, [ONES], {"layout": "o o"}, ["'o o'", '"i o"']),
    "scattered": (
        ValueError,
        [np.ones((64, 2, 4), np.float32)],
        {"layout": "i o i"},
        ["'i o i'", "together"],
    ),
    "batch within": (ValueError, [np.ones((64, 2, 4), np.float32)], {"layout": "i b o"}, ["first"]),
    "too many letters": (ValueError, [ONES], {"layout": "b i o"}, ["3 axes", "has 2", "(64, 32)"]),
    "layout of another type": (TypeError, [ONES], {"layout": ("i", "o")}, ["('i', 'o')", '"i o"']),
    "empty": (ValueError, [np.ones((64, 0), np.float32)], {}, ["empty", "(64, 0)"]),
}


@pytest.mark.parametrize(("error", "args", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses(error, args, options, words):
    with pytest.raises(error) as caught:
        lj.quantize_array(*args, **options, name="decoder/kernel")
    message = str(caught.value)
    assert all(word in message for word in words), message
    if not any(word in message for word in ("kind ", "block_size is")):
        assert "decoder/kernel" in message


def test_refuses_to_dequantize_an_array():
    with pytest.raises(TypeError, match="expected a QuantizedArray"):
        lj.dequantize(jnp.ones((4, 4)))
