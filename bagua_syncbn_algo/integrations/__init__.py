"""Adapters for training frameworks. Each module needs its framework; no other module of this package imports one."""
