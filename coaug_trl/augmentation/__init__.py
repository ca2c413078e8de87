"""Augmenting queries and corpora, and the folder that keeps the answers."""
