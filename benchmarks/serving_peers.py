"""The peers of benchmarks.serving as servers: plain Ray Serve in three forms.

Run as `python -m benchmarks.serving_peers KIND PORT MODEL`. KIND is `predict` (one call of
`model.predict` a request), `compiled` (one call of a `tf.function` a request) or `empty` (a route
that answers at once). Prints `ready`, and ends when its standard input does.
"""

import sys
from typing import Any

import numpy as np
import ray
from fastapi import FastAPI
from ray import serve
from starlette.requests import Request

from cluster.runtime import on_loopback

NAMES = [f"x{number}" for number in range(9)]


def application(kind: str, model_file: str) -> Any:
    """A Serve application with one route."""
    app = FastAPI()

    @serve.deployment(max_ongoing_requests=1000)
    @serve.ingress(app)
    class Peer:
        def __init__(self) -> None:
            if kind == "empty":
                return
            import keras
            import tensorflow as tf

            model = keras.saving.load_model(model_file, compile=False)
            self._predict: Any = lambda rows: model.predict(rows, verbose=0)
            if kind == "compiled":
                call = tf.function(lambda rows: model(rows, training=False))
                spec = tf.TensorSpec((None, len(NAMES)), tf.float32)
                compiled = call.get_concrete_function(spec)
                self._predict = lambda rows: compiled(tf.constant(rows)).numpy()

        @app.post("/v1/models/m:predict")
        async def predict(self, request: Request) -> dict[str, Any]:
            if kind == "empty":
                return {"predictions": [[0.0]]}
            body = await request.json()
            rows = [[row[name] for name in NAMES] for row in body["instances"]]
            return {"predictions": self._predict(np.array(rows, np.float32)).tolist()}

    return Peer.bind()


def main(kind: str, port: str, model_file: str) -> None:
    """Serve until standard input ends."""
    with on_loopback():
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(application(kind, model_file), route_prefix="/")
    print("ready", flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
