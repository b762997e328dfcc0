"""Settings of the service, its front proxy, and the commands around it."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load_service
from configs.service import ServiceConfig
from serving.haproxy import FrontProxy, free_ports, proxy_environment


def test_options_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("port: 9000\nqueue_rows: 7\n")
    config = load_service(file, {"port": 9001, "host": None})
    assert (config.port, config.queue_rows, config.host) == (9001, 7, "127.0.0.1")
    assert load_service(None, {}) == ServiceConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 9000", "Did you mean 'port'"),
        ("port: 0", r"service.yaml:1: port: received 0; allowed: greater"),
        ("port: x", "port: received 'x'"),
        ("tls_cert: {file}", "belong together"),
        ("tls_cert: a.pem\ntls_key: b.pem", "there is no file a.pem"),
        ("replicas: 3\nmax_replicas: 2", "max_replicas=2 is below replicas=3"),
        ("timeout_s: 500", "above max_timeout_s"),
        ("predictor_gpus: 1", "predictor_gpus=1 has no effect on processes"),
        ("predictor_pool: threads", "'processes' or 'actors'"),
        ("max_body_bytes: 5", "max_body_bytes"),
        ("max_inflated_bytes: 600000000", "max_body_bytes . max_inflated_bytes = 667108864"),
        ("max_bodies_bytes: 400000000", "at most max_bodies_bytes=400000000"),
        ("- 1", "a mapping with settings is allowed"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_in_settings(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(text.format(file=file))
    with pytest.raises(UserError, match=said):
        load_service(file, {})


def test_a_mistake_in_an_option_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--max-replicas: max_replicas: received 0; allowed:"):
        load_service(None, {"max_replicas": 0})
    with pytest.raises(UserError, match=r"no service file at .*; the path of a YAML file"):
        load_service(tmp_path / "service.yaml", {})


def test_every_field_is_described() -> None:
    for name, field in ServiceConfig.model_fields.items():
        assert field.description, name


TLS = "ssl crt {folder}/tls.pem alpn http/1.1 ssl-min-ver TLSv1.2"
CONFIG = """frontend prometheus
    bind :{metrics}
    mode http
frontend http_frontend
    bind 127.0.0.1:{port}
backend http
    server replica 127.0.0.1:{port}1 check
listen stats
  bind *:{stats}
"""


@pytest.mark.parametrize(
    ("host", "has_tls", "bound"),
    [
        ("127.0.0.1", False, "127.0.0.1:{port}"),
        ("0.0.0.0", False, "*:{port}"),
        (
            "10.0.0.7",
            True,
            "10.0.0.7:{port} ssl crt {folder}/tls.pem alpn http/1.1 ssl-min-ver TLSv1.2",
        ),
    ],
)
def test_the_front_listens_where_it_should_and_nowhere_else(
    tmp_path: Path, host: str, has_tls: bool, bound: str
) -> None:
    (port,) = free_ports(1)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text("CERT\n")
    key.write_text("KEY\n")
    front = FrontProxy(host, port, *((str(cert), str(key)) if has_tls else ()))
    with proxy_environment(front) as environment:
        check_front(front, environment, tmp_path, bound)
    assert not Path(environment["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent.exists()


def test_what_a_killed_service_left_is_removed_by_the_next_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.haproxy._short_temporary_folder", lambda: str(tmp_path))
    front = FrontProxy("127.0.0.1", 1)
    left, young, other = (tmp_path / name for name in ("ls-front-1", "ls-front-2", "ls-back-3"))
    for folder in (left, young, other):
        folder.mkdir()
        (folder / "tls.pem").write_text("KEY\n")
    with proxy_environment(front) as environment:
        alive = Path(environment["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
        for folder in (left, other, alive):
            os.utime(folder, (1, 1))
        with proxy_environment(front):
            assert not left.exists()
            assert all(folder.is_dir() for folder in (young, other, alive))


def check_front(
    front: FrontProxy, environment: Mapping[str, str], tmp_path: Path, bound: str
) -> None:
    port = front.port
    folder = Path(environment["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
    assert len(str(folder)) < 30  # sockets of HAProxy lie in a folder of it with a long name
    program = Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
    fake = tmp_path / "haproxy"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o700)
    text = program.read_text()
    program.write_text(text[: text.index("exec ")] + f'exec {fake} "$@"\n')
    metrics = environment["RAY_SERVE_HAPROXY_METRICS_PORT"]
    stats = environment["RAY_SERVE_HAPROXY_STATS_PORT"]
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(metrics=metrics, port=port, stats=stats))
    for _ in range(2):  # a reload sees what was corrected already
        done = subprocess.run(
            [str(program), "-db", "-f", str(config), "-sf", "1"], capture_output=True, text=True
        )
        assert done.stdout.split() == ["-db", "-f", str(config), "-sf", "1"]
    binds = [line.strip() for line in config.read_text().splitlines() if "bind" in line]
    assert binds == [
        f"bind 127.0.0.1:{metrics}",
        f"bind {bound.format(port=port, folder=folder)}",
        f"bind 127.0.0.1:{stats}",
    ]
    assert f"server replica 127.0.0.1:{port}1 check" in config.read_text()
    assert folder.stat().st_mode & 0o077 == 0
    if front.tls_cert:
        assert (folder / "tls.pem").read_text() == "CERT\n\nKEY\n"
        assert (folder / "tls.pem").stat().st_mode & 0o077 == 0
        assert front.url == f"https://{front.host}:{port}"


def lockstep(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run a command in this process; its status and what it printed."""
    from typer.testing import CliRunner

    from lockstep.cli import app

    environment = {"LOCKSTEP_HOME": str(folder), "COLUMNS": "200"}
    result = CliRunner().invoke(app, list(arguments), env=environment)
    if isinstance(result.exception, UserError):
        return result.exception.exit_status, str(result.exception)
    return result.exit_code, result.output


