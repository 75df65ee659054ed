"""What a model does with texts, in numbers."""
