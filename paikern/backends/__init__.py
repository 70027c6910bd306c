"""Backends: where an operation runs. `registry` picks one by operation, device and dtype."""
