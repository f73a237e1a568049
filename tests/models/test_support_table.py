"""The table of families in docs/families.md is what the families and the measured figures say."""

from __future__ import annotations

import json

import tiny_exaone
from test_llama_cpp import LOGARITHM
from tiny_models import TINY, TOLERANCE, translated

import families as benchmark
import report
from dapji.models.families import FAMILIES, config_from_hf


def test_every_family_is_in_the_table_with_its_mechanisms() -> None:
    results = json.loads(benchmark.DATA.read_text())
    assert results.keys() == {family.name for family in FAMILIES}
    mechanisms: dict[str, list[str]] = {name: [] for name in results}
    configs = {name: translated(name)[0] for name in TINY} | {"exaone": config_from_hf(tiny_exaone.CONFIG)}
    for name, config in configs.items():
        own = mechanisms[benchmark.family_of(name, config)]
        own += [word for word in benchmark.mechanisms(config) if word not in own]
    assert {name: measured["mechanisms"] for name, measured in results.items()} == mechanisms


def test_the_document_has_this_table_and_no_figure_beyond_what_tests_allow() -> None:
    results = json.loads(benchmark.DATA.read_text())
    table = report.table(benchmark.HEADER, benchmark.rows(results))
    assert f"<!-- support -->\n{table}\n<!-- /support -->" in benchmark.DOCUMENT.read_text(encoding="utf-8")
    for measured in results.values():
        differences = dict(measured["difference"])
        assert differences.pop("llama.cpp", 0) <= 2 * LOGARITHM  # twice for Gemma, as there
        assert differences.keys() == {"reference", "torch", "native"}
        assert max(differences.values()) <= TOLERANCE
