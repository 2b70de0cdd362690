"""Token ids against `transformers.CLIPTokenizer` 5.23.0, pinned here."""

import gzip
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from diffusion.tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, Tokenizer, VocabularyError

VOCABULARY = Path(str(files("assets") / "clip-vocabulary" / "bpe_simple_vocab_16e6.txt.gz"))

# The ids without the beginning- and end-of-text tokens.
# fmt: off
GOLDEN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "": [],
    "   ": [],
    "A PHOTO  of\ta\n\ncat ": [320, 1125, 539, 320, 2368],
    "it's the dog's, they've we'll I'm you'd don't": [
        585, 568, 518, 1929, 568, 267, 889, 1200, 649, 1342, 328, 880, 592, 1896, 847, 713,
    ],
    "IT'S": [585, 568],
    "rock 'n' roll": [2172, 262, 333, 262, 3341],
    "l’été d’un “chat” — œuvre": [
        331, 728, 503, 3459, 39694, 323, 728, 503, 2271, 728, 506, 2402, 728, 507, 2005, 129, 241,
        84, 17501,
    ],
    "“curly quotes” and ‘single’": [
        728, 506, 20795, 5808, 728, 507, 537, 728, 502, 2688, 728, 503,
    ],
    "3.14159 cats, 1,000,000 dogs": [
        274, 269, 272, 275, 272, 276, 280, 3989, 267, 272, 267, 271, 271, 271, 267, 271, 271, 271,
        3255,
    ],
    "2024-05-17T09:30": [
        273, 271, 273, 275, 268, 271, 276, 268, 272, 278, 339, 271, 280, 281, 274, 271,
    ],
    "naïve café façade": [1097, 35689, 563, 15304, 778, 10067, 1928],
    "cafe\u0301 nai\u0308ve": [15304, 1097, 35689, 563],
    "ÅNGSTRÖM ÆSIR ß STRASSE İstanbul": [
        23176, 10352, 807, 7255, 332, 42495, 3846, 127, 509, 1894, 8938, 328, 16384, 11231,
    ],
    "红苹果的水墨画": [
        163, 118, 95, 164, 233, 117, 162, 252, 250, 163, 248, 226, 162, 108, 112, 161, 95, 101,
        20211, 375,
    ],
    "一只猫 a cat 一隻貓": [
        19759, 222, 34517, 103, 163, 234, 360, 320, 2368, 19759, 222, 165, 248, 119, 164, 110,
        497,
    ],
    "日本語のテキスト、カタカナ": [
        39121, 44353, 34002, 252, 21575, 2429, 228, 47121, 32421, 486, 45262, 37367, 34941, 37367,
        2429, 488,
    ],
    "한국어 텍스트": [15197, 250, 31871, 255, 31625, 368, 169, 227, 235, 20305, 39820],
    "🍎🍏": [2011, 236, 2011, 493],
    "\U0001f469\u200d\U0001f680 astronaut \U0001f1ec\U0001f1e7 \u2764\ufe0f": [
        26304, 13542, 18376, 11559, 1752,
    ],
    "ＦＵＬＬ ｗｉｄｔｈ １２３": [
        171, 121, 228, 171, 121, 243, 171, 121, 234, 171, 121, 490, 171, 121, 245, 171, 121, 231,
        171, 121, 226, 171, 121, 242, 171, 121, 486, 171, 120, 495, 171, 120, 496, 171, 120, 497,
    ],
    "ﬁne ﬂower ligatures": [171, 105, 223, 1422, 171, 105, 224, 2032, 528, 554, 5314, 2288],
    "а кот Привет мир": [
        27080, 27152, 13506, 141, 480, 26302, 16370, 29503, 110, 22176, 141, 480, 38018, 16701,
        141, 478,
    ],
    "مرحبا بالعالم": [12986, 10948, 25722, 16378, 22625, 16378, 12973, 18843, 12973, 29945],
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e": [
        3124, 101, 48254, 28505, 19389, 27263, 25130, 29552, 39653, 26090, 26721, 37299, 13343,
    ],
    "hello!!! world?!...": [3306, 995, 1002, 9785, 678],
    "(masterpiece:1.2), best-quality, <lora:ink:0.8>": [
        263, 12066, 281, 272, 269, 273, 2361, 949, 268, 3027, 267, 283, 2179, 320, 281, 967, 281,
        271, 269, 279, 285,
    ],
    "<|startoftext|> marks <|endoftext|> inside": [49406, 5466, 49407, 2912],
    "<|ENDOFTEXT|> upper": [27, 347, 40786, 4160, 91, 285, 7067],
    "user@example.com https://example.org/a?b=c#d": [
        7031, 287, 6228, 269, 2464, 30901, 12441, 6228, 269, 5593, 270, 320, 286, 321, 284, 322,
        258, 323,
    ],
    "snake_case and C++ & C#": [8798, 318, 2068, 537, 322, 19056, 261, 322, 258],
    "&amp; &lt;b&gt;": [261, 6259, 282, 261, 3333, 282, 321, 261, 4725, 282],
    "ink emoji of smiling face with smiling eyes": [967, 16327, 539, 9200, 1710, 593, 9200, 3095],
    "non\xa0breaking\u3000ideographic\u200bzero width": [
        3353, 2755, 1909, 78, 4245, 9844, 5848, 23571,
    ],
    "½ ² Ⅷ ①": [33613, 41175, 158, 227, 371, 158, 239, 510],
    "\x00control\x07": [444, 3366, 451],
    "supercalifragilisticexpialidocious antidisestablishmentarianism": [
        1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466, 3120, 4262, 7726, 12658, 1585,
        44351,
    ],
    "a_b'S 'LL 're's": [320, 318, 321, 568, 1342, 982, 568],
    "hello! world !": [3306, 256, 1002, 256],
}
# fmt: on


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCABULARY)


