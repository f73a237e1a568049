"""`Certificate`: what a model is, byte for byte, and how it behaves, to be replayed later. A part of its record.

`certify` makes one, `verification` replays it as a whole, and `check` the cheap part of it, whenever a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from dapji.errors import CertificateError, ConfigError, ModelNotFound, UsageError
from dapji.files import Files, open_files
from dapji.models.adapter import Adapter
from dapji.models.executor import ExecutorKind
from dapji.ops.reference import Activations
from dapji.proof.behaviour import Behaviour, behaviour_of, quick_differences, token_differences
from dapji.proof.lineage import FileName, Lineage, file_hashes, read_lineage, versions
from dapji.proof.record import read_part, write_parts
from dapji.proof.replay import ANSWER, NOISE, Passage, Runner, Tolerance, makers
from dapji.tokenizer import Tokenizer
from dapji.weights import store
from dapji.weights.adapter_file import base_of, is_adapter
from dapji.weights.sources_base import Progress, Silent

_MARGIN = 2.0
"""How much more than was measured is allowed: another version's kernels may sum in another order."""
_PASSAGES = ("English", "Korean", "code")
"""Which of the behaviour's texts are read."""
_ANSWERED = 0
"""Which passage the model goes on with: each token more is a step."""


class Divergence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a model in fewer bits from the one that it was made from, on the passages."""

    source: str
    """Name or path, as it was given."""
    kl: float
    """KL(source || model) over the whole vocabulary, nats per token."""
    same: float
    """The share of places whose likeliest token is the same."""
    tokens: int


class Certificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    files: dict[FileName, str]
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
    bases = [] if lineage is None else [each.model for each in lineage.parents if each.role == "base"]
    named = base or next(iter(bases), None) or base_of(path)
    if named is None:
        raise UsageError(f"{path} does not say what it is an adapter of", hint="--base MODEL")
    try:
        files = open_files(named)
    except ModelNotFound as error:
        raise ModelNotFound(f"its base {named} is not here", hint="--base MODEL says where it lies") from error
    return Subject(path=path, files=files, adapter=files.adapter(path), tokenizer=files.tokenizer())


def certify(
    path: Path,
    *,
    base: str | None = None,
    lineage: Lineage | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Of a model or an adapter on disk: reads all of its files, and computes with it on every executor that is here.

    base: as in `open_subject`, as which it raises. lineage: where it is not written yet. Where it says that the model
    is another in fewer bits, which is at hand, the two are compared. Write what this gives with `record.write_parts`.
    """
    lineage = lineage or read_lineage(path)
    subject = open_subject(path, base, lineage)
    source = _source_of(lineage, progress)
    behaviour = behaviour_of(subject.files, subject.tokenizer)
    prompts = _prompts(subject, behaviour)
    (maker, activations), *others = makers(subject.files)
    n_runs = len(prompts) * (1 + len(others) + (source is not None))
    nbytes = subject.files.checkpoint.nbytes
    with (progress or Silent()).bar(f"certifying {path.name}", n_runs * nbytes) as advance:
        passages = tuple(_passages(subject, prompts, maker, activations, lambda: advance(nbytes)))
        tolerances: dict[ExecutorKind, Tolerance] = {maker: Tolerance(measured=0.0, allowed=NOISE)}
        for kind, activations in others:
            try:
                measured = list(_replayed(subject, passages, kind, activations, lambda: advance(nbytes)))
            except ConfigError:  # an executor that cannot run this model has no tolerance
                continue
            executor = "native" if activations == "q8" else kind
            largest = max(measured, default=0.0)
            tolerances[executor] = Tolerance(measured=largest, allowed=_MARGIN * largest + NOISE)
        divergence = None
        if source is not None and passages:
            divergence = _divergence(source, subject, passages, maker)
            advance(len(passages) * nbytes)
    return Certificate(
        files=file_hashes(path, progress),
        behaviour=behaviour,
        passages=passages,
        executor=maker,
        tolerances=tolerances,
        divergence=divergence,
        versions=versions(),
    )


def write_proof(path: Path, lineage: Lineage, progress: Progress | None = None) -> None:
    """Lineage and certificate of what was made just now, at once. Raises as `certify`."""
    write_parts(path, lineage=lineage, certificate=certify(path, lineage=lineage, progress=progress))


