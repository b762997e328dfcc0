"""What the name of a metric says of it. No TensorFlow."""

import re

from configs.catalog import catalog, split_spec
from configs.schema import CompileConfig

_MORE_IS_BETTER = (
    *("accuracy", "auc", "precision", "recall", "f1", "fbeta", "r2", "iou", "cosine"),
    *("true_positives", "true_negatives", "sensitivity", "specificity", "correlation"),
)


def is_more_better(name: str) -> bool:
    """Whether more of a metric is better; of losses, errors and unknown names less is."""
    return any(word in name.lower() for word in _MORE_IS_BETTER)


def metric_names(config: CompileConfig) -> list[str]:
    """Names of the results of a job's compile section of Keras's own objects, `loss` first."""
    names = ["loss"]
    for spec in (*config.metrics, *config.weighted_metrics):
        name, arguments = split_spec(spec)
        given = arguments.get("name")
        is_class = name in catalog()["metrics"]["classes"]
        names.append(str(given) if given else _snake_case(name) if is_class else name)
    return names


def _snake_case(name: str) -> str:
    """As Keras names an object by its class."""
    parted = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", parted).lower()