@pytest.mark.parametrize("text", GOLDEN, ids=ascii)
def test_the_ids_are_those_of_transformers(tokenizer: Tokenizer, text: str) -> None:
    ids = [BOS_TOKEN_ID, *GOLDEN[text], EOS_TOKEN_ID]
    assert tokenizer.token_count(text) == len(ids)
    assert tokenizer([text])[0].tolist() == ids + [EOS_TOKEN_ID] * (77 - len(ids))


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = list(GOLDEN)
    batch = tokenizer(texts)
    assert batch.shape == (len(texts), 77)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, np.concatenate([tokenizer([text]) for text in texts]))
    assert tokenizer([]).shape == (0, 77)


def test_a_long_text_is_cut_and_still_ends(tokenizer: Tokenizer) -> None:
    text = "cat " * 90
    ids = tokenizer([text])[0].tolist()
    assert ids == [BOS_TOKEN_ID, *[2368] * 75, EOS_TOKEN_ID]
    assert tokenizer.token_count(text) == 92
    assert tokenizer.token_count("cat " * 75) == 77


def test_padding_with_zero_leaves_the_text_alone() -> None:
    tokenizer = Tokenizer(VOCABULARY, pad_token_id=0, context_length=8)
    ids = tokenizer(["hello! world !"])[0].tolist()
    assert ids == [BOS_TOKEN_ID, 3306, 256, 1002, 256, EOS_TOKEN_ID, 0, 0]


def test_the_merges_file_of_a_diffusers_model_gives_the_same(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")
    merges = tmp_path / "merges.txt"
    merges.write_text("\n".join(["#version: 0.2", *lines[1 : 1 + 48894], ""]), encoding="utf-8")
    texts = list(GOLDEN)
    np.testing.assert_array_equal(Tokenizer(merges)(texts), tokenizer(texts))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("absent.txt.gz", None),
        ("not-gzip.txt.gz", b"a list of merges"),
        ("cut-off.txt.gz", VOCABULARY.read_bytes()[:100_000]),
        ("too-short.txt", b"#version: 0.2\ni n\nt h\n"),
        ("other.txt", b"one two three\n" * 50_000),
        ("twice.txt", b"#version: 0.2\n" + b"i n\n" * 50_000),
        ("binary.txt", b"\xff\xfe\x00" * 100),
    ],
)
def test_a_file_that_is_no_vocabulary_is_named(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VocabularyError, match=name):
        Tokenizer(path)
