"""Communication between ranks: process groups, messages, channels and records of rounds."""
