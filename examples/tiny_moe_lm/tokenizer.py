"""Train the byte-level BPE tokenizer: any text encodes, and decodes to itself.

Run ``python -m examples.tiny_moe_lm.tokenizer``.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.tiny_moe_lm.data import DATA, DOCUMENT_SEPARATOR, DOMAINS

VOCAB_SIZE = 3072
END_OF_TEXT = "<|endoftext|>"
CONTEXT_TOKENS = 256
FOLDER = DATA / "tokenizer"

_TRAINING_CHARS_PER_DOMAIN = 6_000_000
_PIECE_CHARS = 20_000


def main() -> None:
    """Train on an equal share of each domain and save a transformers tokenizer folder."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_training_pieces(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(FOLDER)


def _training_pieces() -> Iterator[str]:
    for domain in DOMAINS:
        text = (DATA / f"{domain}.train.txt").read_text(encoding="utf-8")[:_TRAINING_CHARS_PER_DOMAIN]
        text = text.replace(DOCUMENT_SEPARATOR, "\n")
        for start in range(0, len(text), _PIECE_CHARS):
            yield text[start : start + _PIECE_CHARS]


if __name__ == "__main__":
    main()
