"""Time decoding through `KVCache` against caches that keep everything: `make bench-decoding`.

It takes half an hour, and nothing else may run at the same time. Writes benchmarks/decoding.json
and docs/decoding.svg, and prints a table. l = 128, c = 8; batches of one sequence, and 8 heads of
width 64 where no model is named. With --compiled it times `generate` compiled against uncompiled
alone, and writes that part of the results.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache

from colonnade import FixedPattern, KVCache
from colonnade.bench.sections import fill
from colonnade.bench.timing import Comparison, compare
from colonnade.hf import (
    FixedCache,
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    compile_config,
    retrofit,
)
from colonnade.info import info

PATTERN = FixedPattern(128, 8)
HEADS, HEAD_DIM = 8, 64
LENGTH = 65_536
PROMPT = 32_768
TOKENS = 64
"""Number of tokens that are timed together; the caches are then cropped to where they were."""
NEW_TOKENS = 256
SHORT_PROMPT = 1_024
COMPILED_ROUNDS = 5
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = tuple(2**power for power in range(8, 17))
HERE = Path(__file__).parent


def main() -> None:
    """Measure everything, printing a line for each result, and write the results."""
    torch.manual_seed(0)
    if sys.argv[1:] == ["--compiled"]:
        earlier = json.loads((HERE / "decoding.json").read_text())
        _write({**earlier, "compiled": _compiled()})
        return
    machine = info(["torch", "transformers"], build=True).for_measurement()
    found: dict[str, Any] = {"machine": machine, "comparisons": {}, "fewer_bytes": {}}
    for dtype in DTYPES:
        for kv_heads in (HEADS, 2):
            name = f"{_name(dtype)}, {kv_heads} key heads"
            for max_seq_len in (LENGTH, None):
                cache = _filled(dtype, kv_heads, LENGTH, max_seq_len)
                fewer = 2 * kv_heads * LENGTH * HEAD_DIM * dtype.itemsize / cache.nbytes
                print(f"{name}, max_seq_len={max_seq_len}: {fewer:.2f} times fewer bytes")
                found["fewer_bytes"][f"{name}, max_seq_len={max_seq_len}"] = fewer
            contenders = _token_by_token(PATTERN, dtype, kv_heads, LENGTH)
            _note(found, f"{name}, a token", compare(contenders, 9), TOKENS)
            _note(found, f"{name}, a prompt", compare(_prompt(dtype, kv_heads), 5), 1)
    for dtype in DTYPES:
        for model in ("retrofitted Llama", "Sparse Transformer"):
            name = f"{_name(dtype)}, {model}, a generated token"
            _note(found, name, compare(_generation(model, dtype), 3), NEW_TOKENS)
    found["compiled"] = _compiled()
    found["by_length"] = _by_length()
    _write(found)
    draw(found["by_length"], HERE.parent / "docs" / "decoding.svg")


def _write(found: dict[str, Any]) -> None:
    (HERE / "decoding.json").write_text(json.dumps(found, indent=1) + "\n")
    page = HERE.parent / "docs" / "decoding.md"
    page.write_text(fill(page.read_text(), "compiled", _lines(found["compiled"]["rows"])))


def _lines(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the table of the page: tokens a second, compiled and not."""
    yield ""
    yield "| | tokens a second, compiled | uncompiled | compiled, times as many | first call, s |"
    yield "|---|---|---|---|---|"
    for name, row in rows.items():
        compiled, other = (
            row["calls"] / row["seconds"][key]["median"] for key in ("ours", "uncompiled")
        )
        ratio = row["ratio"]["uncompiled"]
        yield (
            f"| {name} | {compiled:.0f} | {other:.0f} | {ratio['median']:.2f} "
            f"({ratio['low']:.2f}–{ratio['high']:.2f}) | {row['first_call']:.0f} |"
        )
    yield ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _note(found: dict[str, Any], name: str, compared: Comparison, calls: int) -> None:
    """Add a comparison to the results and print the time of one of its `calls` calls."""
    found["comparisons"][name] = {**asdict(compared), "calls": calls}
    ours, ratio = compared.seconds["ours"], compared.ratio["dense"]
    print(
        f"{name}: {1e3 * ours.median / calls:.3g} ms, dense takes {ratio.median:.1f} "
        f"({ratio.low:.1f}–{ratio.high:.1f}) times as long",
        flush=True,
    )


