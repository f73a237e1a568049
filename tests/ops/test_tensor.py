"""Tensors made of others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dapji.ops.tensor import Bytes, Tensor


def test_rows_of_one_part_are_taken_without_making_the_others() -> None:
    """As the gates and ups of experts whose file holds both, transposed: made of all experts for each of them, they
    would take a square of the time."""
    made = []
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 4, 2 * 5)).astype(np.float32)  # [experts, in, gate beside up]

    def counted(tensor: Tensor, i: int) -> Tensor:
        def make() -> Bytes:
            made.append(i)
            return tensor.stored

        return replace(tensor, source=make)

    parts = [counted(Tensor.from_float32(f"{i}", values[i]).transposed(), i) for i in range(3)]
    both = Tensor.joined("both", parts, 3, 10, 4)
    halves = np.arange(30).reshape(3, 2, 5)
    for half in range(2):
        experts = both.take_rows(halves[:, half].ravel(), f"half {half}").reshape(3, 5, 4).split()
        assert len({expert.name for expert in experts}) == 3
        for i, expert in enumerate(experts):
            made.clear()
            np.testing.assert_array_equal(expert.float32(), values[i, :, 5 * half : 5 * half + 5].T)
            assert made == [i]
    # across parts, and in another order
    index = np.array([12, 9, 10])
    np.testing.assert_array_equal(both.take_rows(index).float32(), both.float32().reshape(30, 4)[index])
