"""A model in less memory than its weights take: dense weights are held, experts are read from disk when needed."""
