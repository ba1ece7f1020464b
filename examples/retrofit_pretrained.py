"""Give a pretrained model a fraction of its cache: convert, tune on a text, measure, generate.

Run `python examples/retrofit_pretrained.py MODEL TEXT OUT` with the folder of a dense transformers
model such as SmolLM2-135M, a file or folder of UTF-8 text and an empty folder. It shows in Python
what `colonnade retrofit MODEL --data TEXT --out OUT` does: every layer gets blocks of 128 tokens,
32 summary columns and one sink; LoRA adapters are tuned so that the model gives the dense model's
distributions and the text; and both are scored on the last tenth of the text, which tuning does not
see. Half an hour on two cores is a fair beginning for a model of this size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from colonnade.hf import FixedCache, load
from colonnade.info import good_at_bf16
from colonnade.train.retrofit_settings import RetrofitSettings
from colonnade.train.retrofitting import open_retrofit, prepare_folder, run

PROMPT, NEW_TOKENS = 512, 64


def main() -> None:
    """Convert, tune, measure, load and generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a dense model, or its name")
    parser.add_argument("text", help="file or folder of text to tune on")
    parser.add_argument("out", type=Path, help="empty folder for the result")
    parser.add_argument("--minutes", type=float, default=30.0, help="time for tuning")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --minutes")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a window")
    arguments = parser.parse_args()

    settings = RetrofitSettings(
        model=arguments.model,
        data=arguments.text,
        seq_len=arguments.seq_len,
        stride=128,
        summary=32,
        sinks=1,
        lora=16,
        distill=0.5,
        minutes=arguments.minutes,
        steps=arguments.steps,
        bf16=good_at_bf16(),
        tune_dense=True,
    )
    opened = open_retrofit(settings)
    prepare_folder(arguments.out)
    for line in run(opened, arguments.out):
        print(
            f"{line['model']}: {line['second_half']:.3f} bits per byte in the second half of each "
            f"window, and {line['cache_share']:.0%} of the dense model's cache"
        )

    model = load(arguments.out)
    cache = FixedCache(model.config)
    begin, _ = opened.windows[0]
    prompt = torch.from_numpy(opened.corpus.read(begin, begin + PROMPT)).long()[None]
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    print(opened.tokenizer.decode(written[0, prompt.shape[1] :]))
    print(f"The cache kept {cache.num_stored} entries a head of {cache.get_seq_length()}.")


if __name__ == "__main__":
    main()
