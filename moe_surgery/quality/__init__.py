"""What a model does with texts: statistics of experts, our own choice of them, and what plans cost."""
