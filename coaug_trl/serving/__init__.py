"""The index that serves a collection, and the demo."""
