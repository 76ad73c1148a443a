"""The kernels of causal masks, as `kernels.py` has them; an item's carry is what its segment has summed before it."""

import triton
import triton.language as tl

from pomscale.ops.pom.triton_path.elements import (
    add,
    features,
    features_backward,
    gates,
    gates_backward,
    load,
    load_coefficients,
    load_frequency,
    multiply,
    rotation,
    scale,
    split_program,
    store,
    store_coefficients,
    tile_channels,
    zeros,
)


@triton.jit
def scan(
    u,
    gate,
    coefficients,
    positions,
    query_positions,
    frequencies,
    items,
    carries,
    past_count,
    y,
    u_batch,
    u_row,
    gate_batch,
    gate_row,
    position_batch,
    position_row,
    query_position_batch,
    query_position_row,
    num_tokens,
    num_items,
    width,
    piece,
    tiles,
    pairs0,
    pairs1,
    pairs2,
    PRODUCT: tl.constexpr,
    DEGREE: tl.constexpr,
    STREAMS: tl.constexpr,
    AXES: tl.constexpr,
    GATED: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Y (b n W) = s o H of each token, or H where there are no gates; carries (b items W) fp32."""
    tile, item, sample = split_program(tiles, num_items)
    channels, exists, distance, axis, pair = tile_channels(tile, piece, pairs0, pairs1, pairs2, AXES, BLOCK)
    start, stop, origin = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    c = load_coefficients(coefficients, channels, exists, distance, width, PRODUCT, DEGREE, STREAMS)
    frequency = load_frequency(frequencies, pair, exists, AXES)
    total = load(carries + (sample * num_items + item) * width, channels, exists, distance, STREAMS)
    before = tl.cast(1 - origin, tl.int64)
    if PAST:
        before += tl.load(past_count + sample)
    u += sample * u_batch
    gate += sample * gate_batch
    y += sample * num_tokens * width
    positions += sample * position_batch
    query_positions += sample * query_position_batch
    for token in range(start, stop):
        row = tl.cast(token, tl.int64)
        x = load(u + row * u_row, channels, exists, distance, STREAMS)
        cosine, sine = rotation(positions, row, position_row, axis, frequency, AXES)
        total = add(total, features(x, c, cosine, sine, PRODUCT, DEGREE, AXES), STREAMS)
        result = scale(total, 1.0 / (before + row).to(tl.float32), STREAMS)
        if GATED:
            g = load(gate + row * gate_row, channels, exists, distance, STREAMS)
            cosine, sine = rotation(query_positions, row, query_position_row, axis, frequency, AXES)
            result = multiply(result, gates(g, cosine, sine, PRODUCT, STREAMS, AXES), STREAMS)
        store(y + row * width, channels, exists, distance, result, STREAMS)


@triton.jit
def scan_backward_of_gates(
    dy,
    u,
    gate,
    coefficients,
    positions,
    query_positions,
    frequencies,
    items,
    carries,
    past_count,
    dgate,
    partials,
    dy_batch,
    dy_row,
    u_batch,
    u_row,
    gate_batch,
    gate_row,
    position_batch,
    position_row,
    query_position_batch,
    query_position_row,
    num_tokens,
    num_items,
    width,
    piece,
    tiles,
    pairs0,
    pairs1,
    pairs2,
    PRODUCT: tl.constexpr,
    DEGREE: tl.constexpr,
    STREAMS: tl.constexpr,
    AXES: tl.constexpr,
    GATED: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dgate (b n W), for which H is summed again, and partials (b items W) = sum of dH / count over each item."""
    tile, item, sample = split_program(tiles, num_items)
    channels, exists, distance, axis, pair = tile_channels(tile, piece, pairs0, pairs1, pairs2, AXES, BLOCK)
    start, stop, origin = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    c = load_coefficients(coefficients, channels, exists, distance, width, PRODUCT, DEGREE, STREAMS)
    frequency = load_frequency(frequencies, pair, exists, AXES)
    total = load(carries + (sample * num_items + item) * width, channels, exists, distance, STREAMS)
    before = tl.cast(1 - origin, tl.int64)
    if PAST:
        before += tl.load(past_count + sample)
    dy += sample * dy_batch
    u += sample * u_batch
    gate += sample * gate_batch
    dgate += sample * num_tokens * width
    positions += sample * position_batch
    query_positions += sample * query_position_batch
    dtotal = zeros(STREAMS, BLOCK)
    for token in range(start, stop):
        row = tl.cast(token, tl.int64)
        share = 1.0 / (before + row).to(tl.float32)
        upstream = scale(load(dy + row * dy_row, channels, exists, distance, STREAMS), share, STREAMS)
        if GATED:
            x = load(u + row * u_row, channels, exists, distance, STREAMS)
            g = load(gate + row * gate_row, channels, exists, distance, STREAMS)
            cosine, sine = rotation(positions, row, position_row, axis, frequency, AXES)
            total = add(total, features(x, c, cosine, sine, PRODUCT, DEGREE, AXES), STREAMS)
            cosine, sine = rotation(query_positions, row, query_position_row, axis, frequency, AXES)
            dg = gates_backward(g, multiply(upstream, total, STREAMS), cosine, sine, PRODUCT, STREAMS, AXES)
            store(dgate + row * width, channels, exists, distance, dg, STREAMS)
            upstream = multiply(upstream, gates(g, cosine, sine, PRODUCT, STREAMS, AXES), STREAMS)
        dtotal = add(dtotal, upstream, STREAMS)
    store(partials + (sample * num_items + item) * width, channels, exists, distance, dtotal, STREAMS)


@triton.jit
def scan_backward_of_features(
    dy,
    u,
    gate,
    coefficients,
    positions,
    query_positions,
    frequencies,
    items,
    carries,
    past_count,
    du,
    dc,
    dy_batch,
    dy_row,
    u_batch,
    u_row,
    gate_batch,
    gate_row,
    position_batch,
    position_row,
    query_position_batch,
    query_position_row,
    num_tokens,
    num_items,
    width,
    piece,
    tiles,
    pairs0,
    pairs1,
    pairs2,
    PRODUCT: tl.constexpr,
    DEGREE: tl.constexpr,
    STREAMS: tl.constexpr,
    AXES: tl.constexpr,
    GATED: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Du (b n W) and dc (b items k W), from the last token to the first; carries (b items W) = dh after each item."""
    tile, item, sample = split_program(tiles, num_items)
    channels, exists, distance, axis, pair = tile_channels(tile, piece, pairs0, pairs1, pairs2, AXES, BLOCK)
    start, stop, origin = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    c = load_coefficients(coefficients, channels, exists, distance, width, PRODUCT, DEGREE, STREAMS)
    frequency = load_frequency(frequencies, pair, exists, AXES)
    dh = load(carries + (sample * num_items + item) * width, channels, exists, distance, STREAMS)
    dc_here = zeros(0 if PRODUCT else STREAMS * DEGREE, BLOCK)
    before = tl.cast(1 - origin, tl.int64)
    if PAST:
        before += tl.load(past_count + sample)
    dy += sample * dy_batch
    u += sample * u_batch
    gate += sample * gate_batch
    du += sample * num_tokens * width
    positions += sample * position_batch
    query_positions += sample * query_position_batch
    for step in range(0, stop - start):
        row = tl.cast(stop - 1 - step, tl.int64)
        share = 1.0 / (before + row).to(tl.float32)
        upstream = scale(load(dy + row * dy_row, channels, exists, distance, STREAMS), share, STREAMS)
        x = load(u + row * u_row, channels, exists, distance, STREAMS)
        if GATED:
            g = load(gate + row * gate_row, channels, exists, distance, STREAMS)
            cosine, sine = rotation(query_positions, row, query_position_row, axis, frequency, AXES)
            upstream = multiply(upstream, gates(g, cosine, sine, PRODUCT, STREAMS, AXES), STREAMS)
        dh = add(dh, upstream, STREAMS)
        cosine, sine = rotation(positions, row, position_row, axis, frequency, AXES)
        dx, dc_here = features_backward(x, dh, c, dc_here, cosine, sine, PRODUCT, DEGREE, AXES)
        store(du + row * width, channels, exists, distance, dx, STREAMS)
    store_coefficients(
        dc + (sample * num_items + item) * width * DEGREE,
        channels,
        exists,
        distance,
        width,
        dc_here,
        PRODUCT,
        DEGREE,
        STREAMS,
    )
