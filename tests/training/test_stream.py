"""Order, packing, windows: properties over random data; logits of a packed window against each sequence alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapji.errors import ContextError, FormatError
from dapji.files import Files
from dapji.models.executor import ReferenceExecutor
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.training.data.dataset import Dataset
from dapji.training.data.encoding import Sample, Sequence
from dapji.training.data.packing import fill, pack
from dapji.training.data.permutation import Permutation
from dapji.training.data.stream import Stream, Window
from random_weights import random_weights


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64))
def test_a_permutation_has_each_number_once(n: int, seed: int) -> None:
    permutation = Permutation(n, seed)
    every = permutation.at(np.arange(n))
    assert sorted(every.tolist()) == list(range(n))
    some = np.array([n - 1, 0, n // 2])
    assert permutation.at(some).tolist() == every[some].tolist()


def test_orders_are_shuffled_and_stay_what_they_are() -> None:
    """Runs are resumed by later versions: the order of a seed is fixed."""
    assert Permutation(10, 0).at(np.arange(10)).tolist() == [2, 5, 1, 4, 3, 6, 9, 8, 0, 7]
    n = 10_000
    orders = [Permutation(n, seed).at(np.arange(n)) for seed in range(8)]
    for i, order in enumerate(orders):
        # Correlations of random orders are of the size of 1 / sqrt(n) = 0.01; five times that is out of reach.
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
        for other in orders[:i]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.05


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=200)


@settings(deadline=None)
@given(lengths=LENGTHS, open_windows=st.integers(1, 20))
def test_packing_keeps_every_sample_and_the_capacity(lengths: list[int], open_windows: int) -> None:
    windows = pack(lengths, 50, open_windows=open_windows)
    assert sorted(place for window in windows for place in window) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in window) <= 50 for window in windows)


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_packing_is_best_fit(lengths: list[int]) -> None:
    """Against the definition: of all windows that have room, the fullest; with enough open none is closed early."""
    windows: list[list[int]] = []
    for place, length in enumerate(lengths):
        used = [sum(lengths[p] for p in window) for window in windows]
        fitting = [(u, -i) for i, u in enumerate(used) if u + length <= 50]
        if fitting:
            windows[-max(fitting)[1]].append(place)
        else:
            windows.append([place])
    assert sorted(pack(lengths, 50, open_windows=1000)) == sorted(windows)


def test_windows_are_nearly_full() -> None:
    """Lengths as those of instructions: log-normal, a median of 160 tokens."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.1, 0.8, 20_000).astype(int), 8, 2048)
    assert fill(pack(lengths.tolist(), 2048), lengths, 2048) > 0.99


def sequence(random: np.random.Generator, length: int, vocab: int = 250) -> Sequence:
    learned = random.random(length) < 0.5
    learned[0], learned[-1] = False, True
    return Sequence(ids=random.integers(3, vocab, length).astype(np.int32), learned=learned)


def samples(n: int, *, longest: int = 40) -> list[Sample]:
    """Plain ones, preferences and rated ones in turn."""
    random = np.random.default_rng(n)
    made = []
    for i in range(n):
        sequences = tuple(sequence(random, int(random.integers(2, longest))) for _ in range(2 if i % 3 == 1 else 1))
        made.append(Sample(sequences=sequences, good=bool(i % 2) if i % 3 == 2 else None))
    return made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.write(tmp_path_factory.mktemp("data") / "set", samples(97))


