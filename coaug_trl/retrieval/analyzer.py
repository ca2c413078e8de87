"""From a text to the terms that are indexed and searched for."""

import logging
from itertools import chain

import bm25s
import Stemmer
from bm25s import stopwords
from bm25s.tokenization import Tokenized

from ..utils.errors import InputError


# bm25s sets its own logger to DEBUG, and any application with a root handler would print all it says.
logging.getLogger("bm25s").setLevel(logging.WARNING)

# Words, one-letter words too. English keeps inner apostrophes and leaves the possessive 's out of the group, so that
# it is cut off before stop words and stemming, as in Lucene's English analyzer. No word spans a line break.
WORD = r"\w+"
ENGLISH_WORD = r"(\w+(?:['’](?!s\b)\w+)*)(?:['’]s\b)?"
# Texts that take more than a second or two.
PROGRESS_FROM = 20_000


class Analyzer:
    """
    Lucene's English analyzer: words of one letter or more in lower case, possessive 's cut off, Lucene's 33 stop words
    left out, Porter stems. For another language its Snowball stemmer, and its stop words where bm25s has them.

    Args:
        language: Name of a Snowball stemmer.

    Raises `InputError`: There is no such stemmer.
    """

    def __init__(self, language: str = "english"):
        if language not in Stemmer.algorithms():
            raise InputError(f"No stemmer for language {language!r}; choose from {', '.join(Stemmer.algorithms())}.")
        if language == "english":
            self.word, self.stopwords, stemmer = ENGLISH_WORD, stopwords.STOPWORDS_EN, "porter"
        else:
            self.word, self.stopwords = WORD, getattr(stopwords, f"STOPWORDS_{language.upper()}", ())
            stemmer = language
        self.stemmer = Stemmer.Stemmer(stemmer)

    def tokenize(self, texts: list[str]) -> Tokenized:
        """The terms of texts by number; each distinct line is read once, as rollouts of a text share most lines."""
        split_texts = [text.split("\n") for text in texts]
        lines = list(dict.fromkeys(chain.from_iterable(split_texts)))
        ids, vocab = bm25s.tokenize(
            lines,
            token_pattern=self.word,
            stopwords=self.stopwords,
            stemmer=self.stemmer,
            show_progress=len(lines) >= PROGRESS_FROM,
            leave=False,
        )
        line_ids = dict(zip(lines, ids, strict=True))
        text_ids = [list(chain.from_iterable(map(line_ids.get, text_lines))) for text_lines in split_texts]
        return Tokenized(text_ids, vocab)

    def terms(self, texts: list[str]) -> list[list[str]]:
        """The terms of each text, in its order."""
        tokens = self.tokenize(texts)
        names = sorted(tokens.vocab, key=tokens.vocab.get)
        return [[names[i] for i in ids] for ids in tokens.ids]
