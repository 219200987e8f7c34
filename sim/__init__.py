"""`sim`: a discrete-event simulator of distributed LLM training."""
