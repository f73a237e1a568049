"""`dapji show`: what a model is, or would be."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapji.cli.console import visible

if TYPE_CHECKING:
    from dapji.weights.checkpoint import Checkpoint
    from dapji.weights.plan import Plan
    from dapji.weights.store import Record
    from dapji.weights.summary import Summary

MAX_SHOWN = 8
"""Elements of an array that --metadata prints."""


@click.command()
@click.argument("model", required=False)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Plan the model that this config.json describes, without its weights.",
)
@click.option("--template", is_flag=True, help="Print the chat template alone.")
@click.option("--tensors", is_flag=True, help="List the tensors: type, shape, bytes, name.")
@click.option("--metadata", is_flag=True, help="Print config.json, or a GGUF file's keys, as JSON; long arrays cut.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --tensors and --metadata also these.")
def command(
    model: str | None, config_file: Path | None, template: bool, tensors: bool, metadata: bool, as_json: bool
) -> None:
    """Print what MODEL is: architecture, size, quantisation, context, tokenizer, template, licence.

    MODEL is an installed model (`dapji list`), a GGUF file, a folder with config.json and
    safetensors, or one with an adapter. Only headers and small files are read, so this is quick
    whatever the model's size, and works for models that Dapji cannot run. Of what Dapji made, also
    what it was made of, and the licences of all that.

    With --config instead of MODEL, print what a model would take before it is downloaded, however
    large: its layers, its parameters and how many of them a token needs, the size of its weights in
    several types and what a token reads of them, and the cache for keys and values.

    \b
    Examples:
      dapji show smollm2-135m
      dapji show ./model.gguf --tensors
      dapji show smollm2-135m --template > template.jinja
      dapji show smollm2-135m --json | jq .context
      dapji show --config DeepSeek-V3/config.json

    Exit codes: 0 shown, 1 no such model, not readable or (--template) without a template, 2 wrong
    usage.
    """
    from dapji.errors import FormatError, UsageError
    from dapji.weights import store
    from dapji.weights.adapter_file import is_adapter
    from dapji.weights.checkpoint import open_checkpoint
    from dapji.weights.summary import summarize

    if config_file is not None:
        if model is not None or template or tensors or metadata:
            raise UsageError("--config plans a model without weights; of the rest it goes with --json only")
        _show_plan(config_file, as_json)
        return
    if model is None:
        raise UsageError("neither a MODEL nor --config", hint="dapji show --help has examples")
    if template and (tensors or metadata or as_json):
        raise UsageError("--template prints the template alone; leave out the other options")
    path = store.resolve(model)
    if path.is_dir() and is_adapter(path):
        if template or tensors or metadata:
            raise UsageError(f"{path} is an adapter: of the options only --json goes with it")
        _show_adapter(path, as_json)
        return
    checkpoint = open_checkpoint(path)
    if metadata and not as_json:
        click.echo(json.dumps(_metadata(checkpoint), indent=2, ensure_ascii=False))
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
        if metadata:
            shown["metadata"] = _metadata(checkpoint)
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    if not tensors and not metadata:
        _print([*_lines(summary, checkpoint, record), *_origin(checkpoint.path, _licence(summary, record))])
    if tensors:
        for tensor in _tensors(checkpoint):
            shape = " x ".join(map(str, tensor["shape"]))
            click.echo(f"{tensor['type']:>6}  {shape:>16}  {tensor['bytes']:>12}  {tensor['name']}")


def _print(lines: list[tuple[str, str]]) -> None:
    for label, text in lines:
        click.echo(f"{click.style(label.ljust(13), bold=True)} {text}")


def _show_plan(path: Path, as_json: bool) -> None:
    from dapji.models.families import config_from_hf
    from dapji.weights.checkpoint import read_json
    from dapji.weights.plan import plan

    planned = plan(config_from_hf(read_json(path)))
    if as_json:
        click.echo(json.dumps(asdict(planned), indent=2))
    else:
        _print(_plan_lines(planned))


def _plan_lines(planned: Plan) -> list[tuple[str, str]]:
    from dapji.weights.sources_base import human_size

    layers = [f"{n} layer{'s' if n > 1 else ''}: {what}" for what, n in planned.layers.items()]
    beside = f" and {planned.predictor_parameters:,} of predictors" if planned.predictors else ""
    return [
        ("family", planned.family),
        *zip(("layers", *[""] * (len(layers) - 1)), layers, strict=True),
        ("parameters", f"{planned.parameters:,}{beside}"),
        ("per token", f"{planned.active_parameters:,} parameters"),
        ("context", f"{planned.context} tokens"),
        *(
            (scheme, f"{human_size(size.bytes)} of weights, of which a token reads {human_size(size.read_per_token)}")
            for scheme, size in planned.weights.items()
        ),
        *(
            (
                f"cache {kv}",
                f"{size.per_token:,} bytes per token, {human_size(size.whole_context)} at full length",
            )
            for kv, size in planned.cache.items()
        ),
    ]


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


def _origin(path: Path, licence: str | None) -> list[tuple[str, str]]:
    """What licences ask for, and what it was made of."""
    from dapji.cli import lineage
    from dapji.proof.licences import licences
    from dapji.proof.lineage import read_lineage

    found = read_lineage(path)
    asked = list(lineage.duties(licences(path.name, licence, found)))
    made = [] if found is None else [lineage.how(found), *lineage.tree(found)]
    columns = (("duties", asked), ("made by", made))
    return [(name if i == 0 else "", line) for name, lines in columns for i, line in enumerate(lines)]


def _show_adapter(path: Path, as_json: bool) -> None:
    from dapji.proof.lineage import model_licence
    from dapji.weights.adapter_file import CONFIG_NAME
    from dapji.weights.checkpoint import read_json

    settings, licence = read_json(path / CONFIG_NAME), model_licence(path)
    if as_json:
        shown = {"adapter": settings, "licence": licence, "lineage": _lineage(path), "path": str(path)}
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    targets = settings.get("target_modules")
    lines = [
        ("name", path.name),
        ("adapter of", str(settings.get("base_model_name_or_path") or "unknown")),
        ("rank", f"{settings.get('r', 'unknown')}, alpha {settings.get('lora_alpha', 'unknown')}"),
        ("licence", licence or "unknown"),
        ("targets", ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets)),
    ]
    _print([(label, visible(text)) for label, text in lines])
    _print([*_origin(path, licence), ("path", str(path))])


def _lineage(path: Path) -> Any:
    import msgspec

    from dapji.proof.lineage import read_lineage

    return msgspec.to_builtins(read_lineage(path))


def _licence(summary: Summary, record: Record | None) -> str | None:
    return (record.licence if record else None) or summary.licence


def _as_json(summary: Summary, checkpoint: Checkpoint, record: Record | None) -> dict[str, Any]:
    return asdict(summary) | {
        "bits_per_weight": summary.bits_per_weight,
        "licence": _licence(summary, record),
        "source": record.source if record else None,
        "lineage": _lineage(checkpoint.path),
        "path": str(checkpoint.path),
    }


def _tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {"name": name, "type": tensor.type, "shape": list(tensor.shape), "bytes": len(tensor.data)}
        for name, tensor in checkpoint.tensors.stored.items()
    ]


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.kind == "huggingface":
        return dict(checkpoint.metadata)
    shown: dict[str, Any] = {}
    for key, value in checkpoint.metadata.items():
        listed = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(listed, list) and len(listed) > MAX_SHOWN:
            listed = [*listed[:MAX_SHOWN], f"… {len(listed)} in all"]
        shown[key] = listed
    return shown
