"""The arithmetic of one round: moments, autograd Functions, running statistics."""