def test_a_data_set_is_what_was_written(dataset: Dataset) -> None:
    written = samples(97)
    assert len(dataset) == len(written)
    assert dataset.lengths.tolist() == [len(sample) for sample in written]
    for i, sample in enumerate(written):
        found = dataset[i]
        assert found.good == sample.good
        assert len(found.sequences) == len(sample.sequences)
        for a, b in zip(found.sequences, sample.sequences, strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            assert a.learned.tolist() == b.learned.tolist()


def test_a_data_set_is_replaced_whole(tmp_path: Path) -> None:
    def failing() -> object:
        yield samples(3)[0]
        raise FormatError("no more")

    Dataset.write(tmp_path / "set", samples(5))
    with pytest.raises(FormatError, match="no more"):
        Dataset.write(tmp_path / "set", failing())  # type: ignore[arg-type]
    assert len(Dataset(tmp_path / "set")) == 5
    with pytest.raises(FormatError, match="no example"):
        Dataset.write(tmp_path / "none", [])
    (tmp_path / "set" / "tokens.bin").write_bytes(b"1234")
    with pytest.raises(FormatError, match="do not fit together"):
        Dataset(tmp_path / "set")


def key(window: Window) -> tuple[list[int], list[int]]:
    return window.samples.tolist(), window.tokens.tolist()


def test_every_epoch_has_each_sample_once(dataset: Dataset) -> None:
    stream = Stream(dataset, capacity=100, seed=3)
    orders = []
    index = 0
    for epoch in range(3):
        n_windows = len(stream.epoch(epoch))
        windows = [stream.window(i) for i in range(index, index + n_windows)]
        assert stream.locate(index) == (epoch, 0)
        index += n_windows
        seen = [list(dict.fromkeys(window.samples.tolist())) for window in windows]
        assert sorted(i for window in seen for i in window) == list(range(97))
        assert all(len(window.tokens) <= 100 for window in windows)
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_goes_on_from_any_place(dataset: Dataset, ranks: int) -> None:
    """After some windows on one rank, others take over; together they see what one would have seen."""
    alone = list(map(key, islice(Stream(dataset, capacity=100, seed=1).windows(), 60)))
    start = 14
    streams = [Stream(dataset, capacity=100, seed=1).windows(start, rank=rank, ranks=ranks) for rank in range(ranks)]
    together = [key(next(streams[i % ranks])) for i in range(60 - start)]
    assert alone[start:] == together
    assert alone != list(map(key, islice(Stream(dataset, capacity=100, seed=2).windows(), 60)))


def test_a_window_holds_its_samples(dataset: Dataset) -> None:
    window = Stream(dataset, capacity=120).window(2)
    found = 0
    for b, number in enumerate(window.samples):
        tokens = window.tokens[window.starts[b] : window.starts[b + 1]]
        candidates = [s for s in dataset[int(number)].sequences if s.ids.tolist() == tokens.tolist()]
        assert candidates
        found += len(candidates[0].ids)
        assert window.learned[window.starts[b] : window.starts[b + 1]].tolist() == candidates[0].learned.tolist()
        good = dataset[int(number)].good
        assert window.good[b] == (-1 if good is None else good)
        part = window.segments == b
        assert window.positions[part].tolist() == list(range(len(tokens)))
    assert found == len(window.tokens)


def test_packed_sequences_do_not_see_each_other(dataset: Dataset, tiny_files: Files) -> None:
    """The logits of a packed window are those of each sequence alone; read as one sequence they are others."""
    window = Stream(dataset, capacity=120).window(0)
    batch = window.batch()
    assert len(batch.starts) > 3
    weights = random_weights(tiny_files.config, 0, scale=0.3)  # large enough for attention to matter
    executor = ReferenceExecutor(tiny_files.config, weights, context=128, n_blocks=120 // KV_BLOCK + 8)
    packed = executor.step(batch).copy()
    assert window.labels.tolist() == window.tokens[batch.rows + 1].tolist()
    alone, labels = [], []
    for number in dict.fromkeys(window.samples.tolist()):
        for part in dataset[number].sequences:
            logits = executor.step(Batch.single(part.ids))
            alone.append(logits[np.flatnonzero(part.learned) - 1].copy())
            labels += part.ids[part.learned].tolist()
    assert labels == window.labels.tolist()
    # float32 products of a few rows and of many, summed in another order; the largest logit is about 10
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-4)
    leaked = executor.step(Batch.single(window.tokens))[batch.rows]
    later = batch.rows >= batch.starts[1]
    assert np.abs(leaked - packed)[later].max(axis=1).min() > 1e-2


def test_a_sample_that_fits_no_window_is_refused(dataset: Dataset) -> None:
    longest = int(dataset.lengths.argmax())
    with pytest.raises(ContextError, match=f"sample {longest} has {dataset.lengths[longest]} tokens, a window 30"):
        Stream(dataset, capacity=30)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 30), capacity=st.integers(80, 200), index=st.integers(0, 200))
def test_any_window_of_any_data_set(
    n: int, capacity: int, index: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stream = Stream(Dataset.write(tmp_path_factory.mktemp("any") / "set", samples(n)), capacity=capacity)
    epoch, place = stream.locate(index)
    windows = sum(len(stream.epoch(e)) for e in range(epoch))
    assert windows + place == index
    assert place < len(stream.epoch(epoch))
    assert set(stream.window(index).samples.tolist()) == set(stream.epoch(epoch)[place].tolist())
