"""The kernels. Each program takes one item (neighbouring tokens, a row of a table) and one tile of a sample's channels.

A program walks over the tokens of its item with its channels in registers; sums over an item go to fp32 partials, which
`sum_items` and `running_sums` add in a fixed order. There are no atomics, so repeated runs give the same bits.
Offsets that grow with the tokens are 64-bit. Grids are one-dimensional: the other axes of CUDA end at 65,535.

Names: `x_batch` and `x_row` are strides of x, whose channels are contiguous; `piece` is D in the product form, else W;
`items` is the table (items 3) of first token, one past the last, and group or, for scans, first token of the segment.
"""

import triton
import triton.language as tl

from pomscale.ops.pom.triton_path.elements import (
    add,
    add_features,
    features_backward,
    gates,
    gates_backward,
    load,
    load_coefficients,
    load_frequency,
    load_pairs,
    multiply,
    rotation,
    split_program,
    store,
    store_coefficients,
    taking_part,
    tile_channels,
    zeros,
)


@triton.jit
def aggregate(
    u,
    coefficients,
    positions,
    frequencies,
    mask,
    items,
    partials,
    u_batch,
    u_row,
    position_batch,
    position_row,
    mask_batch,
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
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partials (b items W) = sum of h over the tokens of each item."""
    tile, item, sample = split_program(tiles, num_items)
    channels, exists, distance, axis, pair = tile_channels(tile, piece, pairs0, pairs1, pairs2, AXES, BLOCK)
    start, stop = tl.load(items + item * 3), tl.load(items + item * 3 + 1)
    c = load_coefficients(coefficients, channels, exists, distance, width, PRODUCT, DEGREE, STREAMS)
    frequency = load_frequency(frequencies, pair, exists, AXES)
    u += sample * u_batch
    positions += sample * position_batch
    mask += sample * mask_batch
    total = zeros(STREAMS, BLOCK)
    for token in range(start, stop, TOKENS):
        row = tl.cast(token, tl.int64)
        if AXES > 0:
            x = load_pairs(u, row, stop, u_row, mask, channels, exists, distance, MASKED, TOKENS, BLOCK)
            for step in tl.static_range(TOKENS):
                here = tl.minimum(row + step, stop - 1)
                cosine, sine = rotation(positions, here, position_row, axis, frequency, AXES)
                pair_here = x[2 * step], x[2 * step + 1]
                total = add_features(total, pair_here, c, cosine, sine, PRODUCT, DEGREE, AXES)
        else:
            takes_part = True
            if MASKED:
                takes_part = tl.load(mask + row) != 0  # a branch costs fewer registers than a mask of the channels
            if takes_part:
                x = load(u + row * u_row, channels, exists, distance, STREAMS)
                total = add_features(total, x, c, 1.0, 0.0, PRODUCT, DEGREE, AXES)
    store(partials + (sample * num_items + item) * width, channels, exists, distance, total, STREAMS)


@triton.jit
def aggregate_backward(
    u,
    coefficients,
    positions,
    frequencies,
    mask,
    items,
    dsums,
    du,
    dc,
    u_batch,
    u_row,
    position_batch,
    position_row,
    mask_batch,
    num_tokens,
    num_items,
    num_groups,
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
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Du (b n W) and dc (b items k W) of the gradient dsums (b groups W) of the sums of each group."""
    tile, item, sample = split_program(tiles, num_items)
    channels, exists, distance, axis, pair = tile_channels(tile, piece, pairs0, pairs1, pairs2, AXES, BLOCK)
    start, stop, group = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    c = load_coefficients(coefficients, channels, exists, distance, width, PRODUCT, DEGREE, STREAMS)
    frequency = load_frequency(frequencies, pair, exists, AXES)
    dh = load(dsums + (sample * num_groups + group) * width, channels, exists, distance, STREAMS)
    dc_here = zeros(0 if PRODUCT else STREAMS * DEGREE, BLOCK)
    u += sample * u_batch
    du += sample * num_tokens * width
    positions += sample * position_batch
    mask += sample * mask_batch
    for token in range(start, stop):
        row = tl.cast(token, tl.int64)
        takes_part = exists
        if MASKED:
            takes_part = taking_part(mask, row, exists, BLOCK)
        x = load(u + row * u_row, channels, takes_part, distance, STREAMS)
        cosine, sine = rotation(positions, row, position_row, axis, frequency, AXES)
        dx, dc_here = features_backward(x, dh, c, dc_here, cosine, sine, PRODUCT, DEGREE, AXES)
        if MASKED:
            for j in tl.static_range(STREAMS):
                dx_here = tl.where(takes_part, dx[j], 0.0).to(du.dtype.element_ty)
                tl.store(du + row * width + channels + j * distance, dx_here, mask=exists)
        else:
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


@triton.jit
def sum_items(
    partials, group_items, sums, num_items, num_groups, width, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums (b groups W) = sums of the partials (b items W) of each group; its items are group_items[g : g + 2]."""
    tile, group, sample = split_program(tiles, num_groups)
    channels = tile * BLOCK + tl.arange(0, BLOCK)
    exists = channels < width
    first, last = tl.load(group_items + group), tl.load(group_items + group + 1)
    partials += sample * num_items * width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        places = tl.cast(rows, tl.int64)[:, None] * width + channels[None, :]
        total += tl.load(partials + places, mask=(rows < last)[:, None] & exists[None, :], other=0.0)
    tl.store(sums + (sample * num_groups + group) * width + channels, tl.sum(total, axis=0), mask=exists)


@triton.jit
def running_sums(
    values,
    initial,
    segment_rows,
    result,
    totals,
    num_rows,
    num_segments,
    width,
    tiles,
    INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Result (b rows W) = initial (b segments W) + the sum of the values up to each row, within its segment.

    REVERSE: from the segment's end. EXCLUSIVE: without the row itself. totals (b segments W) = sum after all rows.
    """
    tile, segment, sample = split_program(tiles, num_segments)
    channels = tile * BLOCK + tl.arange(0, BLOCK)
    exists = channels < width
    first, last = tl.load(segment_rows + segment), tl.load(segment_rows + segment + 1)
    values += sample * num_rows * width
    result += sample * num_rows * width
    of_segment = (sample * num_segments + segment) * width + channels
    carry = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        carry = tl.load(initial + of_segment, mask=exists, other=0.0)
    count = last - first
    for start in range(0, count, ROWS):
        steps = start + tl.arange(0, ROWS)
        rows = tl.cast((last - 1 - steps) if REVERSE else (first + steps), tl.int64)[:, None] * width
        present = (steps < count)[:, None] & exists[None, :]
        here = tl.load(values + rows + channels[None, :], mask=present, other=0.0)
        if EXCLUSIVE:
            earlier = rows + (width if REVERSE else -width)
            inside = present & (steps > start)[:, None]
            prefix = tl.cumsum(tl.load(values + earlier + channels[None, :], mask=inside, other=0.0), axis=0)
        else:
            prefix = tl.cumsum(here, axis=0)
        tl.store(result + rows + channels[None, :], carry[None, :] + prefix, mask=present)
        carry += tl.sum(here, axis=0)
    tl.store(totals + of_segment, carry, mask=exists)


@triton.jit
def select(
    means,
    gate,
    positions,
    frequencies,
    items,
    y,
    gate_batch,
    gate_row,
    position_batch,
    position_row,
    num_tokens,
    num_items,
    num_groups,
    width,
    piece,
    tiles,
    pairs0,
    pairs1,
    pairs2,
    PRODUCT: tl.constexpr,
    STREAMS: tl.constexpr,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Y (b m W) = s o H, H = means (b groups W) of the query's group."""
    tile, item, sample = split_program(tiles, num_items)
    channels, exists, distance, axis, pair = tile_channels(tile, piece, pairs0, pairs1, pairs2, AXES, BLOCK)
    start, stop, group = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    frequency = load_frequency(frequencies, pair, exists, AXES)
    mean = load(means + (sample * num_groups + group) * width, channels, exists, distance, STREAMS)
    gate += sample * gate_batch
    positions += sample * position_batch
    y += sample * num_tokens * width
    for token in range(start, stop):
        row = tl.cast(token, tl.int64)
        g = load(gate + row * gate_row, channels, exists, distance, STREAMS)
        cosine, sine = rotation(positions, row, position_row, axis, frequency, AXES)
        s = gates(g, cosine, sine, PRODUCT, STREAMS, AXES)
        store(y + row * width, channels, exists, distance, multiply(s, mean, STREAMS), STREAMS)


@triton.jit
def select_backward(
    dy,
    means,
    gate,
    positions,
    frequencies,
    items,
    dgate,
    partials,
    dy_batch,
    dy_row,
    gate_batch,
    gate_row,
    position_batch,
    position_row,
    num_tokens,
    num_items,
    num_groups,
    width,
    piece,
    tiles,
    pairs0,
    pairs1,
    pairs2,
    PRODUCT: tl.constexpr,
    STREAMS: tl.constexpr,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dgate (b m W), and partials (b items W) = sum of s o dy over the queries of each item."""
    tile, item, sample = split_program(tiles, num_items)
    channels, exists, distance, axis, pair = tile_channels(tile, piece, pairs0, pairs1, pairs2, AXES, BLOCK)
    start, stop, group = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    frequency = load_frequency(frequencies, pair, exists, AXES)
    mean = load(means + (sample * num_groups + group) * width, channels, exists, distance, STREAMS)
    dy += sample * dy_batch
    gate += sample * gate_batch
    positions += sample * position_batch
    dgate += sample * num_tokens * width
    total = zeros(STREAMS, BLOCK)
    for token in range(start, stop):
        row = tl.cast(token, tl.int64)
        g = load(gate + row * gate_row, channels, exists, distance, STREAMS)
        upstream = load(dy + row * dy_row, channels, exists, distance, STREAMS)
        cosine, sine = rotation(positions, row, position_row, axis, frequency, AXES)
        total = add(total, multiply(gates(g, cosine, sine, PRODUCT, STREAMS, AXES), upstream, STREAMS), STREAMS)
        dg = gates_backward(g, multiply(upstream, mean, STREAMS), cosine, sine, PRODUCT, STREAMS, AXES)
        store(dgate + row * width, channels, exists, distance, dg, STREAMS)
    store(partials + (sample * num_items + item) * width, channels, exists, distance, total, STREAMS)
