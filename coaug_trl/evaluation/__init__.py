"""Measures, significance, evaluation folders, comparisons and baselines."""
