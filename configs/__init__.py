"""What a job is: the typed schema, its YAML, and runnable job files."""
