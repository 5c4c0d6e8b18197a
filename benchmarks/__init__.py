"""Benchmarks of tokenwire: see README.md beside this file."""
