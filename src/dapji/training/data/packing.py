"""`pack`: samples of many lengths into windows of one capacity, so that little of it stays empty.

Best fit in bounded space: each sample goes into the fullest open window that has room; where too many are open the
fullest is closed. So the order of samples is kept roughly, and the result depends on nothing but its arguments.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

OPEN_WINDOWS = 64


def pack(lengths: Iterable[int], capacity: int, *, open_windows: int = OPEN_WINDOWS) -> list[list[int]]:
    """Windows of places in `lengths`, whose lengths add up to at most `capacity`; every place is in one window.

    lengths: each from 1 to capacity.
    """
    closed: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of the open windows, rising: what is left, and its number
    open_: dict[int, list[int]] = {}
    opened = 0
    for place, length in enumerate(lengths):
        assert 0 < length <= capacity
        fitting = bisect_left(room, (length, -1))
        if fitting < len(room):
            left, number = room.pop(fitting)
        else:
            left, number = capacity, opened
            opened += 1
            open_[number] = []
        open_[number].append(place)
        if left == length:
            closed.append(open_.pop(number))
            continue
        insort(room, (left - length, number))
        if len(room) > open_windows:
            closed.append(open_.pop(room.pop(0)[1]))
    return closed + [open_[number] for _, number in room]


def fill(windows: Iterable[list[int]], lengths: NDArray[np.integer], capacity: int) -> float:
    """The share of the windows' capacity that is used."""
    used = [int(lengths[window].sum()) for window in windows]
    return sum(used) / (len(used) * capacity)
