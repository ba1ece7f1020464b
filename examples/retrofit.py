"""Give a trained dense model fixed attention: train, retrofit, fine-tune, save, load, generate.

Run `python examples/retrofit.py`. It trains a small Llama on bytes (the source of Python's standard
library), which takes about two minutes on two cores. It prints held-out bits per byte of the dense
model, of the model right after the retrofit and after fine-tuning, and of the dense model after as
many more steps of training.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from colonnade.hf import FixedCache, load, retrofit
from colonnade.train.data import Corpus, Windows, standard_library
from colonnade.train.evaluate import model_bits
from colonnade.train.optimizer import make_optimizer

CONTEXT, STRIDE, SUMMARY = 1_024, 64, 8
SCORED = 100_000
"""Number of held-out bytes to score, each with at least half a window before it."""


def main() -> None:
    """Train, retrofit, fine-tune, save, load and generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=300, help="number of steps to train the dense model for"
    )
    parser.add_argument(
        "--fine-tune-steps",
        type=int,
        default=60,
        help="number of steps to train for after the retrofit",
    )
    arguments = parser.parse_args()

    corpus = standard_library()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    train(model, corpus, arguments.steps, learning_rate=1e-2, seed=0)
    report("dense", model, corpus)

    dense = copy.deepcopy(model)
    retrofit(model, STRIDE, SUMMARY, subblocks=2)
    report("fixed, right after the retrofit", model, corpus)
    train(model, corpus, arguments.fine_tune_steps, learning_rate=3e-3, seed=1)
    report("fixed, fine-tuned", model, corpus)
    train(dense, corpus, arguments.fine_tune_steps, learning_rate=3e-3, seed=1)
    report("dense, trained as much longer", dense, corpus)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load(folder)
    cache = FixedCache(loaded.config)
    begin, _ = corpus.split("test")
    prompt = torch.from_numpy(corpus.read(begin, begin + 800)).long()[None]
    written = loaded.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=200,
        do_sample=True,
        temperature=0.7,
        pad_token_id=0,
    )
    print(bytes(written[0, 800:].tolist()).decode(errors="replace"))
    print(f"The cache kept {cache.num_stored} entries a head of {cache.get_seq_length()}.")


def train(
    model: PreTrainedModel, corpus: Corpus, steps: int, learning_rate: float, seed: int
) -> None:
    """Train in place with Muon and AdamW, cosine decay and bfloat16 under autocast."""
    batch_size = 4
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps),
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=Windows(corpus, "train", CONTEXT, steps * batch_size, seed),
            optimizers=(make_optimizer(model, "muon", learning_rate, 0.01), None),
        ).train()


def report(name: str, model: Any, corpus: Corpus) -> None:
    """Print held-out bits per byte."""
    model.eval()
    begin, end = corpus.split("test")
    data = corpus.read(begin, min(begin + SCORED, end))
    counts, bits = zip(*model_bits(model, data, CONTEXT, CONTEXT // 2, 8), strict=True)
    print(f"{name}: {sum(bits) / sum(counts):.3f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
