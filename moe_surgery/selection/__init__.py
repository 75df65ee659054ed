"""Which experts stay: rankings (ours and published ones) and plans."""
