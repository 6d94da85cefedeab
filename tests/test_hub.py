"""Model arguments: folders, the demo, and hub ids against a stand-in of the hub's HTTP interface."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from process import run_python

from edgeq.adapters import Given
from edgeq.errors import MemoryBudgetError, NetworkError, UsageError
from edgeq.hub import find_model
from edgeq.testing import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "Qwen/Qwen3.5-Tiny"


class Hub(ThreadingHTTPServer):
    """What of the hub a download needs: repository listing, file metadata, files with ranges."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.break_after: int | None = None  # bytes of a large file before the connection drops, once
        self.trick = ""  # what a hostile or broken server does, see Handler.play
        self.value = ""  # and with which text

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, dict(self.headers)))
        if self.play(path, body):
            return None
        if path.startswith(("/Qwen/Private", "/api/models/Qwen/Private")):
            return self.reply(401, b'{"error": "Invalid credentials"}', {"X-Error-Code": "GatedRepo"}, body)
        if f"/{REPO}" not in path:
            return self.reply(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)
        folder = self.server.folder
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if path.startswith("/api/models/"):
            if "/revision/nope" in path:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            if "/tree/" in path:
                listing: Any = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}
                    for name, file in files.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in files]
                listing = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "private": False}
            return self.reply(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)
        file = folder / unquote(path.split("/resolve/")[-1].partition("/")[2])
        if not file.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        return self.send_file(file, body)

    def play(self, path: str, body: bool) -> bool:
        """Whether the server's trick was the answer."""
        trick, value = self.server.trick, self.server.value
        listing, tree = path.startswith("/api/models/"), "/tree/" in path
        if (trick == "json" and listing) or (trick == "tree" and tree):
            self.reply(200, value.encode(), {"Content-Type": "application/json"}, body)
        elif (trick == "redirects" and not listing) or (trick == "redirected listing" and listing):
            self.reply(302, b"", {"Location": f"{path}?again={len(self.server.requests)}"}, body)
        elif trick == "drop" and self.command == "GET" and path.endswith(".safetensors"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + bytes(1000))
            self.close_connection = True
        elif trick == "no http":
            self.wfile.write(b"\x00\xff not HTTP at all\r\n\r\n")
            self.close_connection = True
        elif trick == "wait":
            self.reply(503, b"", {"Retry-After": value}, body)
        else:
            return False
        return True

    def send_file(self, file: Path, body: bool) -> None:
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.server.trick in headers or self.server.trick.startswith("X-"):
            headers[self.server.trick] = self.server.value
        wanted = self.headers.get("Range")
        if wanted and body:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        limit = self.server.break_after
        if body and limit is not None and len(data) > limit:
            self.server.break_after = None
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[:limit])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.reply(status, data, headers, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    write_checkpoint(folder)
    (folder / "chat_template.jinja").write_text("x")
    (folder / "README.md").write_text("not wanted")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(
    hub: Hub, tmp_path: Path, *models: str, find: str = "edgeq.hub.find_model", **environment: str
) -> subprocess.CompletedProcess[str]:
    """find_model, or another function, in a process of its own: huggingface_hub reads its environment when imported.

    A line of output for each model; errors on stderr, and the exit code is the last one's.
    """
    code = (
        "import sys\n"
        "from edgeq.errors import EdgeqError\n"
        f"from {find.rpartition('.')[0]} import {find.rpartition('.')[2]} as find\n"
        "code = 0\n"
        "for model in sys.argv[1:]:\n"
        "    try:\n"
        "        print(find(model))\n"
        "    except EdgeqError as e:\n"
        "        code = e.exit_code\n"
        "        print(f'{type(e).__name__}: {e.message} | {e.hint}', file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    settings = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return run_python(code, *models, without=("HF_", "HUGGING"), timeout=60, **{**settings, **environment})


class TestHub:
    def test_download_into_the_standard_cache_and_reuse(self, hub: Hub, tmp_path: Path) -> None:
        result = fetch(hub, tmp_path, REPO, HF_TOKEN="hf_secret")
        assert result.returncode == 0, result.stderr
        folder = Path(result.stdout.strip())
        assert folder == tmp_path / "hf" / "hub" / "models--Qwen--Qwen3.5-Tiny" / "snapshots" / COMMIT
        assert sorted(f.name for f in folder.iterdir()) == ["chat_template.jinja", "config.json", "model.safetensors"]
        assert any(h.get("authorization") == "Bearer hf_secret" or h.get("Authorization") == "Bearer hf_secret"
                   for _, _, h in hub.requests)  # fmt: skip

        hub.requests.clear()
        assert fetch(hub, tmp_path, REPO).stdout.strip() == str(folder)
        assert not any(path.endswith(".safetensors") and method == "GET" for method, path, _ in hub.requests)

        hub.requests.clear()
        offline = fetch(hub, tmp_path, REPO, HF_HUB_OFFLINE="1")
        assert offline.stdout.strip() == str(folder)
        assert not hub.requests

    def test_an_adapter(self, hub: Hub, tmp_path: Path) -> None:
        """By its name, with a scale or without; as a model it says what it is."""
        for name in ("config.json", "model.safetensors"):
            (hub.folder / name).unlink()
        (hub.folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3.5-2B"}')
        (hub.folder / "adapter_model.safetensors").write_bytes(bytes(16))
        folder = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3.5-Tiny" / "snapshots" / COMMIT
        given = fetch(hub, tmp_path, f"{REPO}:0.5", REPO, find="edgeq.adapters.given_adapters")
        assert given.returncode == 0, given.stderr
        assert given.stdout.split("\n")[:2] == [f"[{Given(folder, scale)!r}]" for scale in (0.5, 1.0)]
        assert (folder / "adapter_model.safetensors").exists()
        model = fetch(hub, tmp_path, REPO)
        assert model.returncode == 4
        assert "is an adapter for Qwen/Qwen3.5-2B, not a model" in model.stderr
        wrong = fetch(hub, tmp_path, "nothing at all", f"{REPO}:Q4_K_M", find="edgeq.adapters.given_adapters")
        assert wrong.returncode == 2
        assert wrong.stderr.count("adapter not found") == 2

    def test_a_broken_download_resumes(self, hub: Hub, tmp_path: Path) -> None:
        large = hub.folder / "extra.safetensors"  # the library keeps what it has in pieces of 10 MB
        large.write_bytes(bytes(range(256)) * 100_000)
        hub.break_after = 15_000_000
        result = fetch(hub, tmp_path, REPO)
        if result.returncode:  # the library gave up on the broken connection: the same command goes on
            assert "NetworkError" in result.stderr
            result = fetch(hub, tmp_path, REPO)
        assert result.returncode == 0, result.stderr
        assert (Path(result.stdout.strip()) / large.name).read_bytes() == large.read_bytes()
        gets = [headers for method, path, headers in hub.requests if method == "GET" and path.endswith(large.name)]
        assert len(gets) == 2
        assert (gets[1].get("Range") or gets[1].get("range") or "").startswith("bytes=1")

    @pytest.mark.parametrize(
        ("model", "environment", "message"),
        [
            ("Qwen/Nope", {}, "Qwen/Nope is not on the Hugging Face Hub, or is private"),
            ("Qwen/Private", {}, "Qwen/Private needs permission"),
            (f"{REPO}@nope", {}, "has no revision 'nope'"),
            (REPO, {"HF_HUB_OFFLINE": "1"}, "is not in the local cache"),
            (REPO, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Hugging Face Hub cannot be reached"),
        ],
    )
    def test_what_cannot_be_had(
        self, hub: Hub, tmp_path: Path, model: str, environment: dict[str, str], message: str
    ) -> None:
        result = fetch(hub, tmp_path, model, **environment)
        assert result.returncode == 5, result.stderr
        assert message in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr


class TestGGUF:
    """A repository of GGUF files: which is meant, and what comes along."""

    FILES = (
        "config.json", "imatrix_data.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf", "M-Q4_K_M.gguf",
        "M-Q4_K_M_L.gguf", "M-UD-Q4_K_M.gguf", "M-UD-Q2_K_XL.gguf", "M-imatrix-IQ4_XS.gguf", "M_q8_0.gguf",
        "BF16/M-BF16-00001-of-00002.gguf", "BF16/M-BF16-00002-of-00002.gguf",
    )  # fmt: skip

    @pytest.fixture
    def repository(self, hub: Hub) -> Hub:
        for file in hub.folder.iterdir():
            file.unlink()
        for name in self.FILES:
            (hub.folder / name).parent.mkdir(exist_ok=True)
            (hub.folder / name).write_bytes(b"GGUF" + name.encode())
        return hub

    def test_the_file_that_is_meant(self, repository: Hub, tmp_path: Path) -> None:
        meant = {
            f"{REPO}:Q4_K_M": "M-Q4_K_M.gguf",
            f"{REPO}:q4_k_m_l@main": "M-Q4_K_M_L.gguf",
            f"{REPO}:UD-Q4_K_M": "M-UD-Q4_K_M.gguf",
            f"{REPO}:Q2_K_XL": "M-UD-Q2_K_XL.gguf",
            f"{REPO}:Q8_0": "M_q8_0.gguf",
            f"hf.co/{REPO}:BF16": "BF16/M-BF16-00001-of-00002.gguf",
            f"{REPO}/BF16/M-BF16-00002-of-00002.gguf": "BF16/M-BF16-00001-of-00002.gguf",
            f"https://huggingface.co/{REPO}/resolve/main/M-imatrix-IQ4_XS.gguf?download=true": "M-imatrix-IQ4_XS.gguf",
        }
        result = fetch(repository, tmp_path, *meant)
        assert result.returncode == 0, result.stderr
        snapshot = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3.5-Tiny" / "snapshots" / COMMIT
        assert result.stdout.splitlines() == [str(snapshot / file) for file in meant.values()]
        got = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")}
        assert got == {*meant.values(), "BF16/M-BF16-00002-of-00002.gguf", "mmproj-F16.gguf"}  # the only tower

    def test_offline_it_is_the_copy_in_the_cache(self, repository: Hub, tmp_path: Path) -> None:
        first = fetch(repository, tmp_path, f"{REPO}:Q4_K_M")
        again = fetch(repository, tmp_path, f"{REPO}:Q4_K_M", f"{REPO}:Q8_0", HF_HUB_OFFLINE="1")
        assert again.stdout == first.stdout != ""
        assert again.returncode == UsageError.exit_code
        assert "holds no GGUF model of Q8_0" in again.stderr

    def test_what_is_not_clear(self, repository: Hub, tmp_path: Path) -> None:
        unclear = {
            REPO: ["holds 7 GGUF models:", "M-Q4_K_M.gguf", "BF16/M-BF16-00001-of-00002.gguf"],
            f"{REPO}:Q5_K": ["holds no GGUF model of Q5_K, but:", "M-imatrix-IQ4_XS.gguf"],
            f"{REPO}/M-Q3_K_S.gguf": ["holds no M-Q3_K_S.gguf", "M-imatrix-IQ4_XS.gguf"],
            "Qwen/Nope:Q4_K_M": ["Qwen/Nope is not on the Hugging Face Hub, or is private"],
        }
        result = fetch(repository, tmp_path, *unclear)
        assert result.returncode == NetworkError.exit_code, result.stderr
        said = re.split("^(?=[A-Z][a-z]+Error: )", result.stderr, flags=re.MULTILINE)[1:]
        assert [message.split(":")[0] for message in said] == ["UsageError"] * 3 + ["NetworkError"]
        for message, expected in zip(said, unclear.values(), strict=True):
            assert all(words in message for words in expected), message
            assert "mmproj" not in message
        assert f"as {REPO}:BF16, or by its file, as {REPO}/BF16/M-BF16-00001" in result.stderr
        assert not list((tmp_path / "hf").rglob("*.gguf"))

    def test_the_only_one(self, repository: Hub, tmp_path: Path) -> None:
        for name in self.FILES[5:]:
            (repository.folder / name).unlink()
        (repository.folder / "model.gguf").write_bytes(b"GGUF")
        assert fetch(repository, tmp_path, REPO).stdout.strip().endswith(f"{COMMIT}/model.gguf")

    def test_nothing_that_edgeq_opens(self, repository: Hub, tmp_path: Path) -> None:
        for name in self.FILES:
            (repository.folder / name).unlink()
        (repository.folder / "pytorch_model.bin").write_bytes(b"x")
        result = fetch(repository, tmp_path, REPO)
        assert result.returncode == 4, result.stderr
        assert "Qwen/Qwen3.5-Tiny holds PyTorch weights (pytorch_model.bin), which edgeq does not read" in result.stderr


def outside(tmp_path: Path) -> list[Path]:
    """Files that a download has left anywhere but in its cache."""
    cache, repository = tmp_path / "hf", tmp_path / "repository"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    return [path for path in files if cache not in path.parents and repository not in path.parents]


def listing(**change: Any) -> str:
    """A model's description as the hub gives it, with something changed."""
    siblings = [{"rfilename": "config.json"}]
    return json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, **change})


def tree(**change: Any) -> str:
    """A list of files as the hub gives it, with something changed in one."""
    return json.dumps([{"type": "file", "path": "config.json", "size": 2, "oid": "ab" * 20, **change}])


class PanicException(BaseException):
    """What a library written in Rust raises when it gives up."""


class TestHostileHub:
    """A server that is broken or means harm: one clear NetworkError, and nothing outside of the cache."""

    @pytest.mark.parametrize(
        ("trick", "value"),
        [
            ("ETag", '"../../../../escaped"'),
            pytest.param("ETag", "W/../../../../escaped", marks=pytest.mark.slow),
            pytest.param("ETag", '"/tmp/escaped"', marks=pytest.mark.slow),
            pytest.param("ETag", '".."', marks=pytest.mark.slow),
            ("ETag", '"a\\..\\b"'),
            pytest.param("X-Linked-Etag", '"../../../escaped"', marks=pytest.mark.slow),
            ("X-Repo-Commit", "../../../escaped"),
            ("json", listing(sha="../../../escaped")),
            pytest.param("json", listing(siblings=[{"rfilename": "../../../escaped.json"}]), marks=pytest.mark.slow),
            ("tree", tree(path="../../../escaped.json")),
            pytest.param("tree", tree(path="/tmp/escaped.json"), marks=pytest.mark.slow),
            pytest.param("tree", tree(path="a//b.json"), marks=pytest.mark.slow),
            ("tree", tree(path="new\nline.json")),
            ("tree", tree(path="esc\x1b[2J.json")),
            pytest.param("tree", tree(path="x" * 300 + ".json"), marks=pytest.mark.slow),
            ("tree", tree(lfs={"oid": "../../../escaped", "size": 2, "pointerSize": 1})),
            pytest.param("tree", tree(oid="../escaped"), marks=pytest.mark.slow),
        ],
    )
    def test_names_that_leave_the_cache_are_refused(self, hub: Hub, tmp_path: Path, trick: str, value: str) -> None:
        hub.trick, hub.value = trick, value
        result = fetch(hub, tmp_path, REPO)
        assert result.returncode == 5, result.stderr
        assert "which cannot be the name of a file" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert outside(tmp_path) == []

    @pytest.mark.parametrize(
        ("trick", "value"),
        [
            pytest.param("json", "[]", marks=pytest.mark.slow),
            pytest.param("json", "null", marks=pytest.mark.slow),
            ("json", '{"sha": null}'),
            ("json", '{"sha": 7, "siblings": 3}'),
            pytest.param("json", "{", marks=pytest.mark.slow),
            ("json", "[" * 100_000),
            pytest.param("tree", '{"a": 1}', marks=pytest.mark.slow),
            ("tree", '[{"type": "file"}]'),
            pytest.param("tree", "[[1], null, {}]", marks=pytest.mark.slow),
            ("redirects", ""),
            pytest.param("redirected listing", "", marks=pytest.mark.slow),
            ("no http", ""),
            ("wait", "100000"),
        ],
    )
    def test_nonsense_is_a_network_error(self, hub: Hub, tmp_path: Path, trick: str, value: str) -> None:
        hub.trick, hub.value = trick, value
        result = fetch(hub, tmp_path, REPO)
        assert result.returncode == 5, result.stderr
        assert result.stderr.splitlines()[-1].startswith("NetworkError: ")
        assert "Traceback" not in result.stderr

    @pytest.mark.slow
    def test_a_connection_that_always_drops(self, hub: Hub, tmp_path: Path) -> None:
        hub.trick = "drop"
        result = fetch(hub, tmp_path, REPO)
        assert result.returncode == 5, result.stderr
        assert "cannot be downloaded" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9"])
    def test_proxies_that_cannot_be_used(self, hub: Hub, tmp_path: Path, proxy: str) -> None:
        result = fetch(hub, tmp_path, REPO, ALL_PROXY=proxy, HTTP_PROXY=proxy, NO_PROXY="")
        assert result.returncode == 5, result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("setting", [{"HF_HUB_DOWNLOAD_TIMEOUT": "soon"}, {"HF_ENDPOINT": "nonsense"}])
    def test_settings_that_make_no_sense(self, hub: Hub, tmp_path: Path, setting: dict[str, str]) -> None:
        result = fetch(hub, tmp_path, REPO, **setting)
        assert result.returncode == 5, result.stderr
        assert "Traceback" not in result.stderr

    def test_a_cache_that_cannot_be_written(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "hf").write_text("a file where the cache should be")
        result = fetch(hub, tmp_path, REPO)
        assert result.returncode == 5, result.stderr
        assert "Traceback" not in result.stderr

    def test_a_full_disk_is_a_lack_of_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("huggingface_hub.snapshot_download", full)
        with pytest.raises(MemoryBudgetError, match="does not fit the disk") as caught:
            find_model(REPO)
        assert "the download resumes" in (caught.value.hint or "")

    @pytest.mark.parametrize(
        "error", [type("PanicException", (BaseException,), {})("x"), KeyError("x"), AssertionError()]
    )
    def test_whatever_else_comes_out_of_it(self, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(NetworkError, match="cannot be downloaded"):
            find_model(REPO)


class TestNames:
    def test_a_folder_is_itself(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_checkpoint(folder)
        assert find_model(folder) == folder
        assert find_model(str(folder)) == folder

    @pytest.mark.parametrize(
        "name",
        [
            "", "no such folder", "a/b/c", "./nothing", "/nothing/here", "x.gguf", "~nosuchuser", "~nosuchuser/x",
            "x" * 300, "/" + "x" * 5000, "null\0byte", "\udcff", f"{REPO}@../../x", f"{REPO}@a/..", f"{REPO}@/x",
            f"{REPO}:", f"{REPO}/../x.gguf", f"https://example.com/{REPO}", f"https://huggingface.co/{REPO}/blob/main/../x.gguf",
        ],
    )  # fmt: skip
    def test_what_can_be_nothing(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match=r"model not found: .*not a local path or a Hugging Face ID"):
            find_model(name)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("qwen3.5:2b", ("Qwen/Qwen3.5-2B", None, None, None)),
            ("Qwen3.5-0.8B", ("Qwen/Qwen3.5-0.8B", None, None, None)),
            ("qwen3.5:4b-base", ("Qwen/Qwen3.5-4B-Base", None, None, None)),
            ("a/b@v1", ("a/b", "v1", None, None)),
            ("a/b:UD-Q4_K_XL", ("a/b", None, "UD-Q4_K_XL", None)),
            ("a/b:Q4_0@refs/pr/1", ("a/b", "refs/pr/1", "Q4_0", None)),
            ("a/b/c d.gguf", ("a/b", None, None, "c d.gguf")),
            ("a/b/BF16/c-00001-of-00002.GGUF@v1", ("a/b", "v1", None, "BF16/c-00001-of-00002.GGUF")),
            ("hf.co/a/b:Q8_0", ("a/b", None, "Q8_0", None)),
            ("huggingface.co/a/b", ("a/b", None, None, None)),
            ("https://huggingface.co/a/b/", ("a/b", None, None, None)),
            ("https://huggingface.co/a/b?library=mlx", ("a/b", None, None, None)),
            ("https://huggingface.co/a/b/tree/v1", ("a/b", "v1", None, None)),
            ("https://huggingface.co/a/b/blob/main/x/c.gguf", ("a/b", "main", None, "x/c.gguf")),
            ("https://huggingface.co/a/b/resolve/main/c.gguf?download=true", ("a/b", "main", None, "c.gguf")),
            ("https://huggingface.co/a/b/blob/main/config.json", ("a/b", "main", None, None)),
        ],
    )
    def test_names_of_the_hub(
        self, name: str, expected: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[str | None, ...]] = []
        monkeypatch.setattr("edgeq.hub._from_hub", lambda *names: asked.append(names))
        find_model(name)
        assert asked == [expected]
