"""Fuzzing of everything that parses foreign files: GGUF, safetensors, config.json, tokenizers in GGUF metadata.

    python tests/fuzz/fuzz_formats.py --cases 1000000          all targets in turn
    python tests/fuzz/fuzz_formats.py --target gguf --first 1234 --cases 1     one case again

A case is a valid sample, changed in one to four places by rules that know its structure (counts that lie, offsets that
overflow, names that repeat), and for some afterwards in its bytes (flips, cuts, repeats). Its number alone determines
it. A case passes if it is read, or refused with one of our exceptions, within SECONDS and within memory in proportion
to its own size; the process itself may not use more than MEMORY beyond what it starts with.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import struct
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dapji.errors import DapjiError
from dapji.models import families
from dapji.tokenizer import Tokenizer
from dapji.weights.gguf import parse_gguf
from dapji.weights.safetensors import decode_json, parse_index, parse_safetensors

SECONDS = 2.0
"""Of processor time, which a busy or suspended machine does not stretch; any case takes milliseconds."""
MEMORY = 1 << 30
PER_BYTE, AT_LEAST = 16, 1 << 17
"""Bytes of Python objects that a case of n bytes may need at its peak: PER_BYTE * n + AT_LEAST. A name of one byte
becomes a string and an entry of a dictionary, so the factor cannot be small; what it excludes is that memory follows
from what a file claims."""

INTEGERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 255, 256, 257, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40,
    2**61, 2**62, 2**63 - 8, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 32, 2**64 - 1,
)  # fmt: skip
JUNK = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**70, 0.5, 1e39, 1e308, "", "x", "\x00", "가", "x" * 300,
    [], {}, [[]], [0], ["x"], {"x": 1}, {"type": "yarn"}, {"rope_type": "llama3", "factor": 8.0},
)  # fmt: skip


# ---- samples


@dataclass
class GgufSketch:
    """A GGUF file before it is encoded, with every count apart from what it counts."""

    keys: list[list[Any]]
    """[name, type code, encoded value]"""
    tensors: list[list[Any]]
    """[name, dimensions, type code, offset]"""
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    padding: int = 32

    def encode(self) -> bytes:
        out = bytearray(self.magic + struct.pack("<I", self.version & 0xFFFFFFFF))
        out += u64(len(self.tensors) if self.n_tensors is None else self.n_tensors)
        out += u64(len(self.keys) if self.n_keys is None else self.n_keys)
        for name, type, value in self.keys:
            out += string(name) + struct.pack("<I", type & 0xFFFFFFFF) + value
        for name, dimensions, type, offset in self.tensors:
            out += string(name) + struct.pack("<I", len(dimensions)) + b"".join(map(u64, dimensions))
            out += struct.pack("<I", type & 0xFFFFFFFF) + u64(offset)
        out += bytes(-len(out) % self.padding)
        return bytes(out + self.data)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)


def string(text: bytes) -> bytes:
    return u64(len(text)) + text


def array(type: int, elements: list[bytes]) -> bytes:
    return struct.pack("<IQ", type, len(elements)) + b"".join(elements)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def gguf_sample() -> GgufSketch:
    """A Llama of one layer, small enough that most of its bytes are header."""
    keys = [
        [b"general.architecture", 8, string(b"llama")],
        [b"general.alignment", 4, u32(32)],
        [b"llama.block_count", 4, u32(1)],
        [b"llama.context_length", 4, u32(64)],
        [b"llama.embedding_length", 4, u32(32)],
        [b"llama.feed_forward_length", 4, u32(32)],
        [b"llama.attention.head_count", 4, u32(2)],
        [b"llama.attention.head_count_kv", 4, u32(1)],
        [b"llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)],
        [b"llama.rope.freq_base", 6, struct.pack("<f", 1e4)],
        [b"tokenizer.ggml.model", 8, string(b"gpt2")],
        [b"tokenizer.ggml.pre", 8, string(b"smollm")],
        [b"tokenizer.ggml.tokens", 9, array(8, [string(piece) for piece in (b"a", b"b", b"ab", b"<|im_end|>")])],
        [b"tokenizer.ggml.token_type", 9, array(5, [u32(kind) for kind in (1, 1, 1, 3)])],
        [b"tokenizer.ggml.merges", 9, array(8, [string(b"a b")])],
        [b"tokenizer.ggml.eos_token_id", 4, u32(3)],
        [b"nested", 9, array(9, [array(4, [u32(1)]), array(8, [string(b"x")])])],
        [b"flags", 9, array(7, [b"\0", b"\1"])],
        [b"big", 10, u64(2**63)],
    ]
    shapes = {
        b"token_embd.weight": [32, 4], b"blk.0.attn_norm.weight": [32], b"blk.0.attn_q.weight": [32, 32],
        b"blk.0.attn_k.weight": [32, 16], b"blk.0.attn_v.weight": [32, 16], b"blk.0.attn_output.weight": [32, 32],
        b"blk.0.ffn_norm.weight": [32], b"blk.0.ffn_gate.weight": [32, 32], b"blk.0.ffn_up.weight": [32, 32],
        b"blk.0.ffn_down.weight": [32, 32], b"output_norm.weight": [32],
    }  # fmt: skip
    tensors, offset = [], 0
    for name, dimensions in shapes.items():
        type, nbytes = (0, 128) if len(dimensions) == 1 else (2, 18 * dimensions[1])
        tensors.append([name, dimensions, type, offset])
        offset += nbytes + -nbytes % 32
    return GgufSketch(keys=keys, tensors=tensors, data=bytes(offset))


def safetensors_sample() -> tuple[dict[str, Any], bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
        "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [128, 144]},
        "lm_head.weight": {"dtype": "F16", "shape": [2, 2, 2], "data_offsets": [144, 160]},
    }
    return header, bytes(160)


CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 96, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "hidden_act": "silu",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    {
        "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 96, "max_position_embeddings": 512,
        "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6,
            "beta_fast": 32, "beta_slow": 1,
        },
    },
    {
        "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 96, "max_position_embeddings": 512,
        "sliding_window": None, "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
)  # fmt: skip


def tokenizer_sample(model: str) -> dict[str, Any]:
    """What the GGUF reader gives, with a vocabulary of a few hundred pieces."""
    if model == "gpt2":
        letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
        tokens = ["<|endoftext|>", "<|im_start|>", *letters, "ab", "abc", "Ġa"]
        keys: dict[str, Any] = {"pre": "llama-bpe", "merges": ["a b", "ab c", "Ġ a"]}
        types = [3, 3] + [1] * (len(tokens) - 2)
    else:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
        keys = {"scores": np.linspace(0, -1, len(tokens), dtype=np.float32), "add_space_prefix": True}
        types = [2, 3, 3] + [6] * 256 + [1] * 5
    keys |= {"model": model, "tokens": tokens, "token_type": np.array(types, dtype=np.int32), "add_bos_token": True}
    keys |= {"bos_token_id": 1, "eos_token_id": 0, "padding_token_id": 0}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return metadata | {"tokenizer.chat_template": "{{ messages }}"}


# ---- changes


def change_bytes(data: bytes, r: random.Random) -> bytes:
    """Flip, set, cut, repeat or insert; never more than twice the size."""
    out = bytearray(data)
    for _ in range(r.randint(1, 3)):
        if not out:
            break
        at = r.randrange(len(out))
        match r.randrange(6):
            case 0:
                out[at] ^= 1 << r.randrange(8)
            case 1:
                out[at] = r.choice((0, 1, 9, 10, 0x22, 0x7F, 0x80, 0xFF))
            case 2:
                del out[at:]
            case 3:
                del out[at : at + r.randint(1, 16)]
            case 4:
                out[at:at] = out[at : at + r.randint(1, 64)]
            case 5:
                out[at : at + 8] = u64(r.choice(INTEGERS))
    return bytes(out)


def change_gguf(sketch: GgufSketch, r: random.Random) -> None:
    key, tensor = r.choice(sketch.keys), r.choice(sketch.tensors)
    number = r.choice(INTEGERS)
    match r.randrange(17):
        case 0:
            sketch.n_keys = number
        case 1:
            sketch.n_tensors = number
        case 2:
            key[1] = r.randrange(14)
        case 3:
            key[2] = change_bytes(key[2], r)
        case 4:
            key[2] = u64(number) + key[2][8:]
        case 5 if key[1] == 9:
            key[2] = key[2][:4] + u64(number) + key[2][12:]
        case 6:
            sketch.keys.append(copy.copy(key))
        case 7:
            sketch.tensors.append(copy.copy(tensor))
        case 8:
            tensor[3] = number
        case 9 if tensor[1]:
            tensor[1] = [*tensor[1]]
            tensor[1][r.randrange(len(tensor[1]))] = number
        case 10:
            tensor[1] = [r.choice(INTEGERS) for _ in range(r.randrange(7))]
        case 11:
            tensor[2] = r.randrange(45)
        case 12:
            r.choice((key, tensor))[0] = r.choice((b"", b"\xff\xfe", b"x" * r.choice((64, 65, 70000)), tensor[0]))
        case 13:
            fields, entry = r.choice(((sketch.keys, key), (sketch.tensors, tensor)))
            if len(fields) > 1:
                fields.remove(entry)
        case 14:
            sketch.data = sketch.data[: r.randrange(len(sketch.data) + 1)]
        case 15:
            sketch.padding = r.choice((1, 32, 64, 4096))
        case 16:
            key[1:] = [9, array(9, [array(9, [array(9, [array(9, [])])])]) * r.choice((1, 50))]
        case _:
            sketch.version = r.choice((0, 1, 2, 3, 4, 3 << 24, 2**32 - 1))


def change_json(value: Any, r: random.Random) -> Any:
    """A copy in which one place, anywhere inside, holds something else."""
    if isinstance(value, dict) and value and r.random() < 0.85:
        key = r.choice(list(value))
        match r.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {r.choice(("", "x", "가", f"{key}x")): r.choice(JUNK)}
            case 2:
                return value | {key: value[r.choice(list(value))]}
            case _:
                return value | {key: change_json(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.85:
        at = r.randrange(len(value))
        if r.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], change_json(value[at], r), *value[at + 1 :]]
    if isinstance(value, int) and r.random() < 0.6:
        return r.choice((value + 1, value - 1, -value, value * 2, *INTEGERS))
    return r.choice(JUNK)


def change_tokenizer(metadata: dict[str, Any], r: random.Random) -> None:
    key = r.choice(list(metadata))
    value = metadata[key]
    if isinstance(value, list) and value and r.random() < 0.8:
        at = r.randrange(len(value))
        changed = list(value)
        match r.randrange(5):
            case 0:
                changed[at] = r.choice((r.choice(value), "", "x", "a b c", " ", "<0xZZ>", "\x00", "가", 5, "▁" * 500))
            case 1:
                del changed[at]
            case 2:
                changed.insert(at, changed[at])
            case 3:
                del changed[at:]
            case 4:
                r.shuffle(changed)
        metadata[key] = changed
    elif isinstance(value, np.ndarray) and value.size and r.random() < 0.8:
        changed_array = value.copy()
        if r.random() < 0.5:
            number = r.choice((-1, 0, 1, 2, 3, 4, 5, 6, 7, 99, 2**31 - 1))
            changed_array[r.randrange(len(value))] = number if r.random() < 0.8 or value.dtype.kind == "i" else np.nan
            metadata[key] = changed_array
        else:
            metadata[key] = changed_array[: r.randrange(len(value))]
    elif r.random() < 0.3:
        del metadata[key]
    else:
        names = ("gpt2", "llama", "bert", "default", "qwen2", "kimi-k2", "deepseek-llm")
        metadata[key] = r.choice((*JUNK, *names, np.array([1.5]), np.array([], dtype=np.int32)))


# ---- targets: make a case, use it


def gguf_case(r: random.Random) -> tuple[bytes, Callable[[], object]]:
    sketch = gguf_sample()
    for _ in range(r.randint(0, 4)):
        change_gguf(sketch, r)
    data = sketch.encode()
    if r.random() < 0.4:
        data = change_bytes(data, r)
    return data, lambda: use_gguf(data)


def use_gguf(data: bytes) -> None:
    """Open, look at everything, translate."""
    file = parse_gguf(data, "case")
    metadata = dict(file.metadata)
    families.from_gguf(metadata, file.tensors)
    for tensor in file.tensors.values():
        tensor.float32()
    Tokenizer.from_gguf(metadata)


def safetensors_case(r: random.Random) -> tuple[bytes, Callable[[], object]]:
    header, tensors = safetensors_sample()
    changed: Any = header
    for _ in range(r.randint(0, 3)):
        changed = change_json(changed, r)
    encoded = json.dumps(changed).encode()
    if r.random() < 0.2:
        encoded = encoded.replace(b'"model.norm.weight"', b'"lm_head.weight"')  # a name twice
    size = r.choice(INTEGERS) if r.random() < 0.1 else len(encoded)
    data = u64(size) + encoded + tensors[: len(tensors) - (r.randrange(9) if r.random() < 0.2 else 0)]
    if r.random() < 0.4:
        data = change_bytes(data, r)
    return data, lambda: use_safetensors(data)


def use_safetensors(data: bytes) -> None:
    for stored in parse_safetensors(data, "case").stored.values():
        stored.tensor().float32()


def config_case(r: random.Random) -> tuple[bytes, Callable[[], object]]:
    config: Any = copy.deepcopy(r.choice(CONFIGS))
    for _ in range(r.randint(0, 4)):
        config = change_json(config, r)
    data = json.dumps(config).encode()
    if r.random() < 0.2:
        data = change_bytes(data, r)
    if r.random() < 0.05:
        index = {"weight_map": change_json({"w": "model-1.safetensors", "v": "model-2.safetensors"}, r)}
        data = json.dumps(index).encode()
        return data, lambda: parse_index(data, "case")
    return data, lambda: families.config_from_hf(decode_json(data, dict[str, Any], "case"))


def tokenizer_case(r: random.Random) -> tuple[bytes, Callable[[], object]]:
    metadata = tokenizer_sample(r.choice(("gpt2", "llama")))
    for _ in range(r.randint(0, 4)):
        change_tokenizer(metadata, r)
    return bytes(6000), lambda: use_tokenizer(metadata)  # about the size that this metadata has in a file


def use_tokenizer(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("ab abc 가 <|endoftext|></s>\n")
    tokenizer.decode(ids)
    tokenizer.split_control("a<|im_start|>b")


TARGETS: dict[str, Callable[[random.Random], tuple[bytes, Callable[[], object]]]] = {
    "gguf": gguf_case,
    "safetensors": safetensors_case,
    "config": config_case,
    "tokenizer": tokenizer_case,
}


# ---- the loop


@dataclass
class Tally:
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    """Seconds."""
    hungriest: float = 0.0
    """Peak of a measured case over what it may need."""
    failures: list[str] = field(default_factory=list)


def run_case(target: str, number: int, tally: Tally, *, measure: bool) -> None:
    """Run one case; failures are described in the tally."""
    data, use = TARGETS[target](random.Random(f"{target}/{number}"))
    if measure:
        tracemalloc.start()
    start = time.process_time()
    try:
        use()
        tally.read += 1
    except DapjiError:
        tally.refused += 1
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a Rust library is a BaseException
        tally.failures.append(f"{target} {number}: {traceback.format_exc()}")
    seconds = time.process_time() - start
    tally.slowest = max(tally.slowest, seconds)
    if seconds > SECONDS:
        tally.failures.append(f"{target} {number}: {seconds:.1f} s")
    if measure:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        allowed = PER_BYTE * len(data) + AT_LEAST
        tally.hungriest = max(tally.hungriest, peak / allowed)
        if peak > allowed:
            tally.failures.append(f"{target} {number}: {peak} bytes of memory for a file of {len(data)}")


def fuzz(target: str, first: int, cases: int) -> Tally:
    """Cases `first` to `first + cases - 1` of a target; memory is measured in every 50th."""
    tally = Tally()
    for number in range(first, first + cases):
        run_case(target, number, tally, measure=number % 50 == 0)
    return tally


def limit_memory() -> None:
    """MEMORY beyond what this process has mapped now; more is a MemoryError, which no case may raise."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers of foreign files; exits 1 on a failure.")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--cases", type=int, default=1_000_000, help="in all, shared by the targets")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each target")
    arguments = parser.parse_args()
    limit_memory()
    targets = arguments.target or list(TARGETS)
    failed = False
    for target in targets:
        start = time.perf_counter()
        tally = fuzz(target, arguments.first, arguments.cases // len(targets))
        print(
            f"{target}: {tally.read + tally.refused} cases, {tally.read} read, {tally.refused} refused, "
            f"{len(tally.failures)} failed; slowest {1000 * tally.slowest:.0f} ms, "
            f"most memory {100 * tally.hungriest:.0f} % of what is allowed; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for failure in tally.failures[:20]:
            print(failure)
        failed = failed or bool(tally.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