def _source_of(lineage: Lineage | None, progress: Progress | None) -> str | None:
    """What a model has in fewer bits, where that is at hand and is still what it was."""
    if lineage is None or lineage.kind != "quantize":
        return None
    for each in lineage.parents:
        with suppress(ModelNotFound):
            if each.role == "source" and file_hashes(store.resolve(each.model), progress) == each.files:
                return each.model
    return None


def _passages(
    subject: Subject,
    prompts: Sequence[tuple[str, bool, tuple[int, ...]]],
    kind: ExecutorKind,
    activations: Activations,
    done: Callable[[], object],
) -> Iterator[Passage]:
    """prompts: as `_prompts`."""
    longest = max((len(prompt) for _, _, prompt in prompts), default=0)
    context = min(subject.files.config.max_context, longest + ANSWER)
    with Runner(kind, subject.files, subject.adapter, context=context, activations=activations) as runner:
        for i, (name, adapted, prompt) in enumerate(prompts):
            yield runner.passage(
                name,
                prompt[:context],
                adapter=adapted,
                answer=min(ANSWER, max(0, context - len(prompt))) if i == _ANSWERED else 0,
                vocab_size=subject.tokenizer.vocab_size,
            )
            done()


def _replayed(
    subject: Subject,
    passages: Sequence[Passage],
    kind: ExecutorKind,
    activations: Activations,
    done: Callable[[], object],
) -> Iterator[float]:
    """The divergence of each passage."""
    context = max((len(passage.tokens) for passage in passages), default=1)
    with Runner(kind, subject.files, subject.adapter, context=context, activations=activations) as runner:
        for passage in passages:
            yield runner.divergence(passage)[0]
            done()


def _divergence(source: str, subject: Subject, passages: Sequence[Passage], kind: ExecutorKind) -> Divergence:
    """Means over all places of the passages."""
    texts = [passage.tokens for passage in passages]
    context = max(map(len, texts))
    with Runner(kind, open_files(source), None, context=context) as runner:
        before = [runner.log_probs(tokens, adapter=False).astype(np.float32) for tokens in texts]  # [n, V] each
    kl, same, places = 0.0, 0, sum(map(len, texts))
    with Runner(kind, subject.files, None, context=context) as runner:
        for p, tokens in zip(before, texts, strict=True):
            q = runner.log_probs(tokens, adapter=False)
            kl += float((np.exp(p) * (p - q)).sum())
            same += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
    return Divergence(source=source, kl=kl / places, same=same / places, tokens=places)


def _prompts(subject: Subject, behaviour: Behaviour) -> list[tuple[str, bool, tuple[int, ...]]]:
    """What passages begin with: name, whether with an adapter, tokens. One is of an adapter's base, without it; of a
    model that predicts no tokens there are none."""
    tokenizer = subject.tokenizer
    begin = (tokenizer.bos_id,) if tokenizer.add_bos and tokenizer.bos_id is not None else ()
    adapted = subject.adapter is not None
    if subject.files.config.headless:
        return []
    first = behaviour.conversations[0].ids
    prompts = [] if first is None else [("conversation", adapted, first)]
    prompts += [
        (each.name, adapted, (*begin, *each.ids)) for each in behaviour.texts if each.ids and each.name in _PASSAGES
    ]
    if adapted:
        name, _, prompt = prompts[0]
        prompts.append((f"{name}, the base alone", False, prompt))
    return prompts or [("the first token", adapted, (0,))]  # of a tokenizer that refuses all these texts


def check(path: Path, tokenizer: Tokenizer, files: Files | None) -> None:
    """What can be checked of a certificate in no time, whenever a model or an adapter is loaded: no weights.

    path, tokenizer: of the model. files: of the model; None: `path` is an adapter for it. An adapter may be put on its
    base in another format or in fewer bits, which has other files: so its base must give the same tokens, no more.
    Does nothing where there is no certificate. Raises CertificateError where something is not what it says,
    FormatError where it was changed itself.
    """
    certificate = read_certificate(path)
    if certificate is None:
        return
    if files is None:
        problem = f"the adapter {path} was made for other tokens than this model has"
        compared = token_differences(certificate.behaviour, tokenizer)
    else:
        problem = f"{path} is not what its certificate says"
        compared = quick_differences(certificate.behaviour, files, tokenizer)
    for name, found in compared:
        if found is not None:
            raise CertificateError(
                f"{problem}: {name}: {found}",
                hint=f"dapji verify {path} tells all that differs; if it is meant, add --certify --force",
            )
