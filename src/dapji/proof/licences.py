"""The licences of all that a model was made of, and what each asks for: what to look for, no legal advice."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dapji.proof.lineage import DataFile, Lineage, ancestors

_LLAMA = "pass the agreement on, show 'Built with Llama', begin the model's name with Llama, keep to the use policy"
_DUTIES = (
    (r"apache-2\.0", "keep the licence and its notices, say what was changed"),
    (r"mit|isc|bsd-[23]-clause", "keep the copyright notice and the licence"),
    (r"cc0-1\.0|unlicense|pddl", "nothing is asked for"),
    (r"cc-by-\d\.\d|odc-by", "name the authors, say what was changed"),
    (r"cc-by-sa-.*", "name the authors, say what was changed, give adaptations under the same licence"),
    (r"cc-by-nc.*", "no commercial use; name the authors"),
    (r"cc-by-nd-.*", "adaptations are not to be passed on; name the authors"),
    (r"l?gpl-.*", "give the source under the same licence to whoever gets it"),
    (r"agpl-.*", "give the source under the same licence to whoever gets it, or uses it over a network"),
    (r"llama-?[34].*", _LLAMA),
    (r"llama-?2", "pass the agreement on, keep to the use policy"),
    (r"gemma", "pass the terms and their use restrictions on"),
    (r".*rail.*", "pass the use restrictions on"),
)
"""A licence as SPDX or the hub names it, in small letters -> what it asks of whoever passes on what came of it."""


@dataclass(frozen=True, kw_only=True)
class Licence:
    name: str | None
    """In small letters. None: nobody said."""
    of: tuple[str, ...]
    """What is under it."""
    duty: str | None
    """None: not known here."""


def licences(model: str, licence: str | None, lineage: Lineage | None) -> list[Licence]:
    """Of a model and of all that it was made of, each once. licence: the model's own, as its files say."""
    found: list[tuple[str | None, str]] = []
    if licence is not None or lineage is None:  # else its parents' are its own
        found.append((licence, model))
    for each in ancestors(lineage) if lineage is not None else ():
        if isinstance(each, DataFile) or each.licence is not None or each.lineage is None:
            found.append((each.licence, each.title))
    under: dict[str | None, dict[str, None]] = {}
    for name, what in found:
        under.setdefault(name and name.lower(), {})[what] = None
    return [Licence(name=name, of=tuple(of), duty=_duty(name)) for name, of in under.items()]


def _duty(name: str | None) -> str | None:
    if name is None:
        return "find out before you pass it on"
    return next((duty for pattern, duty in _DUTIES if re.fullmatch(pattern, name)), None)
