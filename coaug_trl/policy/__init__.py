"""What training and use share: prompts, settings, fingerprints, downloads."""
