"""The paper's analyses."""
