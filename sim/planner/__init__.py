"""Which is best: what to buy, and how to run it."""
