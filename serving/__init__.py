"""Artifact to predictions."""
