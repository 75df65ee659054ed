"""The report page and the figures for papers."""
