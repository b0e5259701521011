"""Whether a tracker's server can be used: what counts as an answer, and where a key is looked for."""

import io
import socket
import urllib.error
from email.message import Message

import pytest
import wandb

from trainer.runs import server
from trainer.runs.server import unreachable, why_offline

URL = "http://tracker.example:8080"


class Answer(io.BytesIO):
    pass


@pytest.fixture
def asked(monkeypatch):
    """What the server was asked, and (set `asked.error`) how it answers."""

    class Asked(list):
        error: Exception | None = None

        def __call__(self, address, timeout):
            self.append((address, timeout))
            if self.error:
                raise self.error
            return Answer()

    made = Asked()
    monkeypatch.setattr(server.urllib.request, "urlopen", made)
    return made


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: True)
    return tmp_path / "netrc"


@pytest.mark.parametrize("code", [401, 404, 500])
def test_any_answer_is_an_answer(asked, code):
    assert unreachable(URL) is None
    asked.error = urllib.error.HTTPError(URL, code, "no", Message(), io.BytesIO())
    assert unreachable(URL) is None
    assert asked == [(URL, server.WAIT)] * 2
    asked.error.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError(ConnectionRefusedError("Connection refused")), "Connection refused"),
        (urllib.error.URLError(socket.gaierror("Name or service not known")), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError("Connection reset by peer"), "Connection reset by peer"),
    ],
)
def test_no_answer_is_told_with_its_reason(asked, error, reason):
    asked.error = error
    assert unreachable(URL) == f"{URL} cannot be reached ({reason})"


@pytest.mark.parametrize("address", ["tracker", "nosuch://tracker", ""])
def test_what_is_no_address_cannot_be_reached(address):
    assert unreachable(address).startswith(f"{address} cannot be reached (")


def test_without_a_key_the_server_is_not_asked(asked, no_key):
    assert why_offline(URL, None) == why_offline(URL, "") == "no API key is set"
    assert asked == []


@pytest.mark.parametrize("where", ["settings", "key", "token", "netrc"])
def test_a_key_is_found(asked, no_key, monkeypatch, where):
    if where == "netrc":
        no_key.write_text("machine tracker.example:8080 login user password secret\n")
        no_key.chmod(0o600)
    elif where != "settings":
        monkeypatch.setenv({"key": "WANDB_API_KEY", "token": "WANDB_IDENTITY_TOKEN_FILE"}[where], "x")
    assert why_offline(URL, "secret" if where == "settings" else None) is None
    assert [address for address, _ in asked] == [URL]


@pytest.mark.parametrize("content", ["machine other.example login user password secret\n", "machine\n", "nonsense !\n"])
def test_a_netrc_of_other_machines_or_that_cannot_be_read_holds_none(asked, no_key, content):
    no_key.write_text(content)
    no_key.chmod(0o600)
    assert why_offline(URL, None) == "no API key is set"


def test_the_key_of_wandbs_own_server_stands_under_its_usual_name(asked, no_key):
    no_key.write_text("machine api.wandb.ai login user password secret\n")
    no_key.chmod(0o600)
    assert why_offline(wandb.Settings().base_url, None) is None
    assert why_offline(URL, None) == "no API key is set"


def test_what_the_server_or_wandb_refuses_is_the_reason(asked, no_key, monkeypatch):
    def refuses(prompt, verify):
        assert (prompt, verify) == (False, False)  # it never asks, and never waits
        raise wandb.errors.AuthenticationError("API key is too short.\nmore")

    monkeypatch.setattr(wandb, "login", refuses)
    assert why_offline(URL, "x") == "the API key cannot be used (API key is too short.)"
    asked.error = TimeoutError("timed out")
    assert why_offline(URL, "x") == f"{URL} cannot be reached (timed out)"
