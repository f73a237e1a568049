"""`dapji show`: what a model is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dapji.weights.checkpoint import Checkpoint
    from dapji.weights.store import Record
    from dapji.weights.summary import Summary

MAX_SHOWN = 8
"""Elements of an array that --config prints."""


@click.command()
@click.argument("model")
@click.option("--template", is_flag=True, help="Print the chat template alone.")
@click.option("--tensors", is_flag=True, help="List the tensors: type, shape, bytes, name.")
@click.option("--config", is_flag=True, help="Print config.json, or a GGUF file's keys, as JSON; long arrays cut.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --tensors and --config also these.")
def command(model: str, template: bool, tensors: bool, config: bool, as_json: bool) -> None:
    """Print what MODEL is: architecture, size, quantisation, context, tokenizer, template, licence.

    MODEL is an installed model (`dapji list`), a GGUF file, or a folder with config.json and
    safetensors. Only headers and small files are read, so this is quick whatever the model's size,
    and works for models that Dapji cannot run.

    \b
    Examples:
      dapji show smollm2-135m
      dapji show ./model.gguf --tensors
      dapji show smollm2-135m --template > template.jinja
      dapji show smollm2-135m --json | jq .context

    Exit codes: 0 shown, 1 no such model, not readable or (--template) without a template, 2 wrong
    usage.
    """
    from dapji.errors import FormatError, UsageError
    from dapji.weights import store
    from dapji.weights.checkpoint import open_checkpoint
    from dapji.weights.summary import summarize

    if template and (tensors or config or as_json):
        raise UsageError("--template prints the template alone; leave out the other options")
    checkpoint = open_checkpoint(store.resolve(model))
    if config and not as_json:
        click.echo(json.dumps(_config(checkpoint), indent=2, ensure_ascii=False))
        if not tensors:
            return
    summary = summarize(checkpoint)
    if template:
        if not summary.templates:
            raise FormatError(
                summary.tokenizer_problem or f"{model} has no chat template",
                hint=None if summary.tokenizer_problem else "it is a base model; `dapji run` completes text",
            )
        click.echo(summary.templates.get("default") or next(iter(summary.templates.values())))
        return
    record = store.record_of(checkpoint.path)
    if as_json:
        shown = _as_json(summary, checkpoint, record)
        if tensors:
            shown["tensors"] = _tensors(checkpoint)
        if config:
            shown["config"] = _config(checkpoint)
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    if not tensors and not config:
        for label, text in _lines(summary, checkpoint, record):
            click.echo(f"{click.style(label.ljust(13), bold=True)} {text}")
    if tensors:
        for tensor in _tensors(checkpoint):
            shape = " x ".join(map(str, tensor["shape"]))
            click.echo(f"{tensor['type']:>6}  {shape:>16}  {tensor['bytes']:>12}  {tensor['name']}")


def _lines(summary: Summary, checkpoint: Checkpoint, record: Record | None) -> list[tuple[str, str]]:
    from dapji.weights.sources_base import human_size

    sizes = dict(summary.sizes)
    vocabulary = sizes.pop("vocab_size", None)
    parts = ", ".join(f"{name} {100 * size / summary.size:.1f} %" for name, size in summary.formats.items())
    context = "unknown" if summary.context is None else f"{summary.context} tokens"
    if "theta" in summary.rope:
        context += f", rope theta {summary.rope['theta']:g}"
    scaling = summary.rope.get("scaling")
    tokenizer = summary.tokenizer or "none"
    if summary.tokenizer_problem:
        tokenizer += f": {summary.tokenizer_problem}"
    elif vocabulary is not None:
        tokenizer += f", {vocabulary} tokens"
    names = ", ".join(name for name in summary.templates if name != "default")
    lines = [
        ("name", summary.name),
        ("architecture", summary.architecture or "unknown"),
        ("sizes", ", ".join(f"{name} {size}" for name, size in sizes.items())),
        ("parameters", f"{summary.parameters:,}"),
        ("quantisation", f"{summary.bits_per_weight:.2f} bits per weight: {parts}"),
        ("weights", human_size(summary.size)),
        ("context", context),
        ("rope scaling", "none" if not scaling else ", ".join(f"{key} {value}" for key, value in scaling.items())),
        ("tokenizer", tokenizer),
        ("stop tokens", ", ".join(f"{text} ({i})" for text, i in summary.stop_tokens.items()) or "unknown"),
        ("template", ("yes" + (f", also: {names}" if names else "")) if summary.templates else "no"),
        ("licence", _licence(summary, record) or "unknown"),
    ]
    if record is not None:
        lines.append(("source", record.source))
    return [*lines, ("path", str(checkpoint.path))]


def _licence(summary: Summary, record: Record | None) -> str | None:
    return (record.licence if record else None) or summary.licence


def _as_json(summary: Summary, checkpoint: Checkpoint, record: Record | None) -> dict[str, Any]:
    return asdict(summary) | {
        "bits_per_weight": summary.bits_per_weight,
        "licence": _licence(summary, record),
        "source": record.source if record else None,
        "path": str(checkpoint.path),
    }


def _tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {"name": name, "type": tensor.type, "shape": list(tensor.shape), "bytes": len(tensor.data)}
        for name, tensor in checkpoint.tensors.stored.items()
    ]


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.kind == "huggingface":
        return dict(checkpoint.metadata)
    shown: dict[str, Any] = {}
    for key, value in checkpoint.metadata.items():
        listed = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(listed, list) and len(listed) > MAX_SHOWN:
            listed = [*listed[:MAX_SHOWN], f"… {len(listed)} in all"]
        shown[key] = listed
    return shown
