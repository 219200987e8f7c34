"""Measured runs against predicted ones: read, predict, compare, summarise."""
