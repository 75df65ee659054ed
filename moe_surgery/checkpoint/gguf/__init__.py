"""GGUF files: their types, header, split sets, and how headers are written."""
