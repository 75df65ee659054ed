"""Which experts are kept: statistics, rankings (ours and published ones) and plans."""
