"""Writes a checkpoint as one GGUF file, the format of llama.cpp, Ollama and LM Studio."""
