"""The `coaug` command."""
