"""Cards, reports and uploads of what a run has left."""
