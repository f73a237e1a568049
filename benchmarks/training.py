"""Training beside transformers and PEFT: learned tokens per second, and memory, of the same model on the same data.

    python benchmarks/training.py --examples alpaca.json --text book.txt     smollm2-135m, four cases
    python benchmarks/training.py … --cases "adapter, examples" --steps 20
    python benchmarks/training.py --draw                                     the table, from the results

Both train the same float32 weights (transformers' folder is written from the GGUF file) with AdamW, all of them or an
adapter of rank 16 on every matrix of the layers. "examples" are conversations: here packed into windows, there eight
at a time, padded to the longest, as transformers' collator does. "text" is a text in sequences of 512 tokens, two at a
time, all learned: nothing is padded. Each trains in a process of its own, which waits while the other takes a step;
medians of the steps are compared. On a machine that others use too, --threads 1 and the processor's time tell more than
the wall's: threads wait for each other, and those of the two wait differently. Results are kept in
benchmarks/data/training.json, and written into docs/training.md from there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import report
from dapji.training.data import Dataset, Encoder, Reader, Stream, prepare
from dapji.training.data.encoding import Sample, Sequence

DATA = report.ROOT / "benchmarks" / "data" / "training.json"
DOCUMENT = report.ROOT / "docs" / "training.md"
CASES = ("adapter, examples", "all weights, examples", "adapter, text", "all weights, text")
WINDOW = 1024
EXAMPLES = 8
"""At a time in transformers: about as many as a window holds."""
LENGTH = 512
RANK = 16
RATE = 1e-5

Step = tuple[int, float, float, int, float]
"""Learned tokens, seconds of the wall and of the processor, peak memory, loss."""


def text_samples(path: Path, tokenizer: Any) -> Iterator[Sample]:
    ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8")[:400_000]), dtype=np.int32)
    for at in range(0, len(ids) - LENGTH, LENGTH):
        learned = np.ones(LENGTH, dtype=np.bool_)
        learned[0] = False
        yield Sample(sequences=(Sequence(ids=ids[at : at + LENGTH], learned=learned),))


def ours(pipe: Connection, name: str, adapter: bool, data: Path, steps: int) -> None:
    """Takes a step each time that it is asked, and sends a `Step`."""
    import torch

    from dapji.files import open_files
    from dapji.models.torch_executor import load_weights
    from dapji.training.checkpoints import Checkpoints
    from dapji.training.network import Network
    from dapji.training.settings import LoraSettings, OptimizerSettings, RunSettings
    from dapji.training.supervised import Supervised
    from dapji.training.trainer import Trainer, make_optimizer

    files = open_files(name)
    weights = load_weights(files.tensors, device=torch.device("cpu"), dtype=torch.float32)
    network = Network(files.config, weights, context=WINDOW, lora=LoraSettings(rank=RANK) if adapter else None)
    settings = OptimizerSettings(learning_rate=RATE)
    optimizer = make_optimizer(network, settings)

    used = 0.0

    def told(metrics: Any) -> None:
        nonlocal used
        seconds = metrics["seconds"], time.process_time() - used
        pipe.send((metrics["trained_tokens"], *seconds, metrics["memory"], metrics["loss"]))
        pipe.recv()
        used = time.process_time()

    pipe.send(None)
    pipe.recv()
    used = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            network,
            Supervised(),
            Stream(Dataset(data), capacity=WINDOW),
            windows=steps,
            optimizer=settings,
            run=RunSettings(batch=1, save_every=10 * steps),
            seed=0,
            checkpoints=Checkpoints(Path(folder), network, optimizer),
            torch_optimizer=optimizer,
            report=told,
        ).train()


def theirs(pipe: Connection, folder: str, adapter: bool, data: Path, steps: int) -> None:
    """The same by transformers and PEFT."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from dapji.training.trainer import peak_memory

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        targets = "all-linear"
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    dataset = Dataset(data)
    order = np.random.default_rng(0).permutation(len(dataset))
    at_a_time = EXAMPLES if dataset.lengths.max() > dataset.lengths.min() else WINDOW // LENGTH
    pipe.send(None)
    pipe.recv()
    for step in range(steps):
        started, used = time.perf_counter(), time.process_time()
        places = np.arange(step * at_a_time, (step + 1) * at_a_time) % len(order)
        sequences = [dataset[int(i)].sequences[0] for i in order[places]]
        longest = max(len(sequence.ids) for sequence in sequences)
        tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
        for row, sequence in enumerate(sequences):
            n = len(sequence.ids)
            tokens[row, :n] = torch.tensor(sequence.ids)
            mask[row, :n] = 1
            labels[row, :n] = torch.tensor(np.where(sequence.learned, sequence.ids, -100))
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count = sum(int(sequence.learned.sum()) for sequence in sequences)
        seconds = time.perf_counter() - started, time.process_time() - used
        pipe.send((count, *seconds, peak_memory(torch.device("cpu")), loss.item()))
        pipe.recv()


