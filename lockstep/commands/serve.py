"""`lockstep serve`: the prediction service on this machine."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.load import load_service
from lockstep.commands.options import be_quiet

if TYPE_CHECKING:
    from serving.assembly import Settings


def serve(
    config: Annotated[
        Path | None, typer.Option(help="A YAML file with fields of docs/serving.md.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    database: Annotated[
        str | None, typer.Option(help="sqlite:///FILE or postgresql://USER@HOST/NAME.")
    ] = None,
    artifacts: Annotated[str | None, typer.Option(help="Folder or URI of artifacts.")] = None,
    folder: Annotated[
        str | None, typer.Option(help="Folder for logs, uploads and outputs.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="PEM file of the certificate.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="PEM file of its key.")] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Processes that answer online requests, at least.")
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Most of these processes.")] = None,
    predictors: Annotated[
        int | None, typer.Option(help="Most processes for batch jobs; 0: none.")
    ] = None,
    demo: Annotated[
        bool, typer.Option(help="Serve the flights example, and print commands to try it.")
    ] = False,
) -> None:
    """Serve the registry's models: online predictions and batch jobs. Ctrl-C ends it."""
    settings = load_service(
        config,
        {
            "host": host,
            "port": port,
            "database": database,
            "artifacts": artifacts,
            "folder": folder,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "replicas": replicas,
            "max_replicas": max_replicas,
            "predictors": predictors,
            **({"preload": ("flights",)} if demo else {}),
        },
    )
    be_quiet()
    from serving.assembly import settings_for
    from serving.haproxy import FrontProxy, proxy_environment

    # Ray Serve reads its environment when it is imported, which `_serve` does.
    front = FrontProxy(settings.host, settings.port, settings.tls_cert, settings.tls_key)
    with proxy_environment(front) as environment:
        os.environ.update(environment)
        _serve(settings_for(settings), demo)


def _serve(settings: "Settings", is_demo: bool) -> None:
    from lockstep.serve import demo_lines, prepare_demo, running

    def say(text: str) -> None:
        print(text, flush=True)

    key = prepare_demo(settings, say) if is_demo else ""
    with running(settings, say) as service:
        say(f"serving at {service.url}")
        say(f"  models   {service.url}/v1/models  {service.url}/v2/models")
        say(f"  health   {service.url}/livez  {service.url}/readyz  {service.url}/metrics")
        say(f"  schema   {service.url}/openapi.json")
        say(f"  logs     {settings.folder}/logs")
        if is_demo:
            say("try:")
            for line in demo_lines(service.url, key):
                say(f"  {line}")
        else:
            say("a key: lockstep users add NAME")
        service.wait()
