"""Requests with adapters: each as alone, whatever runs beside it; and the cache never lends one's blocks to another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine_models import tiny_config, tiny_executor

from dapji.engine import Engine, Output, Request, Sampling
from dapji.errors import RequestError, UsageError
from dapji.models.adapter import Adapter, adaptable
from dapji.models.executor import ExecutorKind
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor

PROMPT = np.random.default_rng(3).integers(0, 64, 70).tolist()


def adapter(seed: int) -> Adapter:
    random = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> Tensor:
        return Tensor.from_float32(f"{seed}", 0.2 * random.standard_normal((rows, cols), dtype=np.float32))

    return Adapter(
        pairs={
            name: LowRank(a=matrix(4, cols), b=matrix(rows, 4), scale=0.5)
            for name, (rows, cols) in adaptable(tiny_config()).items()
        }
    )


def request(number: int, seed: int = 1) -> Request:
    sampling = Sampling(temperature=0.9, seed=seed)
    return Request(prompt=PROMPT, max_tokens=30, sampling=sampling, adapter=number, logprobs=1)


def told(outputs: list[Output]) -> list[tuple[int, float]]:
    return [(output.token, output.logprobs.chosen) for output in outputs if output.logprobs is not None]


@pytest.mark.parametrize("kind", ["reference", "native"])
@pytest.mark.parametrize("speculate", [True, False])
def test_every_request_is_as_alone(kind: ExecutorKind, speculate: bool) -> None:
    """Two of each of the base and two adapters, with one prompt: more sequences than there are blocks for."""
    numbers = [0, 1, 2]
    alone = []
    for number in numbers:
        with Engine(tiny_executor(kind), speculate=speculate) as engine:
            assert [engine.add_adapter(adapter(seed)) for seed in (1, 2)] == [1, 2]
            alone.append([told(list(engine.generate(request(number, seed)))) for seed in (1, 2)])
    assert len({tuple(token for token, _ in one) for own in alone for one in own}) == 6, "all differ"
    with Engine(tiny_executor(kind), speculate=speculate, mixed_prompt_tokens=9) as engine:
        for seed in (1, 2):
            engine.add_adapter(adapter(seed))
        streams = {(number, seed): engine.generate(request(number, seed)) for seed in (1, 2) for number in numbers}
        for (number, seed), stream in streams.items():
            expected, got = alone[number][seed - 1], told(list(stream))
            assert [token for token, _ in got] == [token for token, _ in expected]
            # the reference's last bit depends on the shape of a step
            tolerance = 0 if kind == "native" else 1e-4
            np.testing.assert_allclose([p for _, p in got], [p for _, p in expected], rtol=0, atol=tolerance)


def test_the_cache_keeps_adapters_apart() -> None:
    with Engine(tiny_executor("native", n_blocks=64)) as engine:
        one, two = engine.add_adapter(adapter(1)), engine.add_adapter(adapter(2))
        cached = []
        for number in (0, one, two, 0, one, two):
            *_, last = engine.generate(request(number))
            assert last.finish is not None
            cached.append(last.finish.usage.cached)
        assert cached == [0, 0, 0, 69, 69, 69]
        engine.remove_adapter(one)
        again = engine.add_adapter(adapter(1))
        *_, last = engine.generate(request(again))
        assert last.finish is not None
        assert last.finish.usage.cached == 0, "a number is never used again"


def test_texts_are_scored_with_an_adapter() -> None:
    with Engine(tiny_executor("native")) as engine:
        number = engine.add_adapter(adapter(1))
        base, scored = engine.score(PROMPT), engine.score(PROMPT, adapter=number)
        assert np.abs(base.chosen - scored.chosen).max() > 0.01
        np.testing.assert_array_equal(engine.score(PROMPT).chosen, base.chosen)
        np.testing.assert_array_equal(engine.score(PROMPT, adapter=number).chosen, scored.chosen)


def test_texts_are_embedded_with_an_adapter() -> None:
    with Engine(tiny_executor("native")) as engine:
        number = engine.add_adapter(adapter(1))
        base = engine.embed([PROMPT, PROMPT[:9]], pooling="mean")
        stream = engine.generate(request(0))
        own = engine.embed([PROMPT, PROMPT[:9]], pooling="mean", adapter=number)
        stream.close()
        assert np.abs(base - own).max() > 0.01
        np.testing.assert_array_equal(engine.embed([PROMPT[:9]], pooling="mean", adapter=number)[0], own[1])
        np.testing.assert_array_equal(engine.embed([PROMPT[:9]], pooling="mean")[0], base[1])


def test_an_adapter_in_use_stays() -> None:
    with Engine(tiny_executor("reference")) as engine:
        number = engine.add_adapter(adapter(1))
        stream = engine.generate(replace(request(number), max_tokens=400))  # still runs for a tenth of a second
        next(stream)
        with pytest.raises(UsageError, match="1 requests use the adapter 1"):
            engine.remove_adapter(number)
        stream.close()
        engine.remove_adapter(number)
        with pytest.raises(UsageError, match="there is no adapter 1"):
            engine.remove_adapter(number)
        with pytest.raises(RequestError, match="there is no adapter 1"):
            engine.generate(request(number))
        assert len(list(engine.generate(request(0)))) == 30
