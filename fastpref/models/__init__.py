"""Models, their heads and their attention."""
