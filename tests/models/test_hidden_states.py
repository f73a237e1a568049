"""The final norm's output against transformers, on a tiny model of every generation; and that it costs the logits
nothing."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import CASES, DISTINCT, EXECUTORS, TEXT, TOLERANCE, opened, oracle, text, translated

from dapji.models.decoder import hidden_states
from dapji.models.executor import Executor
from dapji.models.torch_executor import load_weights
from dapji.ops.batch import Batch
from dapji.ops.torch import SharedPrefixes, TorchTables, UncachedTorchOps

Floats = NDArray[np.float32]


def oracle_hidden(name: str) -> Floats:
    """[TEXT, D] of the common text."""
    model = deepcopy(oracle(name))  # as in `oracle_logits`
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        states: Floats = model.model(torch.tensor([text()]), use_cache=False).last_hidden_state[0].numpy()
    return states


def stepped(executor: Executor, batch: Batch, rows: list[int]) -> tuple[Floats, Floats]:
    """Hidden states of these rows, and the batch's logits."""
    hidden = np.empty((len(rows), executor.config.dim), dtype=np.float32)
    logits = executor.step(replace(batch, hidden_rows=np.array(rows, dtype=np.int32)), hidden)
    return hidden, logits


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_hidden_states_are_those_of_transformers(name: str, kind: str) -> None:
    config, tensors = translated(name)
    executor = opened(kind, config, tensors, context=TEXT, kv="f32")
    hidden, _ = stepped(executor, Batch.single(text(), all_rows=False), list(range(TEXT)))
    np.testing.assert_allclose(hidden, oracle_hidden(name), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name, kind in DISTINCT if kind == "torch-cpu"])
def test_a_shared_beginning_is_computed_once(name: str) -> None:
    """As training does: two texts that part beyond every threshold, as each says alone."""
    config, tensors = translated(name)
    weights = load_weights(tensors, device=torch.device("cpu"), dtype=torch.float32)
    tables, common, n = TorchTables(TEXT, torch.device("cpu")), TEXT // 2, TEXT // 2 + 40
    one, other = text(n), [*text(common), *text(40, seed=6)]

    def states(tokens: list[int], lengths: list[int], shared: SharedPrefixes | None = None) -> torch.Tensor:
        rows = torch.arange(len(tokens))
        ops = UncachedTorchOps(torch.tensor(tokens), lengths, tables, hidden_rows=rows, shared=shared)
        return hidden_states(config, weights, ops, lambda index, layer, x: layer(x))

    places = torch.tensor([*range(n), *range(common), *range(n, n + 40)])
    first = torch.tensor([*range(n), *range(n + common, 2 * n)])
    together = states(one + other, [n, n], SharedPrefixes(first, places))
    alone = torch.cat([states(tokens, [n]) for tokens in (one, other)])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "kind"), DISTINCT)
def test_a_step_gives_both_of_different_rows(name: str, kind: str) -> None:
    """Or either alone, the same to the last bit."""
    config, tensors = translated(name)
    executor = opened(kind, config, tensors, context=TEXT, kv="f32")
    batch = Batch.single(text(40))
    chosen = replace(batch, rows=np.array([5, 20, 39], dtype=np.int32))
    none = replace(batch, rows=np.empty(0, dtype=np.int32))
    hidden, logits = stepped(executor, chosen, [0, 20, 38])
    alone, no_logits = stepped(executor, none, [0, 20, 38])
    assert no_logits.shape == (0, config.vocab_size)
    np.testing.assert_array_equal(hidden, alone)
    np.testing.assert_array_equal(logits, executor.step(chosen))
    if kind != "native":  # there the head norms for itself
        weights = {key: tensor.float32() for key, tensor in tensors.items() if key in ("embed", "head")}
        both, _ = stepped(executor, none, [5, 20, 39])
        head = both @ weights["embed" if config.tied_head else "head"].T
        cap = config.logit_softcap
        np.testing.assert_allclose(head if cap is None else cap * np.tanh(head / cap), logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name, kind in DISTINCT if kind == "native"])
def test_native_bits_do_not_depend_on_cuts(name: str) -> None:
    config, tensors = translated(name)
    whole, _ = stepped(opened("native", config, tensors, context=TEXT, threads=1), Batch.single(text()), [*range(TEXT)])
    for threads, cuts in ((2, [0, 1, 17, 64, 65, 200, TEXT]), (3, [0, 127, 129, *range(250, TEXT + 1)])):
        executor = opened("native", config, tensors, context=TEXT, threads=threads)
        pieces = [stepped(executor, Batch.single(text()[a:b], past=a), [*range(b - a)])[0] for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_without_hidden_rows_nothing_is_asked(kind: str) -> None:
    config, tensors = translated("llama-3.2")
    executor = opened(kind, config, tensors, context=TEXT, kv="f32")
    assert len(Batch.single(text(3)).hidden_rows) == 0
    assert executor.step(Batch.single(text(3))).shape == (3, config.vocab_size)
