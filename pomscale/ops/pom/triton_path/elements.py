"""What kernels do to one token: loads and stores of its channels, the polynomial, the gates, and their gradients.

A program works on a tile of BLOCK channels c, and with them on all channels that the algebra binds to c; together these
are its streams, a tuple of fp32 vectors:

    product form:                       the k pieces,           channels c, c + D, .., c + (k - 1) D
    coefficient form with rotation:     the two of a pair,      channels c, c + P       (P pairs on the axis of c)
    coefficient form without:           c alone

NaN is propagated everywhere, as torch does: a hidden NaN would hide a divergence.
"""

import triton
import triton.language as tl


@triton.jit
def split_program(tiles, items):
    """Return (tile, item, sample) of this program; tiles vary fastest, so that neighbours read neighbouring memory."""
    program = tl.program_id(0)
    return program % tiles, (program // tiles) % items, tl.cast(program // tiles // items, tl.int64)


@triton.jit
def tile_channels(tile, piece, pairs0, pairs1, pairs2, AXES: tl.constexpr, BLOCK: tl.constexpr):
    """Return (channels of the first stream, which of them exist, distance of streams, axis, index of the pair)."""
    lanes = tl.arange(0, BLOCK)
    if AXES == 0:
        channels = tile * BLOCK + lanes
        exists, distance, axis, pair = channels < piece, piece, 0, channels
    else:
        # Tiles do not cross the axes, so that within one the channels are neighbours.
        tiles0, tiles1 = tl.cdiv(pairs0, BLOCK), tl.cdiv(pairs1, BLOCK)
        past0, past1 = tl.cast(tile >= tiles0, tl.int32), tl.cast(tile >= tiles0 + tiles1, tl.int32)
        if AXES < 3:
            past1 *= 0
        if AXES < 2:
            past0 *= 0
        before = past0 * pairs0 + past1 * pairs1
        distance = (1 - past0) * pairs0 + (past0 - past1) * pairs1 + past1 * pairs2
        index = (tile - past0 * tiles0 - past1 * tiles1) * BLOCK + lanes
        channels, exists, axis, pair = 2 * before + index, index < distance, past0 + past1, before + index
    return channels, exists, distance, axis, pair


@triton.jit
def zeros(STREAMS: tl.constexpr, BLOCK: tl.constexpr):
    result = ()
    for _ in tl.static_range(STREAMS):
        result = result + (tl.zeros((BLOCK,), tl.float32),)
    return result


@triton.jit
def load(pointer, channels, exists, distance, STREAMS: tl.constexpr):
    result = ()
    for j in tl.static_range(STREAMS):
        result = result + (tl.load(pointer + channels + j * distance, mask=exists, other=0.0).to(tl.float32),)
    return result


@triton.jit
def load_pairs(
    u,
    row,
    stop,
    u_row,
    mask,
    channels,
    exists,
    distance,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return both streams of `row`, and with 2 TOKENS those of the next; 0 from `stop` on and where the mask is 0.

    A thread loads 16 bytes of one stream of one token. Then threads trade, so that each works on both channels of a
    pair, and has a half or a quarter of the sums, coefficients and angles that 16 bytes of each stream would need.
    """
    lines = tl.arange(0, 2 * TOKENS)
    rows = row + lines // 2
    present = rows < stop
    if MASKED:
        present = present & (tl.load(mask + rows, mask=present, other=0) != 0)
    places = rows[:, None] * u_row + (lines % 2)[:, None] * distance + channels[None, :]
    tile = tl.permute(tl.load(u + places, mask=present[:, None] & exists[None, :], other=0.0), (1, 0))
    if TOKENS == 1:
        x = tl.split(tile)
    else:
        firsts, seconds = tl.split(tl.reshape(tile, (BLOCK, 2, 2)))
        first, next_first = tl.split(firsts)
        second, next_second = tl.split(seconds)
        x = first, second, next_first, next_second
    result = ()
    for j in tl.static_range(2 * TOKENS):
        result = result + (x[j].to(tl.float32),)
    return result


@triton.jit
def store(pointer, channels, exists, distance, values, STREAMS: tl.constexpr):
    for j in tl.static_range(STREAMS):
        tl.store(pointer + channels + j * distance, values[j].to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def load_coefficients(
    pointer, channels, exists, distance, width, PRODUCT: tl.constexpr, DEGREE: tl.constexpr, STREAMS: tl.constexpr
):
    """Return c_1 of each stream, c_2 of each, ..; the pointer is that of (k W)."""
    result = ()
    if not PRODUCT:
        for power in tl.static_range(DEGREE):
            result = result + load(pointer + power * width, channels, exists, distance, STREAMS)
    return result


@triton.jit
def load_frequency(frequencies, pair, exists, AXES: tl.constexpr):
    """Return the angle per unit of position of each channel's pair; 0 without a rotation."""
    frequency = 0.0
    if AXES > 0:
        frequency = tl.load(frequencies + pair, mask=exists, other=0.0)
    return frequency


@triton.jit
def store_coefficients(
    pointer,
    channels,
    exists,
    distance,
    width,
    values,
    PRODUCT: tl.constexpr,
    DEGREE: tl.constexpr,
    STREAMS: tl.constexpr,
):
    if not PRODUCT:
        for power in tl.static_range(DEGREE):
            for j in tl.static_range(STREAMS):
                place = pointer + power * width + channels + j * distance
                tl.store(place, values[power * STREAMS + j], mask=exists)


@triton.jit
def add(left, right, STREAMS: tl.constexpr):
    result = ()
    for j in tl.static_range(STREAMS):
        result = result + (left[j] + right[j],)
    return result


@triton.jit
def scale(values, factor, STREAMS: tl.constexpr):
    result = ()
    for j in tl.static_range(STREAMS):
        result = result + (values[j] * factor,)
    return result


@triton.jit
def multiply(left, right, STREAMS: tl.constexpr):
    result = ()
    for j in tl.static_range(STREAMS):
        result = result + (left[j] * right[j],)
    return result


@triton.jit
def taking_part(mask, row, exists, BLOCK: tl.constexpr):
    """Return which of the channels take part: those that exist, of a token that the mask (n,) lets in."""
    # A vector is compared, and not the number, since the interpreter's `&` of a number is no mask.
    return exists & ((tl.load(mask + row) + tl.zeros((BLOCK,), tl.int32)) != 0)


@triton.jit
def rotation(positions, row, position_row, axis, frequency, AXES: tl.constexpr):
    """Return cosine and sine of a token's angles; `positions` points at the sample's (n axes) integers."""
    if AXES == 0:
        cosine, sine = 1.0, 0.0
    else:
        cosine, sine = cosine_sine(tl.load(positions + row * position_row + axis).to(tl.float32) * frequency)
    return cosine, sine


@triton.jit
def cosine_sine(angle):
    """Return both of an fp32 angle of up to about 10^5, to 2e-7.

    Those of CUDA's library have a branch for huge angles, which costs 1,200 instructions and twice the registers. The
    angle is reduced by quarter turns in three parts (Cody and Waite), with the polynomials of Cephes on what is left.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = ((angle - quarters * 1.5703125) - quarters * 4.8375129699707031e-4) - quarters * 7.5497899548918821e-8
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quarter = quarters.to(tl.int32)
    odd = (quarter & 1) != 0
    result = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return (
        tl.where(((quarter + 1) & 2) != 0, -result[0], result[0]),
        tl.where((quarter & 2) != 0, -result[1], result[1]),
    )


@triton.jit
def turn(x, cosine, sine):
    return x[0] * cosine - x[1] * sine, x[1] * cosine + x[0] * sine


# --- the polynomial --------------------------------------------------------------------------------------------------


@triton.jit
def normal(x):
    """Return the normal distribution at x, to 1e-7; below 0, down to -4, to 3e-4 of itself.

    Its logarithm on the base of 2 is a polynomial of |x|, fitted on 0 .. 6 and ever falling beyond. The `erf` of CUDA's
    library has a branch for each number, which makes three times the instructions, keeps the compiler from ordering
    them, and so costs registers; and 1 + erf loses the digits of small results.
    """
    t = tl.abs(x)
    q = -9.593763934390154e-7 * t + 1.674368468229659e-5
    q = q * t - 8.014458580873907e-5
    q = q * t - 3.838448319584131e-4
    q = q * t + 7.367151789367199e-3
    q = q * t - 5.268951877951622e-2
    q = q * t - 0.4591505825519562
    q = q * t - 1.1511114835739136
    tail = tl.exp2(q * t - 0.9999998807907104)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def gelu(x):
    return x * normal(x)


@triton.jit
def gelu_with_slope(x):
    below = normal(x)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * below, below + x * density


@triton.jit
def leaky(x):
    return tl.where(x > 0, x, 0.01 * x)


@triton.jit
def clamped(x, low: tl.constexpr, high: tl.constexpr):
    bounded = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(bounded, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def features(x, coefficients, cosine, sine, PRODUCT: tl.constexpr, DEGREE: tl.constexpr, AXES: tl.constexpr):
    """Return h of a token, stream by stream."""
    STREAMS: tl.constexpr = 2 if AXES > 0 else 1
    h = ()
    if PRODUCT:
        h = (gelu(x[0]),)
        for j in tl.static_range(1, DEGREE):
            h = h + (h[j - 1] * gelu(x[j]),)
    else:
        for j in tl.static_range(STREAMS):
            v = clamped(leaky(x[j]), -0.1, 6.0)
            value = v * coefficients[(DEGREE - 1) * STREAMS + j]
            for power in tl.static_range(1, DEGREE):  # Horner's scheme
                value = (value + coefficients[(DEGREE - 1 - power) * STREAMS + j]) * v
            h = h + (value,)
        if AXES > 0:
            h = turn(h, cosine, sine)
    return h


@triton.jit
def add_features(total, x, coefficients, cosine, sine, PRODUCT: tl.constexpr, DEGREE: tl.constexpr, AXES: tl.constexpr):
    """Return total + h of a token; in the product form one piece after another, so that h is never there as a whole."""
    if PRODUCT:
        h = gelu(x[0])
        result = (total[0] + h,)
        for j in tl.static_range(1, DEGREE):
            h = h * gelu(x[j])
            result = result + (total[j] + h,)
    else:
        STREAMS: tl.constexpr = 2 if AXES > 0 else 1
        result = add(total, features(x, coefficients, cosine, sine, PRODUCT, DEGREE, AXES), STREAMS)
    return result


@triton.jit
def features_backward(
    x, dh, coefficients, dc, cosine, sine, PRODUCT: tl.constexpr, DEGREE: tl.constexpr, AXES: tl.constexpr
):
    """Return (du, dc + this token's gradient of the coefficients) for the gradient dh of a token's features."""
    STREAMS: tl.constexpr = 2 if AXES > 0 else 1
    du, moments = (), ()
    if PRODUCT:
        du = product_backward(x, dh, DEGREE)
    else:
        if AXES > 0:
            dh = turn(dh, cosine, -sine)
        v = ()
        for j in tl.static_range(STREAMS):
            v = v + (clamped(leaky(x[j]), -0.1, 6.0),)
            slope = coefficients[(DEGREE - 1) * STREAMS + j] * DEGREE
            for power in tl.static_range(1, DEGREE):
                slope = slope * v[j] + coefficients[(DEGREE - 1 - power) * STREAMS + j] * (DEGREE - power)
            # u = -10 is where 0.01 u reaches -0.1; a NaN is not within, so its gradient is 0, as torch's is.
            within = (leaky(x[j]) >= -0.1) & (x[j] <= 6.0)
            du = du + (tl.where(within, dh[j] * slope * tl.where(x[j] > 0, 1.0, 0.01), 0.0),)
        for power in tl.static_range(DEGREE):
            dh = multiply(dh, v, STREAMS)
            for j in tl.static_range(STREAMS):
                moments = moments + (dc[power * STREAMS + j] + dh[j],)
    return du, moments


@triton.jit
def product_backward(x, dh, DEGREE: tl.constexpr):
    a, slopes, h = (), (), ()
    for j in tl.static_range(DEGREE):
        value, slope = gelu_with_slope(x[j])
        a, slopes = a + (value,), slopes + (slope,)
        if j == 0:
            h = h + (value,)
        else:
            h = h + (h[j - 1] * value,)
    q = dh[DEGREE - 1]  # gradient of everything that flows through h_j
    du = ()
    for back in tl.static_range(DEGREE - 1):
        du = (q * h[DEGREE - 2 - back] * slopes[DEGREE - 1 - back],) + du
        q = dh[DEGREE - 2 - back] + q * a[DEGREE - 1 - back]
    return (q * slopes[0],) + du


# --- the gates, one per channel --------------------------------------------------------------------------------------


@triton.jit
def gates(g, cosine, sine, PRODUCT: tl.constexpr, STREAMS: tl.constexpr, AXES: tl.constexpr):
    s = ()
    for j in tl.static_range(STREAMS):
        if PRODUCT:
            s = s + (tl.sigmoid(g[j]),)
        else:
            s = s + (clamped(g[j] * 0.16666666666666666 + 0.5, 0.0, 1.0),)
    if AXES > 0:
        s = turn(s, cosine, sine)
    return s


@triton.jit
def gates_backward(g, ds, cosine, sine, PRODUCT: tl.constexpr, STREAMS: tl.constexpr, AXES: tl.constexpr):
    if AXES > 0:
        ds = turn(ds, cosine, -sine)
    dg = ()
    for j in tl.static_range(STREAMS):
        if PRODUCT:
            s = tl.sigmoid(g[j])
            dg = dg + (ds[j] * s * (1.0 - s),)
        else:
            dg = dg + (tl.where((g[j] > -3.0) & (g[j] < 3.0), ds[j] * 0.16666666666666666, 0.0),)
    return dg
