"""The tokenizer of the CLIP text encoders: text in, token ids out.

Built with Hugging Face `tokenizers` from the list of merges alone, as `transformers.CLIPTokenizer`
builds it; the ids are the same for every text. (OpenAI's own tokenizer first repairs the text with
ftfy, so curly quotes and full-width characters differ there.)
"""

import gzip
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

BOS_TOKEN_ID = 49406
EOS_TOKEN_ID = 49407

_BOS_TOKEN, _EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_MERGES = 49152 - 256 - 2  # what is left of CLIP's 49,152 after the bytes and the two marks
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def clip_vocabulary() -> Path:
    """The vocabulary file that comes with this project."""
    return Path(str(files("assets") / "clip-vocabulary" / "bpe_simple_vocab_16e6.txt.gz"))


class VocabularyError(ValueError):
    """A vocabulary file that cannot be used; the message says which and why."""


class Tokenizer:
    """CLIP's byte-pair encoding over lower-cased text, 49,408 tokens.

    Args:
        vocabulary: `bpe_simple_vocab_16e6.txt.gz` as CLIP ships it, or the `merges.txt` of a
            model in diffusers layout.
        pad_token_id: fills up short texts: end-of-text (49407) for Stable Diffusion 1.x, 0 for
            2.x, the values each was trained with. Padding has no effect on the text: "!" stays
            token 256 where the padding is token 0, as in the training of 2.x.
        context_length: the length of every row of ids, with the beginning- and end-of-text token.

    Raises:
        VocabularyError: the file is not there, or not such a list of merges.
    """

    def __init__(
        self, vocabulary: Path, pad_token_id: int = EOS_TOKEN_ID, context_length: int = 77
    ) -> None:
        self.pad_token_id = pad_token_id
        self.context_length = context_length
        self._tokenizer = _build(_read_merges(vocabulary))

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Returns int32 ids of shape (len(texts), context_length); longer texts are cut off."""
        length = self.context_length - 2
        rows = [self.row(self.ids(text)[:length]) for text in texts]
        return np.array(rows, np.int32).reshape(-1, self.context_length)

    def row(self, ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """Returns int32 (context_length,): at most context_length - 2 ids between their marks."""
        row = np.full(self.context_length, self.pad_token_id, np.int32)
        row[: len(ids) + 2] = [BOS_TOKEN_ID, *ids, EOS_TOKEN_ID]
        return row

    def token_count(self, text: str) -> int:
        """Returns how many ids the whole text needs, with its beginning- and end-of-text token."""
        return len(self.ids(text)) + 2

    def ids(self, text: str) -> list[int]:
        """Returns the ids of the whole text, without marks and padding."""
        # One text at a time: `encode_batch` starts threads, which a later fork does not survive.
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Returns the merges of a vocabulary file; its first line is a version and is skipped."""
    advice = "use bpe_simple_vocab_16e6.txt.gz or the merges.txt of a CLIP tokenizer"
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : 1 + _MERGES]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise VocabularyError(
            f"{path}: cannot be read as a CLIP vocabulary ({error}); {advice}"
        ) from error
    if len(lines) < _MERGES:
        raise VocabularyError(f"{path}: expected {_MERGES} merges, found {len(lines)}; {advice}")
    merges = []
    known = set(_byte_tokens())
    for number, line in enumerate(lines, start=2):
        left, _, right = line.partition(" ")
        if left not in known or right not in known or left + right in known:
            raise VocabularyError(
                f"{path}, line {number}: expected two known tokens that make a new one, "
                f"found {line[:40]!r}; {advice}"
            )
        known.add(left + right)
        merges.append((left, right))
    return merges


def _byte_tokens() -> list[str]:
    """Returns the tokens of the 256 bytes, inside a word and at its end, in the order of their ids.

    Printable bytes stand for themselves and come first; the others are moved up from code
    point 256 on. This is GPT-2's table, which CLIP took over.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = range(256, 256 + 256 - len(printable))
    characters = [chr(code) for code in [*printable, *moved]]
    return characters + [character + _WORD_END for character in characters]


def _build(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    merged = [left + right for left, right in merges]
    tokens = [*_byte_tokens(), *merged, _BOS_TOKEN, _EOS_TOKEN]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=_WORD_END,
            unk_token=_EOS_TOKEN,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # Recognised in a text as they stand, before it is lower-cased.
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (_BOS_TOKEN, _EOS_TOKEN)]
    )
    return tokenizer
