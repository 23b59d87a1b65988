"""What a model's statistics cost on real ranks: the schemes side by side, and where the time of a step goes."""
