"""What the name of a metric says of it. No TensorFlow."""

_MORE_IS_BETTER = (
    *("accuracy", "auc", "precision", "recall", "f1", "fbeta", "r2", "iou", "cosine"),
    *("true_positives", "true_negatives", "sensitivity", "specificity", "correlation"),
)


def is_more_better(name: str) -> bool:
    """Whether more of a metric is better; of losses, errors and unknown names less is."""
    return any(word in name.lower() for word in _MORE_IS_BETTER)
