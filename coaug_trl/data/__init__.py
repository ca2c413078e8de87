"""Collections, where they come from, and the groups a batch is made of."""

from .collection import Collection
from .document import Document


__all__ = ["Collection", "Document"]
