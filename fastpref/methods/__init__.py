"""Methods: a batch in, loss sums and metrics out."""
