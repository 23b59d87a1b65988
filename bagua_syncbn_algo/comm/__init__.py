"""Bytes between ranks: groups, messages, channels, the record of rounds."""
