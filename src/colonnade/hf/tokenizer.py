"""Bytes as tokens: id = byte value, 256 ids."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD_BYTE = 0xFF
"""Never occurs in UTF-8, so no text has it; a padded position is told by the attention mask."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of the text in UTF-8.

    It is saved with a checkpoint as data and loads by AutoTokenizer without any code of ours.
    Nothing in a text is read as a special token.
    """
    symbols = bytes_to_unicode()
    vocab = {symbols[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=symbols[PAD_BYTE],
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
