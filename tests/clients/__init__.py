"""Clients that others wrote, against a running service: `make test-clients`."""
