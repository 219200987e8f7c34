"""The nouns: ledger, program, traffic, timeline, footprint. Frozen values, no behaviour of their own."""
