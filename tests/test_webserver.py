"""The report beside Dagster's UI; the UI itself stands in as an app that takes every address, as Dagster's does."""

import inspect
from types import SimpleNamespace

import pytest
from dagster._cli import dev
from dagster._grpc import server as code_server
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from synpo_assets.cli import webserver
from tests.conftest import synpo_here


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNPO_HOME", str(tmp_path))
    answer = Route("/{path:path}", lambda request: PlainTextResponse("the UI"), methods=["GET", "POST"])
    ui = Starlette(routes=[answer])
    monkeypatch.setattr(webserver, "create_app_from_workspace_process_context", lambda: ui)
    return TestClient(webserver.app_with_reports(), base_url="http://127.0.0.1:3000")


def test_the_report_can_be_read_once_it_is_made_and_nothing_else(client, tmp_path):
    (tmp_path / "settings.yaml").write_text("secret")
    assert client.get("/reports/boosting_report.html").status_code == 404
    (tmp_path / "reports" / "boosting_report.html").write_text("<p>made</p>")
    answer = client.get("/reports/boosting_report.html?version")
    assert (answer.text, answer.headers["content-type"]) == ("<p>made</p>", "text/html; charset=utf-8")
    assert client.get("/reports/%2e%2e/settings.yaml").status_code == 404
    assert client.get("/reports/").status_code == 404
    assert client.put("/reports/boosting_report.html").status_code == 405
    assert client.get("/assets").text == "the UI"


def test_dagsters_own_command_starts_it_in_place_of_its_web_server(monkeypatch):
    started, watched = [], []
    monkeypatch.setattr(webserver, "end_if_killed", lambda *arguments: watched.append(arguments))
    monkeypatch.setattr(
        webserver,
        "open_ipc_subprocess",
        lambda *command, **options: started.append((*command, options)) or SimpleNamespace(pid=7),
    )
    assert webserver._start(["python", "-m", "dagster_webserver", "--port", "3000"], pass_fds=[7]).pid == 7
    command = ["python", "-m", "synpo_assets.cli.with_ui", "synpo_assets.cli.webserver", "--port", "3000"]
    assert started == [(command, {"pass_fds": [7]})]
    # A code server that ends is started anew.
    webserver._start(["python", "-m", "dagster", "code-server", "start"])
    ((process_id, what, _, is_ending),) = watched
    assert (process_id, what, is_ending.is_set()) == (7, "The web server of the UI", False)
    # Dagster kills what does not end within a minute of being told to.
    told = []
    monkeypatch.setattr(webserver, "send_ipc_shutdown_message", told.append)
    webserver._shut_down(9)
    assert (told, is_ending.is_set()) == ([9], True)
    is_ending.clear()
    assert "send_ipc_shutdown_message(webserver_write_fd)" in inspect.getsource(dev)
    # What is replaced is what that command and its code servers call.
    assert 'open_ipc_subprocess(\n                [sys.executable, "-m", "dagster_webserver"]' in inspect.getsource(dev)
    assert "open_ipc_subprocess(subprocess_args" in inspect.getsource(code_server)


MUTATION = "/graphql?query=mutation{deletePipelineRun(runId:%22x%22){__typename}}"


@pytest.mark.parametrize(("method", "path", "headers", "status"), [
    ("GET", "/assets", {}, 200),
    ("GET", "/assets", {"host": "localhost:3000"}, 200),
    ("POST", "/graphql", {"origin": "http://127.0.0.1:3000"}, 200),
    ("GET", "/assets", {"host": "evil.example"}, 403),
    ("GET", "/assets", {"host": ""}, 403),
    ("POST", "/graphql", {"origin": "http://evil.example"}, 403),
    ("POST", "/graphql", {"origin": "http://127.0.0.1:8000"}, 403),
    ("POST", "/graphql", {"origin": "null"}, 403),
    ("GET", MUTATION, {}, 403),
    ("GET", MUTATION.replace("query", "q%75ery"), {"accept": "image/*"}, 403),
    ("HEAD", MUTATION, {}, 403),
    ("GET", "/assets", {"host": "[::1"}, 403),
    ("GET", "/assets", {"origin": "http://[::1"}, 403),
    ("GET", "/reports/boosting_report.html", {"host": "evil.example"}, 403),
])  # fmt: skip
def test_pages_of_other_sites_are_refused(client, method, path, headers, status):
    assert client.request(method, path, headers={"host": "127.0.0.1:3000"} | headers).status_code == status


def test_whoever_listens_on_all_addresses_is_reached_under_any_name(client, monkeypatch):
    monkeypatch.setenv("SYNPO_UI_HOST", "0.0.0.0")
    assert client.get("/assets", headers={"host": "machine.lan:3000"}).status_code == 200
    assert client.get("/assets", headers={"host": "a:1", "origin": "http://b:1"}).status_code == 403
    monkeypatch.setenv("SYNPO_UI_HOST", "machine.lan")
    assert client.get("/assets", headers={"host": "machine.lan:3000"}).status_code == 200
    assert client.get("/assets", headers={"host": "evil.example"}).status_code == 403


def test_whoever_does_not_bring_the_token_is_refused(client, monkeypatch):
    monkeypatch.setenv("SYNPO_UI_TOKEN", "secret")
    for path in ("/assets", "/reports/boosting_report.html", "/?token=", "/?token=wrong", "/assets?token=wrong"):
        assert client.get(path, follow_redirects=False).status_code == 401, path
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/graphql"):
        pass
    arrived = client.get("/?token=secret", follow_redirects=False)
    assert (arrived.status_code, arrived.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=strict"} <= set(arrived.headers["set-cookie"].split("; "))
    assert client.get("/assets").text == "the UI"
    client.cookies.clear()
    client.cookies.set("synpo_token_3000", "wrong")
    assert client.get("/assets").status_code == 401


def test_an_address_that_others_reach_needs_a_token(tmp_path):
    refused = synpo_here("ui", "--host", "0.0.0.0", "--home", tmp_path / "home")
    assert refused.returncode == 2
    assert "add --token" in refused.stderr
    assert not (tmp_path / "home").exists()
