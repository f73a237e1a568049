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
    configs = {name: translated(name)[0] for name in TINY} | {"exaone-3.5": config_from_hf(tiny_exaone.CONFIG)}
    mechanisms: dict[str, dict[str, list[str]]] = {family: {} for family in results}
    for name, config in configs.items():
        mechanisms[benchmark.family_of(name, config)][name] = benchmark.mechanisms(config)
    measured = {
        family: {name: model["mechanisms"] for name, model in models.items()} for family, models in results.items()
    }
    assert measured == mechanisms


def test_the_document_has_these_tables_and_no_figure_beyond_what_tests_allow() -> None:
    results = json.loads(benchmark.DATA.read_text())
    document = benchmark.DOCUMENT.read_text(encoding="utf-8")
    table = report.table(benchmark.HEADER, benchmark.rows(results))
    assert f"<!-- support -->\n{table}\n<!-- /support -->" in document
    table = report.table(benchmark.TINY_HEADER, benchmark.tiny_rows(results))
    assert f"<!-- tiny -->\n{table}\n<!-- /tiny -->" in document
    for models in results.values():
        differences = benchmark.worst(models.values())
        assert differences.pop("gradient", 0) <= 5e-6
        assert differences.pop("llama.cpp", 0) <= 2 * LOGARITHM  # twice for Gemma, as there
        assert differences.keys() == {"reference", "torch", "native"}
        assert max(differences.values()) <= TOLERANCE
