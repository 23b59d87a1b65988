"""Measurements of a model on several ranks: step times of all schemes, and the timeline of one step."""