def _inputs(dtype: torch.dtype, kv_heads: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.randn(1, heads, length, HEAD_DIM).to(dtype) for heads in (HEADS, kv_heads, kv_heads)
    )
    return query, key, value


def _filled(
    dtype: torch.dtype,
    kv_heads: int,
    length: int,
    max_seq_len: int | None,
    pattern: FixedPattern = PATTERN,
) -> KVCache:
    cache = KVCache(pattern, max_seq_len)
    for _ in range(4):
        cache.append(*_inputs(dtype, kv_heads, length // 4)[1:])
    return cache


def _token_by_token(
    pattern: FixedPattern, dtype: torch.dtype, kv_heads: int, length: int
) -> dict[str, Callable[[], object]]:
    """Return decoders with our cache and with a full one that is allocated in advance.

    Both append. The full one attends as a user of PyTorch would.
    """
    cache = _filled(dtype, kv_heads, length, length + TOKENS, pattern)
    cache.evict()
    cache.evicting = False  # Otherwise it could not be cropped.
    keys, values = (torch.randn(1, kv_heads, length + TOKENS, HEAD_DIM).to(dtype) for _ in "kv")
    tokens = [_inputs(dtype, kv_heads, 1) for _ in range(TOKENS)]

    @torch.no_grad()
    def ours() -> None:
        for query, key, value in tokens:
            cache.attend(query, key, value)
        cache.crop(length)

    @torch.no_grad()
    def dense() -> None:
        for at, (query, key, value) in enumerate(tokens, start=length):
            keys[:, :, at] = key[:, :, 0]
            values[:, :, at] = value[:, :, 0]
            k, v = keys[:, :, : at + 1], values[:, :, : at + 1]
            scaled_dot_product_attention(query, k, v, enable_gqa=kv_heads != HEADS)

    return {"ours": ours, "dense": dense}


def _prompt(dtype: torch.dtype, kv_heads: int) -> dict[str, Callable[[], object]]:
    query, key, value = _inputs(dtype, kv_heads, PROMPT)

    @torch.no_grad()
    def ours() -> None:
        KVCache(PATTERN, max_seq_len=LENGTH).attend(query, key, value)

    @torch.no_grad()
    def dense() -> None:
        scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=kv_heads != HEADS
        )

    return {"ours": ours, "dense": dense}


def _models(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Make a model with 6 layers of width 256 and 4 heads, and one of equal weights but dense."""
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 2 * PROMPT,
    }
    ours: Any
    dense: Any
    if name == "Sparse Transformer":
        config = SparseTransformerConfig(**sizes, stride=128, summary=8)
        ours = SparseTransformerForCausalLM(config)
        dense = SparseTransformerForCausalLM(
            SparseTransformerConfig(**sizes, stride=128, summary=8, pattern="full")
        )
    else:
        ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        ours = LlamaForCausalLM(LlamaConfig(**sizes, **ids, intermediate_size=1_024))
        dense = copy.deepcopy(ours)
        dense.set_attn_implementation("sdpa")
        retrofit(ours, 128, 8)
    dense.load_state_dict(ours.state_dict())
    return ours.to(dtype).eval(), dense.to(dtype).eval()


def _generation(name: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return greedy `generate` after a prompt that is in the cache except for its last token."""
    ids = torch.randint(1, 256, (1, PROMPT))
    ours, dense = _models(name, dtype)
    return {
        "ours": _generate(ours, ids, FixedCache(ours.config)),
        "dense": _generate(dense, ids, DynamicCache()),
    }


def _generate(
    model: Any, ids: Tensor, cache: Cache, calls: int = 4, **more: Any
) -> Callable[[], Tensor]:
    with torch.no_grad():
        for chunk in ids[:, :-1].split(8_192, 1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
    # A copy for each round, made before any is timed.
    caches = [copy.deepcopy(cache) for _ in range(calls)]
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, **more}
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, past_key_values=caches.pop(), **options)


def _compiled() -> dict[str, Any]:
    """Compare `generate` over a cache of fixed size, compiled, with today's over one that grows."""
    rows: dict[str, Any] = {}
    for prompt in (SHORT_PROMPT, PROMPT):
        for dtype in DTYPES:
            for model in ("retrofitted Llama", "Sparse Transformer"):
                name = f"{_name(dtype)}, {model}, {prompt:,} tokens before"
                rows[name] = _compiled_generation(name, _models(model, dtype)[0], prompt)
    machine = info(["torch", "transformers"], build=True).for_measurement()
    return {"machine": machine, "rows": rows}


def _compiled_generation(name: str, model: Any, prompt: int) -> dict[str, Any]:
    """Return a comparison, the seconds of the first call, and the share of equal tokens."""
    torch.compiler.reset()  # Dynamo stops after a few compilations of one function.
    ids = torch.randint(1, 256, (1, prompt))
    room = prompt + NEW_TOKENS
    uncompiled = _generate(model, ids, FixedCache(model.config, room), COMPILED_ROUNDS + 2)
    static = FixedCache(model.config, room, static=True)
    compiled = _generate(model, ids, static, COMPILED_ROUNDS + 3, compile_config=compile_config())
    begin = time.perf_counter()
    tokens = compiled()
    first = time.perf_counter() - begin
    equal = (tokens == uncompiled())[:, prompt:].double().mean().item()
    compared = compare({"ours": compiled, "uncompiled": uncompiled}, COMPILED_ROUNDS)
    per_second = {key: NEW_TOKENS / s.median for key, s in compared.seconds.items()}
    ratio = compared.ratio["uncompiled"]
    print(
        f"{name}: {per_second['ours']:.0f} tokens a second compiled, "
        f"{per_second['uncompiled']:.0f} uncompiled, {ratio.median:.2f} ({ratio.low:.2f}–"
        f"{ratio.high:.2f}) times as many; the first call took {first:.0f} s; "
        f"{100 * equal:.0f} % of the tokens are equal",
        flush=True,
    )
    return {**asdict(compared), "calls": NEW_TOKENS, "first_call": first, "equal_tokens": equal}


def _by_length() -> dict[str, list[float]]:
    """Return milliseconds for a token, appending included, by the number of tokens before it."""
    part_local = FixedPattern(128, 8, part="local")
    found: dict[str, list[float]] = {"length": [*map(float, LENGTHS)]}
    for length in LENGTHS:
        both = compare(_token_by_token(PATTERN, torch.float32, HEADS, length), 5)
        local = compare(_token_by_token(part_local, torch.float32, HEADS, length), 5)
        for name, spread in (
            ("open block and summaries", both.seconds["ours"]),
            ("open block alone", local.seconds["ours"]),
            ("everything", both.seconds["dense"]),
        ):
            found.setdefault(name, []).append(1e3 * spread.median / TOKENS)
        print(length, *(f"{values[-1]:.3f}" for values in found.values()), flush=True)
    return found


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Draw the time of a token against the length, for each choice of what is kept."""
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "colonnade"}):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        lengths = found["length"]
        for name, milliseconds in found.items():
            if name != "length":
                axes.plot(lengths, milliseconds, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="ms a token")
        axes.set_xticks(lengths, [f"{int(n):,}" for n in lengths], rotation=30)
        axes.set_title("One token, float32, 8 heads of width 64, stride 128, summary 8")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
