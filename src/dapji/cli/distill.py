"""`dapji distill`: a teacher's answers to prompts, as examples for another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dapji.cli.options import (
    adapter_option,
    check_new_file,
    context_option,
    executor_options,
    given_sampling,
    kv_memory_option,
    sampling_options,
    speculate_option,
)


@click.command()
@click.argument("teacher")
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Where examples go: a .jsonl.",
)
@click.option("-n", type=click.IntRange(1), default=1, show_default=True, help="Answers to each prompt.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@sampling_options
@kv_memory_option
@adapter_option
@context_option
@executor_options
@speculate_option
def command(teacher: str, prompts: Path, output: Path, n: int, force: bool, kv_memory: float, **values: Any) -> None:
    """Let TEACHER answer the PROMPTS of a file, and write examples from which another model learns.

    TEACHER is a name of `dapji list`, or a path. A row of PROMPTS has `prompt`, a text to go on, or
    `messages`, a conversation to answer, maybe with `tools`. The output has `prompt` and `completion`,
    as `dapji data check` and `dapji tune` read them. Answers that reach --max-tokens (1024 where it is
    not given) are left out and counted. After Ctrl-C the same command goes on.

    Beside the output NAME.dapji.json says who wrote it, and `dapji tune` takes that along.

    A model that has the same tokens as the teacher can also learn the teacher's distributions:
    method.name=distill of `dapji tune`.

    \b
    Examples:
      dapji distill qwen2.5-coder-0.5b prompts.jsonl -o examples.jsonl
      dapji distill ./teacher.gguf prompts.jsonl -o examples.jsonl -n 4 --seed 1 --temperature 0.8
      dapji tune recipe.toml model=smollm2-135m data.train='["examples.jsonl"]'

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (the same command goes on).
    """
    from tqdm import tqdm

    from dapji.cli.pull import TerminalProgress
    from dapji.model import load
    from dapji.proof.lineage import Lineage, data_file, parent, versions, write_lineage
    from dapji.training.answers import write_answers
    from dapji.weights.sources_base import sha256_file

    check_new_file(output, force=force)
    sampling = given_sampling(values)
    own: dict[str, Any] = {name: sampling.pop(name) for name in ("seed", "max_tokens") if name in sampling}
    with (
        load(teacher, kv_memory=round(kv_memory * 1e9), **values) as model,
        tqdm(unit="answer", disable=None, leave=False) as bar,
    ):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = write_answers(model, prompts, output, n=n, sampling=sampling, progress=progress, **own)
    models = [parent("teacher", teacher, TerminalProgress())]
    if values["adapter"] is not None:
        models.append(parent("adapter", str(values["adapter"])))
    write_lineage(
        output,
        Lineage(
            kind="distill",
            parents=tuple(models),
            data=(data_file("prompts", str(prompts), sha256_file(prompts)),),
            settings={"n": n, **own, **sampling},
            outcome={"examples": written.examples, "cut": written.cut},
            versions=versions(),
        ),
    )
    click.echo(f"{written.examples} examples", err=True)
    if written.cut:
        click.echo(f"{written.cut} answers were too long and are left out", err=True)
    click.echo(str(output))
