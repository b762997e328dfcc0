"""What the name of a metric says of it. No TensorFlow."""

import re

from configs.catalog import ROW_FUNCTIONS, catalog, split_spec
from configs.schema import CompileConfig

# Parts of names between underscores, in order; Keras writes IoU as io_u.
_MORE_IS_BETTER = (
    *("acc", "accuracy", "auc", "precision", "recall", "f1", "fbeta", "r2", "iou", "io_u"),
    *("f_beta", "cosine", "true_positives", "true_negatives", "sensitivity", "specificity"),
    *("correlation", "f1score", "r2score"),
)
# Classes whose objects Keras does not name by the class.
_OWN_NAMES = {"FBetaScore": "fbeta_score", "LogCoshError": "logcosh"}


def is_more_better(name: str) -> bool:
    """Whether more of a metric is better; of losses, errors and unknown names less is."""
    parts = f"_{_snake_case(name)}_"
    return any(f"_{words}_" in parts for words in _MORE_IS_BETTER)


def metric_names(config: CompileConfig) -> list[str]:
    """Names of the results of a job's compile section of Keras's own objects, `loss` first."""
    return ["loss", *kinds_of_metrics(config)]


def kinds_of_metrics(config: CompileConfig) -> dict[str, str]:
    """Names of the results of a job's metrics, and the Keras class or function behind each."""
    kinds = {}
    for spec in (*config.metrics, *config.weighted_metrics):
        kind, arguments = split_spec(spec)
        is_class = kind in catalog()["metrics"]["classes"]
        name = _OWN_NAMES.get(kind) or (_snake_case(kind) if is_class else kind)
        kinds[str(arguments.get("name") or name)] = kind
    return kinds


def is_mean_over_rows(kind: str) -> bool:
    """Whether a metric may be a mean over rows, as far as Keras's name for it tells."""
    return kind in ROW_FUNCTIONS or kind not in catalog()["metrics"]["classes"]


def _snake_case(name: str) -> str:
    """As Keras names an object by its class."""
    parted = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", parted).lower()
