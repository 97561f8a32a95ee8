"""Programs that make what the repository carries; they are in no wheel and run from its root."""
