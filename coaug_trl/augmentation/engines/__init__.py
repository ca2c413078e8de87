"""What generates: transformers, vLLM, or a server."""
