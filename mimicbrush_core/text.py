"""Text -> token ids -> cross-attention tokens."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .errors import ArgumentError, ModelFileError

logger = logging.getLogger(__name__)

Tokenizer = Callable[[Sequence[str]], Tensor]
"""tokenizer(texts) -> token ids int64 [B,L], each row begun, ended and filled up to the model's length L."""

START, END = "<|startoftext|>", "<|endoftext|>"
"""What a row begins with, and what it ends with and is filled up with."""


def make_tokenizer(config: dict) -> Tokenizer:
    """The tokenizer of a model's configuration. Raises ModelFileError where the configuration has none.

    config["tokenizer"]: {"kind": "words", "words": [...], "length": L}, or {"kind": "clip", "merges": [...],
    "length": L}.
    """
    settings, encoder = config["tokenizer"], config["text_encoder"]
    kind = settings.get("kind")
    if kind not in list(_KINDS):
        raise ModelFileError(
            f"The configuration asks for the tokenizer {kind!r}; known: {', '.join(_KINDS)}. Update this program."
        )
    own = {key: value for key, value in settings.items() if key != "kind"}
    try:
        tokenizer = _KINDS[kind](**own)
        fits = tokenizer.size <= encoder["vocab_size"] and 2 < tokenizer.length <= encoder["max_position_embeddings"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"The configuration does not describe its tokenizer ({error}).") from error
    if not fits:
        raise ModelFileError(
            f"The tokenizer gives {tokenizer.length} of {tokenizer.size} tokens; the text encoder reads "
            f"{encoder['max_position_embeddings']} of {encoder['vocab_size']}."
        )
    return tokenizer


def encode_text(text_encoder: nn.Module, token_ids: Tensor) -> Tensor:
    """Token ids int64 [B,L] -> cross-attention tokens [B,L,D]: the last hidden state, as Stable Diffusion 1.5 does.

    Gradients flow where the caller wants them.
    """
    return text_encoder(input_ids=token_ids.to(text_encoder.device)).last_hidden_state


class WordTokenizer:
    """One token per word, for a model that knows a few words only.

    words: all it knows, in lower case; their ids are their places, then come START and END. length: of a row, with
    both.
    """

    def __init__(self, words: Sequence[str], length: int):
        self.words, self.length = list(words), length
        self.size = len(self.words) + 2
        self._ids = {word: index for index, word in enumerate([*self.words, START, END])}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Upper case and punctuation do not count. Raises ArgumentError for a word it does not know or too many."""
        return torch.stack([self._row(text) for text in texts])

    def _row(self, text: str) -> Tensor:
        words = re.findall(r"\w+", text.lower())
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ArgumentError(
                f"This model does not know {', '.join(map(repr, unknown))}. It knows these words only: "
                f"{', '.join(self.words)}."
            )
        if len(words) > self.length - 2:
            raise ArgumentError(f"The text has {len(words)} words; this model reads at most {self.length - 2}.")
        ids = [self._ids[word] for word in (START, *words, END)]
        return torch.tensor(ids + [self._ids[END]] * (self.length - len(ids)))


class ClipTokenizer:
    """CLIP's byte pairs (Sennrich et al., arXiv 1508.07909; Radford et al., arXiv 2103.00020) by transformers.

    merges: its pairs in order, "a b" each, without the version line: all it takes, as the tokens follow from them.
    length: of a row, 77 for CLIP's own.
    """

    def __init__(self, merges: Sequence[str], length: int):
        vocabulary = clip_vocabulary(merges)
        self.size, self.length = len(vocabulary), length
        with tempfile.TemporaryDirectory() as folder:  # transformers 4 and 5 agree on these files only
            Path(folder, VOCABULARY_FILE).write_text(json.dumps(vocabulary), encoding="utf-8")
            Path(folder, MERGES_FILE).write_text("\n".join([_VERSION_LINE, *merges]) + "\n", encoding="utf-8")
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """What is too long is cut at the end, with a warning in the log."""
        rows = [self._row(text) for text in texts]
        return torch.tensor(rows, dtype=torch.int64)

    def _row(self, text: str) -> list[int]:
        whole = self._tokenizer(text)["input_ids"]
        if len(whole) > self.length:
            logger.warning("The text has %d tokens; the model reads the first %d: %r", len(whole), self.length, text)
        end = whole[-1]
        return (whole[: self.length - 1] + [end] * self.length)[: self.length]


VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
_VERSION_LINE = "#version: 0.2"


def read_merges(path: Path) -> list[str]:
    """The pairs of a `merges.txt`, for `ClipTokenizer`. Raises ModelFileError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is not readable as the pairs of a tokenizer ({error}).") from error
    merges = [line for line in lines if line and not line.startswith("#version")]
    try:
        clip_vocabulary(merges)
    except ModelFileError as error:
        raise ModelFileError(f"{path} is no {MERGES_FILE}: {error}") from error
    return merges


def clip_vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """CLIP's tokens and their ids: each byte, each byte as the end of a word, each pair, START and END.

    Raises ModelFileError for what is no pair of tokens before it.
    """
    letters = list(_byte_letters())
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    for pair in merges:
        parts = pair.split(" ")
        if len(parts) != 2 or not tokens.keys() >= set(parts):
            raise ModelFileError(f"{pair!r} is no pair of tokens of CLIP or of the pairs before it.")
        tokens["".join(parts)] = None
    return {token: index for index, token in enumerate([*tokens, START, END])}


def _byte_letters() -> Sequence[str]:
    """A printable letter for each byte, in the order of GPT-2: the printable ones as they are, the rest from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]


_KINDS = {"words": WordTokenizer, "clip": ClipTokenizer}
