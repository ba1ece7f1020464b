"""A tokenizer for bytes: 256 ids, each the value of its byte, and two that are no byte."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_TOKEN, PAD_TOKEN = "\ufdd0end", "\ufdd0pad"
"""U+FDD0 is a noncharacter, which Unicode keeps out of texts that are passed on."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the bytes of the text in UTF-8.

    No byte is special. The end token, for trainers that append one, has id 256, and the pad token
    257, so a model that is to read them needs `vocab_size=len(tokenizer)`. The Sparse Transformer
    does not read padding, and without end tokens it needs 256 only.

    A checkpoint stores it as data, which AutoTokenizer loads without this package. No part of a
    text is read as a special token, but for these two, which begin with a noncharacter of Unicode.
    """
    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_TOKEN, PAD_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
