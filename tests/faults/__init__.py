"""Faults that are injected into training jobs of real processes; ``python -m tests.faults`` runs all of them."""
