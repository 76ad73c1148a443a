"""Rows copied out of many arrays at once: the same as slices of each, and nothing from outside of them."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from pomscale.data.readers.gather import gather


def _random(num_bytes: int) -> np.ndarray:
    return np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8)


def _naive(arrays: dict[int, np.ndarray], numbers: np.ndarray, offsets: np.ndarray, length: int) -> np.ndarray:
    return np.stack([arrays[n][o : o + length] for n, o in zip(numbers.tolist(), offsets.tolist(), strict=True)])


@pytest.mark.parametrize("length", [1, 3, 512, 8320])
@pytest.mark.parametrize("num_rows", [1, 2, 257])
@pytest.mark.parametrize("step", [1, 16, 512], ids=lambda step: f"offsets in steps of {step}")
def test_rows_are_those_of_slices(length: int, num_rows: int, step: int) -> None:
    # On the heap at odd addresses, in mappings of their own, and so far apart.
    arrays = {0: _random(9_000)[7:], 3: _random(50_000_000), 5: np.frombuffer(mmap.mmap(-1, 20_001), np.uint8)}
    rng = np.random.default_rng(num_rows)
    numbers = rng.choice(list(arrays), num_rows)
    offsets = np.array([rng.integers((len(arrays[n]) - length) // step + 1) * step for n in numbers.tolist()])
    assert np.array_equal(gather(arrays, numbers, offsets, length), _naive(arrays, numbers, offsets, length))


def test_first_and_last_bytes_of_each_array_are_reached() -> None:
    arrays = {number: _random(size) for number, size in enumerate((64, 65, 4096))}
    numbers = np.array([0, 0, 1, 1, 2, 2])
    offsets = np.array([0, 0, 0, 1, 0, 4032])
    assert np.array_equal(gather(arrays, numbers, offsets, 64), _naive(arrays, numbers, offsets, 64))


def test_the_result_is_a_copy() -> None:
    array = _random(100)
    before = array.copy()
    gather({0: array}, np.array([0]), np.array([0]), 100)[:] = 0
    assert np.array_equal(array, before)


@pytest.mark.parametrize(("number", "offset"), [(0, -1), (0, 37), (0, 2**62), (1, 0)])
def test_rows_outside_of_their_array_are_refused(number: int, offset: int) -> None:
    arrays = {0: _random(100), 2: _random(100)}
    with pytest.raises(ValueError, match="64 bytes from there on"):
        gather(arrays, np.array([2, number]), np.array([0, offset]), 64)


def test_rows_of_arrays_that_lie_at_both_ends_of_memory() -> None:
    """So many rows could begin between them that their bytes are more than there are numbers for."""
    low = _mapped_near(1 << 32, 1 << 21)
    high = np.frombuffer(mmap.mmap(-1, 1 << 21), np.uint8)
    assert abs(high.ctypes.data - low.ctypes.data) * (1 << 20) > 2**63
    numbers, offsets = np.array([0, 1, 0, 1]), np.array([0, 1, 7, 16])
    arrays = {0: low, 1: high}
    assert np.array_equal(gather(arrays, numbers, offsets, 1 << 20), _naive(arrays, numbers, offsets, 1 << 20))


def _mapped_near(address: int, num_bytes: int) -> np.ndarray:
    """Random bytes where the kernel is asked to have them; they stay for as long as the process."""
    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = (*2 * (ctypes.c_size_t,), *3 * (ctypes.c_int,), ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    found = libc.mmap(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    array = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(found))
    array[:] = _random(num_bytes)
    return array
