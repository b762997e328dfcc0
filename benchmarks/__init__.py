"""Measurements beside peers; each topic is a module, run as `python -m benchmarks.TOPIC`."""
