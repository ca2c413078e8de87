from .collection import Collection, Document


__all__ = ["Collection", "Document"]
