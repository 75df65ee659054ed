"""Merging a PEFT adapter into a checkpoint: reading it, finding what each tensor of it changes, and the sums."""
