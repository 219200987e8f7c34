"""Sections of a scenario, each read into the draft: what is given, what follows, what is wrong."""
