"""The tokeniser: BARTpho's where it can be loaded, else a BPE of the training questions and answers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vqa_questions import plain
from vqa_weights import import_transformers

from eomt.command_line import one_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # in BARTpho's order, so that their numbers are the same


def open_tokenizer(
    name: str | None, texts: Iterable[str], vocab_size: int, required: bool = False
) -> PreTrainedTokenizerBase:
    """The tokeniser of this name, or one that is trained on the texts where it cannot be loaded.

    Raises:
        OSError, ValueError: it cannot be loaded, or has no name, and pretrained text weights require it.
    """
    if required and not name:
        raise ValueError("pretrained text weights mean nothing without their tokeniser: name it in the configuration")
    if name:
        try:
            return load_tokenizer(name)
        except (OSError, ValueError, ImportError) as error:
            if required:
                raise OSError(
                    f"the tokeniser {name} cannot be loaded ({one_sentence(error)}), and pretrained text weights mean "
                    "nothing with another: give its folder as tokenizer in the configuration"
                ) from error
            log.warning("the tokeniser %s cannot be loaded (%s): a BPE is trained", name, one_sentence(error))
    return train_tokenizer(texts, vocab_size)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokeniser of a name on the hub, or in a folder."""
    return import_transformers().AutoTokenizer.from_pretrained(str(name))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE: every text can be written with it, and read back as it was."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(map(plain, texts), trainer)
    start, pad, end, unknown, mask = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(name, tokenizer.token_to_id(name)) for name in (start, end)]
    )
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        mask_token=mask,
    )


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """The tokens of each answer, the end's behind them."""
    tokens = tokenizer([plain(answer) for answer in answers], add_special_tokens=False)["input_ids"]
    return [[*each, tokenizer.eos_token_id] for each in tokens]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]]) -> list[str]:
    """The texts of tokens, without special ones."""
    return [plain(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
