"""The hand-over between training and serving: artifacts and, later, model versions."""