def measure(arguments: argparse.Namespace, results: dict[str, Any]) -> Iterator[None]:
    from dapji.evaluation.machine import describe_machine
    from dapji.files import open_files
    from dapji.weights.convert import write_folder

    files = open_files(arguments.model)
    tokenizer = files.tokenizer()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the processes that train
    results |= {
        "machine": describe_machine().processor,
        "threads": arguments.threads or os.cpu_count(),
        "model": arguments.model,
    }
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(files.checkpoint, folder / "model", "F32")
        prepare([Reader(arguments.examples, Encoder(tokenizer, max_length=WINDOW))], folder / "examples")
        Dataset.write(folder / "text", text_samples(arguments.text, tokenizer))
        for case in arguments.cases or CASES:
            adapter, data = case.startswith("adapter"), folder / case.split(", ")[1]
            pipes = {}
            for name, work, model in (("dapji", ours, arguments.model), ("peer", theirs, str(folder / "model"))):
                here, there = context.Pipe()
                job = (there, model, adapter, data, arguments.steps + 1)
                context.Process(target=work, args=job, daemon=True).start()
                pipes[name] = here
            for pipe in pipes.values():
                pipe.recv()
            steps: dict[str, list[Step]] = {name: [] for name in pipes}
            for _ in range(arguments.steps + 1):
                for name, pipe in pipes.items():
                    pipe.send(None)
                    steps[name].append(pipe.recv())
            for pipe in pipes.values():
                pipe.send(None)
            results.setdefault("cases", {})[case] = {name: summary(taken[1:]) for name, taken in steps.items()}
            print(case, results["cases"][case], flush=True)
            yield


def summary(steps: list[Step]) -> dict[str, float]:
    """The first step, which loads and allocates, left out."""
    return {
        "wall": median(tokens / wall for tokens, wall, *_ in steps),
        "processor": median(tokens / processor for tokens, _, processor, *_ in steps),
        "memory": max(memory for *_, memory, _ in steps),
        "loss": median(loss for *_, loss in steps),
    }


def draw(results: dict[str, Any]) -> None:
    rows = []
    for case, measured in results["cases"].items():
        row = [case]
        for clock in ("wall", "processor"):
            mine, other = (measured[name][clock] for name in ("dapji", "peer"))
            row += [f"{mine:.0f} : {other:.0f}", f"{mine / other:.2f}"]
        mine, other = (measured[name]["memory"] / 1e9 for name in ("dapji", "peer"))
        rows.append([*row, f"{mine:.2f} : {other:.2f}"])
    head = ["dapji : transformers + PEFT", "tokens/s", "ratio", "tokens per processor second", "ratio", "memory, GB"]
    text = f"{results['model']}, {results['threads']} threads, {results['machine']}\n\n{report.table(head, rows)}"
    report.replace_section(DOCUMENT, "speed", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--examples", type=Path, help="of conversations, as `dapji data check` reads them")
    parser.add_argument("--text", type=Path, help="a long text")
    parser.add_argument("--cases", nargs="*", choices=CASES)
    parser.add_argument("--threads", type=int, help="[default: all processors]")
    parser.add_argument("--steps", type=int, default=9)
    report.run(parser, DATA, measure, draw)
