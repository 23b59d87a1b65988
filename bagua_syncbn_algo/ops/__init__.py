"""What one round computes: moments, autograd Functions, running statistics."""
