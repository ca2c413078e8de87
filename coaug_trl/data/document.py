"""A document of a collection, and what the model reads of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """
    A document of the corpus.

    Args:
        id (`str`):
            Its id.
        title (`str`):
            Its title, `""` where there is none.
        text (`str`):
            Its text without the title.
    """

    id: str
    title: str
    text: str


def document_text(document: "Document") -> str:
    """What the model reads of a document: title and text, a line each."""
    return "\n".join(part for part in (document.title, document.text) if part)
