"""Every ranking cut to every number of experts: many checkpoints of one source in one folder."""
