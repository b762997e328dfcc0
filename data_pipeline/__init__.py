"""Files to deterministic, resumable tf.data batches. Knows no Ray."""
