"""Generation for the online methods."""
