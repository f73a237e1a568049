"""`Certificate`: what a model is, byte for byte, and how it behaves, to be replayed later. A part of its record.

`certify` makes one, `verification` replays it as a whole, and `check` the cheap part of it, whenever a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from dapji.errors import CertificateError, UsageError
from dapji.files import Files, open_files
from dapji.models.adapter import Adapter
from dapji.models.executor import ExecutorKind
from dapji.proof.behaviour import Behaviour, behaviour_of, quick_differences
from dapji.proof.lineage import Lineage, file_hashes, read_lineage, versions
from dapji.proof.record import read_part
from dapji.proof.replay import ANSWER, NOISE, Passage, Runner, Tolerance, makers
from dapji.tokenizer import Tokenizer
from dapji.weights.adapter_file import CONFIG_NAME, is_adapter
from dapji.weights.checkpoint import read_json
from dapji.weights.sources_base import Progress

_MARGIN = 2.0
"""How much more than was measured is allowed: another version's kernels may sum in another order."""
_PASSAGES = {0: "English", 1: "Korean", 2: "code"}
"""Which of the behaviour's texts are read."""
_ANSWERED = 0
"""Which passage the model goes on with: each token more is a step."""


class Divergence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a model in fewer bits from the one that it was made from."""

    source: str
    kl: float
    """Nats per token."""
    same: float
    """The share of places whose likeliest token is the same."""
    tokens: int


class Certificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    files: dict[str, str]
    """Name -> sha256: all that make the model, or the adapter; its base's are in its lineage."""
    behaviour: Behaviour
    passages: tuple[Passage, ...]
    executor: ExecutorKind
    """What computed the passages."""
    tolerances: dict[ExecutorKind, Tolerance]
    """Of replays, by executor; none where it was not measured."""
    divergence: Divergence | None = None
    versions: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is certified: a model, or an adapter on its base."""

    path: Path
    files: Files
    adapter: Adapter | None
    tokenizer: Tokenizer


def read_certificate(path: Path) -> Certificate | None:
    """Of a model's file or folder, or of an adapter's. Raises FormatError."""
    return read_part(path, "certificate", Certificate)


def open_subject(path: Path, base: str | None, lineage: Lineage | None) -> Subject:
    """base: of an adapter, where it is not what its lineage or adapter_config.json says.

    Raises UsageError where a base is given and not wanted or wanted and not known, and as `open_files` and
    `Files.adapter`.
    """
    if not is_adapter(path):
        if base is not None:
            raise UsageError(f"{path} is a model, not an adapter: it has no base to be computed on")
        files = open_files(path)
        return Subject(path=path, files=files, adapter=None, tokenizer=files.tokenizer())
    named = base or _base_of(path, lineage)
    if named is None:
        raise UsageError(f"{path} does not say what it is an adapter of", hint="--base MODEL")
    files = open_files(named)
    return Subject(path=path, files=files, adapter=files.adapter(path), tokenizer=files.tokenizer())


def _base_of(path: Path, lineage: Lineage | None) -> str | None:
    if lineage is not None:
        return next((each.model for each in lineage.parents if each.role == "base"), None)
    name = read_json(path / CONFIG_NAME).get("base_model_name_or_path") if path.is_dir() else None
    return name if isinstance(name, str) and name else None


def certify(
    path: Path, *, base: str | None = None, divergence: Divergence | None = None, progress: Progress | None = None
) -> Certificate:
    """Of a model or an adapter on disk, to be written with `record.write_parts`. Reads all of its files, and computes
    with it on every executor that is here.

    base: as in `open_subject`, as which it raises. divergence: where the model has fewer bits than what it was made
    from.
    """
    subject = open_subject(path, base, read_lineage(path))
    behaviour = behaviour_of(subject.files, subject.tokenizer)
    prompts = _prompts(subject, behaviour)
    longest = max((len(prompt) for _, _, prompt in prompts), default=0)
    context = min(subject.files.config.max_context, longest + ANSWER)
    (maker, activations), *others = makers(subject.files)
    with Runner(maker, subject.files, subject.adapter, context=context, activations=activations) as runner:
        passages = tuple(
            runner.passage(
                name,
                prompt[:context],
                adapter=adapted,
                answer=min(ANSWER, context - len(prompt)) if i == _ANSWERED else 0,
                vocab_size=subject.tokenizer.vocab_size,
            )
            for i, (name, adapted, prompt) in enumerate(prompts)
        )
    tolerances: dict[ExecutorKind, Tolerance] = {maker: Tolerance(measured=0.0, allowed=NOISE)}
    for kind, activations in others:
        with Runner(kind, subject.files, subject.adapter, context=context, activations=activations) as runner:
            measured = max((runner.divergence(passage)[0] for passage in passages), default=0.0)
        executor = "native" if activations == "q8" else kind
        tolerances[executor] = Tolerance(measured=measured, allowed=_MARGIN * measured + NOISE)
    return Certificate(
        files=file_hashes(path, progress),
        behaviour=behaviour,
        passages=passages,
        executor=maker,
        tolerances=tolerances,
        divergence=divergence,
        versions=versions(),
    )


def _prompts(subject: Subject, behaviour: Behaviour) -> list[tuple[str, bool, tuple[int, ...]]]:
    """What passages begin with: name, whether with an adapter, tokens. One is of an adapter's base, without it; of a
    model that predicts no tokens there are none."""
    tokenizer = subject.tokenizer
    begin = (tokenizer.bos_id,) if tokenizer.add_bos and tokenizer.bos_id is not None else ()
    texts = {name: behaviour.texts[i].ids for i, name in _PASSAGES.items()}
    adapted = subject.adapter is not None
    if subject.files.config.headless:
        return []
    first = behaviour.conversations[0].ids
    prompts = [] if first is None else [("conversation", adapted, first)]
    prompts += [(name, adapted, (*begin, *ids)) for name, ids in texts.items() if ids]
    if adapted:
        name, _, prompt = prompts[0]
        prompts.append((f"{name}, the base alone", False, prompt))
    return prompts or [("the first token", adapted, (0,))]  # of a tokenizer that refuses all these texts


def check(path: Path, files: Files, tokenizer: Tokenizer) -> None:
    """What can be checked of a certificate in no time, whenever a model, or an adapter for it, is loaded: no weights.

    path: of the model or the adapter. files, tokenizer: of the model. Does nothing where there is no certificate.
    Raises CertificateError where the files no longer give what it says, FormatError where it was changed itself.
    """
    certificate = read_certificate(path)
    if certificate is None:
        return
    for name, found in quick_differences(certificate.behaviour, files, tokenizer):
        if found is not None:
            raise CertificateError(
                f"{path} is not what its certificate says: {name}: {found}",
                hint=f"dapji verify {path} tells all that differs; if it is meant, add --certify --force",
            )
