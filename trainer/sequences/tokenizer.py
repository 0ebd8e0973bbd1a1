"""The tokenizer of the generator: specials, codes and frequent title words, ids as in bundles.prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from registry.bundles.prompt import BOS, EOS, FIRST_CODE, ITEM, LEVELS, PAD, TITLE, UNK, Prompt

_NAMES = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", TITLE: "<title>", ITEM: "<item>", UNK: "<unk>"}
# A code as SIDs are written, one Han character, or a run of letters and digits; the rest is dropped.
_PIECES = r"<[a-h]_\d+>|\p{Han}|[[\w']&&[^\p{Han}]]+"


def _split(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)


def words(titles: Iterable[str]) -> Counter[str]:
    """How many of the titles have each word, lower-cased."""
    backend = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    _split(backend)
    counts: Counter[str] = Counter()
    for title in titles:
        text = backend.normalizer.normalize_str(title)
        counts.update({word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)})
    return counts


def build_tokenizer(prompt: Prompt, titles: Iterable[str], max_words: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a codebook and a catalogue: `<a_12><b_7>` and title words, without spaces needed.

    The `max_words` most frequent words that at least two titles have; ties in alphabetical order.
    """
    vocabulary = {_NAMES.get(token, f"<reserved_{token}>"): token for token in range(FIRST_CODE)}
    for level, size in enumerate(prompt.sizes):
        for code in range(size):
            vocabulary[f"<{LEVELS[level]}_{code}>"] = prompt.code_base(level) + code
    counted = sorted(words(titles).items(), key=lambda pair: (-pair[1], pair[0]))
    frequent = [word for word, count in counted if count >= 2 and word not in vocabulary]
    for word in frequent[:max_words]:
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    _split(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<title>", "<item>"], padding_side="right",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
