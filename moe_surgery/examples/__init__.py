"""The bundled model, and what it can do."""
