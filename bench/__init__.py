"""Benchmarks of paikern against pure-PyTorch references."""