def test_users_by_command(tmp_path: Path) -> None:
    status, said = lockstep(
        tmp_path, "users", "add", "ana", "--quota", "rows_per_day=100", "--json"
    )
    assert status == 0
    key = json.loads(said)["key"]
    assert key.startswith("lk_")
    assert lockstep(tmp_path, "users", "grant", "public", "secret", "--withdraw")[0] == 0
    assert lockstep(tmp_path, "users", "grant", "ana", "secret")[0] == 0
    status, said = lockstep(
        tmp_path, "users", "quota", "ana", "requests_per_s=2.5", "rows_per_day=none", "--json"
    )
    assert json.loads(said)["quotas"]["requests_per_s"] == 2.5
    assert (
        lockstep(tmp_path, "users", "inputs", "ana", "--allow", "s3://b/ana/")[1] == "s3://b/ana/\n"
    )
    (record,) = json.loads(lockstep(tmp_path, "users", "list", "--json")[1])["users"]
    assert (record["user"], record["granted"], record["inputs"]) == (
        "ana",
        ["secret"],
        ["s3://b/ana/"],
    )
    assert record["quotas"]["rows_per_day"] is None
    assert key not in lockstep(tmp_path, "users", "list")[1]
    status, said = lockstep(tmp_path, "users", "rotate", "ana", "--grace", "60")
    assert "It is shown this once" in said
    assert lockstep(tmp_path, "users", "revoke", "ana")[1] == "ana: 2 keys revoked\n"
    assert lockstep(tmp_path, "users", "remove", "ana")[0] == 0
    lines = json.loads(lockstep(tmp_path, "users", "audit", "--json")[1])["audit"]
    assert [line["action"] for line in lines] == [
        *("add", "withdraw", "grant", "change", "allow-input", "rotate", "revoke", "remove")
    ]
    assert "@" in lines[0]["who"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["users", "rotate", "zoe"], "no user 'zoe'"),
        (["users", "add", "ana", "--quota", "row_per_day=5"], "Did you mean 'rows_per_day'"),
        (["users", "add", "ana", "--quota", "bytes=x"], "bytes=NUMBER"),
        (["users", "add", "a/b"], "received the name 'a/b'"),
        (["serve", "--port", "0"], "port: received 0"),
        (["serve", "--tls-cert", "x.pem"], "there is no file x.pem"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    status, text = lockstep(tmp_path, *arguments)
    assert status == 2
    assert said in text
