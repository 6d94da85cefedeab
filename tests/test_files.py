"""Results appear whole or not at all, replace nothing they were not told to, and dead runs leave nothing for ever."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from process import ROOT, run_python
from tiny_tokenizer import build_tiny_tokenizer

from edgeq.checkpoint import open_checkpoint
from edgeq.cli import main
from edgeq.errors import EdgeqError, MemoryBudgetError, UsageError
from edgeq.files import find_leftovers, new_file, new_folder, pieces, publish, rename
from edgeq.files.pieces import PieceWriter
from edgeq.quant import quantize, verify
from edgeq.quant.gguf_export import export_gguf
from edgeq.testing import config_values, write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "source"
    write_checkpoint(folder, config_values(vision=True, vocab_size=1088))
    build_tiny_tokenizer(folder)
    return folder


@pytest.fixture(params=["exchange", "no exchange", "nothing"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Systems that can exchange names, that can only rename without replacing, and that can do neither."""
    if request.param != "exchange":
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    if request.param == "nothing":
        monkeypatch.setattr(rename, "_call", lambda *_: False)
    return str(request.param)


def anything(_: Path) -> None:
    """May be replaced."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def kill_a_writer(out: Path) -> None:
    """A workspace beside `out` whose maker was killed in the middle of it."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from edgeq.files import new_folder\n"
        "with new_folder(Path(sys.argv[1]), may_replace=lambda _: None) as folder:\n"
        "    (folder / 'weights').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run_python(code, str(out)).returncode == -9


class TestPublishing:
    def test_file_and_folder(self, tmp_path: Path, system: str) -> None:
        with new_file(tmp_path / "sub/file") as path:
            path.write_text("x")
        with new_folder(tmp_path / "folder") as folder:
            (folder / "a").write_text("y")
        assert content(tmp_path) == {"sub/file": b"x", "folder/a": b"y"}
        assert names(tmp_path) == ["folder", "sub"]

    def test_permissions_are_the_users(self, tmp_path: Path) -> None:
        with new_file(tmp_path / "file") as path:
            path.write_text("x")
        with new_folder(tmp_path / "folder"):
            pass
        mask = os.umask(0)
        os.umask(mask)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
        assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask

    @pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
    def test_what_appears_meanwhile_is_kept_and_so_is_the_result(
        self, tmp_path: Path, system: str, make: Callable[[Path], None]
    ) -> None:
        told = pytest.raises(EdgeqError, match=r"appeared while this run.*result is in .*out-2")
        with told as caught, new_folder(tmp_path / "out") as folder:
            (folder / "new").write_text("x")
            make(tmp_path / "out")
            if (tmp_path / "out").is_dir():
                (tmp_path / "out/mine").touch()
        assert caught.value.exit_code == 1
        assert names(tmp_path) == ["out", "out-2"]
        assert names(tmp_path / "out-2") == ["new"]

    def test_a_file_that_appears_meanwhile(self, tmp_path: Path, system: str) -> None:
        (tmp_path / "m-2.gguf").write_text("taken")
        with pytest.raises(EdgeqError, match=r"m-3\.gguf"), new_file(tmp_path / "m.gguf") as path:  # noqa: PT012
            path.write_text("new")
            (tmp_path / "m.gguf").write_text("mine")
        assert content(tmp_path) == {"m.gguf": b"mine", "m-2.gguf": b"taken", "m-3.gguf": b"new"}

    def test_what_may_not_be_replaced_any_more(self, tmp_path: Path, system: str) -> None:
        out = tmp_path / "out"
        out.write_text("old")

        def may_replace(path: Path) -> None:
            if path.read_text() != "old":
                raise UsageError("it is precious")

        told = pytest.raises(EdgeqError, match=r"changed while.*it is precious.*out-2")
        with told, new_file(out, may_replace=may_replace) as path:
            path.write_text("new")
            out.write_text("precious")
        assert content(tmp_path) == {"out": b"precious", "out-2": b"new"}

    def test_what_changes_at_the_very_last_moment(self, tmp_path: Path, system: str) -> None:
        """Between the last look at what is there and its replacement: what came out is looked at again."""
        out, looks = tmp_path / "out", []
        out.write_text("old")

        def may_replace(path: Path) -> None:
            looks.append(path.read_text())
            if looks[-1] != "old":
                raise UsageError("it is precious")
            if len(looks) == 2:
                out.write_text("precious")

        with pytest.raises(EdgeqError, match="it is precious"), new_file(out, may_replace=may_replace) as path:
            path.write_text("new")
        assert looks == ["old", "old", "precious"]
        assert out.read_text() == "precious"
        assert names(tmp_path)[-2:] in (["out", "out-2"],)

    def test_what_was_to_be_replaced_goes(self, tmp_path: Path, system: str) -> None:
        (tmp_path / "out").write_text("old")
        with new_file(tmp_path / "out", may_replace=anything) as path:
            path.write_text("new")
            (tmp_path / "out").unlink()
        assert content(tmp_path) == {"out": b"new"}

    def test_what_the_system_does_not_let_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Such as a file that something is mounted on: the work of hours is not thrown away for it."""

        def busy(*_: object) -> bool:
            raise OSError(errno.EBUSY, "busy")

        (tmp_path / "out").write_text("old")
        monkeypatch.setattr(publish, "exchange", busy)
        with (
            pytest.raises(EdgeqError, match=r"could not be replaced \(busy\).*result is in .*out-2"),
            new_file(tmp_path / "out", may_replace=anything) as path,
        ):
            path.write_text("new")
        assert content(tmp_path) == {"out": b"old", "out-2": b"new"}

    def test_unknown_errors_of_the_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for number, kind in (
            (errno.EIO, EdgeqError),
            (errno.ENOSPC, MemoryBudgetError),
            (errno.EDQUOT, MemoryBudgetError),
        ):
            with pytest.raises(kind, match="out could not be written"), new_file(tmp_path / "out") as path:  # noqa: PT012
                path.write_text("half")
                raise OSError(number, os.strerror(number))
        assert names(tmp_path) == []

    def test_names_that_are_long_or_odd(self, tmp_path: Path) -> None:
        for name in ("x" * 230, "a [b] *", "é\udce9", "line\nline", "-o", "...x"):
            with new_file(tmp_path / name) as path:
                path.write_text("x")
        with pytest.raises(EdgeqError, match="File name too long"), new_file(tmp_path / ("x" * 255)):
            pass
        assert len(names(tmp_path)) == 6


class TestRenames:
    def test_neither_way_replaces(self, tmp_path: Path, system: str) -> None:
        for make in (Path.touch, Path.mkdir):
            old, new = tmp_path / f"old{make}", tmp_path / f"new{make}"
            make(old)
            for there in ("file", "folder", "link"):
                if there == "file":
                    new.touch()
                elif there == "folder":
                    new.mkdir()
                    (new / "x").touch()
                else:
                    new.symlink_to("nowhere")
                with pytest.raises(FileExistsError):
                    rename.rename_new(old, new)
                assert os.path.lexists(old)
                if there == "folder":
                    (new / "x").unlink()
                    new.rmdir()
                else:
                    new.unlink()
            rename.rename_new(old, new)
            assert not old.exists()
            assert new.exists()

    def test_where_there_are_no_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, "no links")

        monkeypatch.setattr(rename, "_call", lambda *_: False)
        monkeypatch.setattr(os, "link", refuse)
        (tmp_path / "old").write_text("x")
        rename.rename_new(tmp_path / "old", tmp_path / "new")
        (tmp_path / "old").write_text("y")
        with pytest.raises(FileExistsError):
            rename.rename_new(tmp_path / "old", tmp_path / "new")
        assert content(tmp_path) == {"old": b"y", "new": b"x"}


class TestDeadRuns:
    def test_the_next_run_to_the_same_output_clears_up(self, tmp_path: Path) -> None:
        kill_a_writer(tmp_path / "out")
        kill_a_writer(tmp_path / "other")
        assert [(leftover.target.name, leftover.state) for leftover in find_leftovers(tmp_path)] == [
            ("other", "dead"), ("out", "dead")
        ]  # fmt: skip
        with new_folder(tmp_path / "out"):
            pass
        assert [leftover.target.name for leftover in find_leftovers(tmp_path)] == ["other"]

    def test_room_is_counted_after_clearing_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kill_a_writer(tmp_path / "out")

        def check(*_: object) -> None:
            assert names(tmp_path) == []

        monkeypatch.setattr(publish, "check_room", check)
        with new_file(tmp_path / "out") as path:
            path.touch()

    def test_old_goes_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Killed between setting the old result aside and giving its name to the new one."""
        (tmp_path / "out").write_text("old")
        code = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from edgeq.files import publish, new_file\n"
            "publish.exchange = lambda *_: False\n"
            "rename_new, calls = publish.rename_new, []\n"
            "def killed(*paths):\n"
            "    calls.append(paths)\n"
            "    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 2 else rename_new(*paths)\n"
            "publish.rename_new = killed\n"
            "with new_file(Path(sys.argv[1]), may_replace=lambda _: None) as path:\n"
            "    path.write_text('new')\n"
        )
        assert run_python(code, str(tmp_path / "out")).returncode == -9
        (leftover,) = find_leftovers(tmp_path)
        assert not (tmp_path / "out").exists()
        assert leftover.remove()
        assert content(tmp_path) == {"out": b"old"}

    def test_a_living_writer_is_left_alone(self, tmp_path: Path) -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").touch()
            (leftover,) = find_leftovers(tmp_path)
            assert leftover.state == "alive"
            assert not leftover.remove()
            with pytest.raises(UsageError, match="another run is writing"), new_folder(tmp_path / "out"):
                pass
            assert (folder / "a").exists()

    def test_only_what_is_certain_to_be_ours(self, tmp_path: Path) -> None:
        for name in (".out.partial-notes", ".out.partial-12345678"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").touch()
        (tmp_path / ".out.partial-abcdefgh").touch()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/result").touch()
        (tmp_path / ".out.partial-aaaaaaaa").symlink_to("elsewhere")
        before = names(tmp_path)
        with new_file(tmp_path / "out") as path:
            path.touch()
        assert names(tmp_path) == sorted([*before, "out"])
        assert names(tmp_path / "elsewhere") == ["result"]

    def test_doctor_lists_and_clean_removes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(*arguments: str) -> str:
            with pytest.raises(SystemExit) as left:
                main([*arguments, str(tmp_path)])
            assert not left.value.code
            captured = capsys.readouterr()
            return captured.out + captured.err

        kill_a_writer(tmp_path / "out")
        (left,) = names(tmp_path)
        with open(os.devnull) as nobody, new_file(tmp_path / "alive") as alive:  # noqa: PTH123
            monkeypatch.setattr(sys, "stdin", nobody)
            alive.touch()
            assert re.search(
                f"{left} +0.0 MB, unfinished result of a run that was killed", run("doctor", "--no-measure")
            )
            assert "add --yes" in run("clean")
            assert left in names(tmp_path)
            assert "removed 1" in run("clean", "--yes")
            assert alive.exists()
        assert names(tmp_path) == ["alive"]
        assert "nothing to remove" in run("clean")


class TestTwoWriters:
    RECIPES = ("q4", "q8")
    TOLD = re.compile("another run is writing|appeared while|exists")

    @staticmethod
    def whole(folder: Path) -> None:
        """One run's config with the same run's weights."""
        verify(folder)
        open_checkpoint(folder)

    @pytest.mark.parametrize("force", [False, True])
    def test_threads_have_one_process_number(self, source: Path, tmp_path: Path, force: bool) -> None:
        for attempt in range(4):
            out = tmp_path / f"out{attempt}"
            outcomes: list[object] = []
            start = threading.Barrier(2)

            def write(recipe: str, out: Path = out, start: Any = start, outcomes: list[object] = outcomes) -> None:
                start.wait()
                try:
                    outcomes.append(quantize(source, out, recipe=recipe, force=force, threads=1))
                except EdgeqError as error:
                    outcomes.append(error)

            threads = [threading.Thread(target=write, args=(recipe,)) for recipe in self.RECIPES]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.whole(out)
            told = [str(outcome) for outcome in outcomes if isinstance(outcome, EdgeqError)]
            assert len(told) < 2
            assert all(map(self.TOLD.search, told))
            for name in names(tmp_path):
                assert name.startswith("out")
                self.whole(tmp_path / name)

    def test_processes_that_are_all_number_1(self, source: Path, tmp_path: Path) -> None:
        code = (
            "import os, sys\n"
            "os.getpid = lambda: 1\n"
            "from edgeq.cli import main\n"
            "print('ready', flush=True); sys.stdin.read(1)\n"
            "main(sys.argv[1:])\n"
        )
        paths = os.pathsep.join([*(p for p in sys.path if p), str(ROOT)])
        runs = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", code, "quantize", source, "-o", tmp_path / "out", "--recipe", recipe],
                env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for recipe in self.RECIPES
        ]  # fmt: skip
        for process in runs:
            assert process.stdout is not None
            process.stdout.readline()
        for process in runs:
            assert process.stdin is not None
            process.stdin.write("g")
            process.stdin.flush()
        ends = [(*process.communicate(), process.returncode) for process in runs]
        assert 0 in [status for _, _, status in ends]
        for _, text, status in ends:
            assert status == 0 or self.TOLD.search(text)
        for name in names(tmp_path):
            self.whole(tmp_path / name)

    def test_tables_of_concurrent_builders(self, source: Path, tmp_path: Path) -> None:
        paths = [tmp_path / "table"] * 8

        def build(path: Path) -> None:
            with new_file(path, may_replace=anything, alone=False) as partial:
                partial.write_text("whole")
                time.sleep(0.01)

        threads = [threading.Thread(target=build, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert content(tmp_path) == {"table": b"whole"}
        assert names(tmp_path) == ["table"]


class TestWhatForceNeverReplaces:
    @pytest.fixture
    def model(self, source: Path, tmp_path: Path) -> Path:
        import shutil

        return Path(shutil.copytree(source, tmp_path / "model"))

    def refused(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert left.value.code == 2
        notes, begins, error = capsys.readouterr().err.partition("error: ")
        assert begins
        assert all(line.startswith("note: the folder ") for line in notes.splitlines())
        assert "Traceback" not in error
        return error

    def test_files_of_the_source(self, model: Path, tmp_path: Path, capsys: Any) -> None:
        before = content(model)
        (tmp_path / "hard.gguf").hardlink_to(model / "model.safetensors")
        (tmp_path / "hard.json").hardlink_to(model / "config.json")
        (tmp_path / "same").symlink_to(model)
        for target in (model / "model.safetensors", tmp_path / "same/tokenizer.json", tmp_path / "hard.gguf"):
            assert "a file of the source" in self.refused(capsys, "export", model, "-o", target, "--force")
        for target in (model / "config.json", tmp_path / "same/config.json", tmp_path / "hard.json"):
            for more in (["-o", tmp_path / "out"], ["--dry-run"]):
                error = self.refused(capsys, "quantize", model, *more, "--report", target, "--force")
                assert "a file of the source" in error
        error = self.refused(capsys, "quantize", model, "--dry-run", "--report", model / "generation_config.json")
        assert "would be part of the source" in error
        assert content(model) == before

    def test_a_gguf_source(self, model: Path, tmp_path: Path, capsys: Any) -> None:
        file, tower = tmp_path / "m.gguf", tmp_path / "mmproj-m.gguf"
        assert main is not None
        with pytest.raises(SystemExit):
            main(["export", str(model), "-o", str(file), "--mmproj", str(tower)])
        capsys.readouterr()
        for target in (file, tower):
            assert "the source" in self.refused(capsys, "export", file, "-o", target, "--force")
            assert "the source" in self.refused(capsys, "quantize", file, "--dry-run", "--report", target, "--force")

    def test_the_same_file_twice(self, model: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "a.gguf").touch()
        (tmp_path / "b.gguf").hardlink_to(tmp_path / "a.gguf")
        for one, two in (("y.gguf", "y.gguf"), ("y.gguf", "Y.GGUF"), ("e\u0301.gguf", "é.gguf"), ("a.gguf", "b.gguf")):
            outputs = ["-o", tmp_path / one, "--mmproj", tmp_path / two]
            error = self.refused(capsys, "export", model, *outputs, "--force")
            assert "are the same" in error
        report = ["--report", tmp_path / "Out"]
        assert "are the same" in self.refused(capsys, "quantize", model, "-o", tmp_path / "out", *report)
        assert names(tmp_path) == ["a.gguf", "b.gguf", "model"]

    def test_files_of_another_model(self, model: Path, tmp_path: Path, capsys: Any) -> None:
        """No model survives an export in place of its weights, nor a new shard beside them."""
        quantize(model, tmp_path / "other")
        before = content(tmp_path / "other")
        (tmp_path / "link").symlink_to("other")
        for name in (
            "other/model.safetensors",
            "other/config.json",
            "link/tokenizer.json",
            "other/model-2.safetensors",
        ):
            for command in (["export", model, "-o"], ["quantize", model, "--dry-run", "--report"]):
                error = self.refused(capsys, *command, tmp_path / name, "--force")
                assert "would be part of the model in" in error
        assert content(tmp_path / "other") == before
        quantize(model, None, dry_run=True, report=tmp_path / "other/report.json")

    def test_one_result_within_the_other(self, model: Path, tmp_path: Path, capsys: Any) -> None:
        for one, two in (("y.gguf", "y.gguf/m.gguf"), ("y.gguf/x.gguf", "y.gguf"), ("a/../y", "y/b/m.gguf")):
            outputs = ["-o", tmp_path / one, "--mmproj", tmp_path / two]
            assert "which is written too" in self.refused(capsys, "export", model, *outputs, "--force")
        for out, report in (("r/out", "r"), ("out", "out/r.json"), ("r/a/b/out", "r/a")):
            outputs = ["-o", tmp_path / out, "--report", tmp_path / report]
            assert "which is written too" in self.refused(capsys, "quantize", model, *outputs)
        assert names(tmp_path) == ["model"]

    @pytest.mark.parametrize(
        "name", ["model/config.json/x", "model/config.json/x/y", "loop/x", "n" * 300, "ok/" * 2000]
    )
    def test_where_nothing_can_be(self, model: Path, tmp_path: Path, capsys: Any, name: str) -> None:
        (tmp_path / "loop").symlink_to("loop")
        for command in (["quantize", model], ["export", model], ["quantize", model, "--dry-run", "--report"]):
            option = [] if "--report" in command else ["-o"]
            for more in ([], ["--force"]):
                assert "cannot be written" in self.refused(capsys, *command, *option, tmp_path / name, *more)
        assert names(tmp_path) == ["loop", "model"]

    def test_a_current_folder_that_is_gone(
        self, model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        for command in ("quantize", "export"):
            assert "the current folder is gone" in self.refused(capsys, command, model, "-o", "out")
        quantize(model, tmp_path / "out")

    def test_a_mount_point(self, model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
        error = self.refused(capsys, "quantize", model, "-o", tmp_path / "out", "--force")
        assert "is a mount point" in error

    def test_what_is_no_plain_file(self, model: Path, tmp_path: Path, capsys: Any) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        server = socket.socket(socket.AF_UNIX)
        here = Path.cwd()
        os.chdir(tmp_path)  # the names of sockets are short
        server.bind("socket")
        os.chdir(here)
        kinds = {"/dev/null": "a device", "pipe": "a named pipe", "folder": "a folder", "socket": "a socket"}
        for name, kind in kinds.items():
            for more in ([], ["--force"]):
                assert kind in self.refused(capsys, "export", model, "-o", tmp_path / name, *more)
                assert kind in self.refused(capsys, "quantize", model, "--dry-run", "--report", tmp_path / name, *more)
                if kind != "a folder":
                    assert kind in self.refused(capsys, "quantize", model, "-o", tmp_path / name, *more)
        server.close()

    def test_links_are_refused_and_named(self, model: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "to-there").symlink_to("there")
        (tmp_path / "dangling").symlink_to("nowhere")
        for link, target in (("to-there", "there"), ("dangling", "nowhere")):
            for more in ([], ["--force"]):
                for command in (["quantize", model], ["export", model]):
                    error = self.refused(capsys, *command, "-o", tmp_path / link, *more)
                    assert "is a symbolic link" in error
                    assert target in error
        assert names(tmp_path / "there") == []
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize(
        ("entries", "problem"),
        [
            (["config.json", ".git/HEAD"], "it holds .git"),
            (["config.json", "model.safetensors", ".git/HEAD"], "it holds .git"),
            (["config.json", "model.safetensors", "notes.txt"], "it holds notes.txt"),
            (["config.json"], "it has no model*.safetensors"),
            (["model.safetensors"], "it has no config.json"),
            (["config.json", "other.safetensors"], "it holds other.safetensors"),
        ],
    )
    def test_folders_that_are_no_models(
        self, model: Path, tmp_path: Path, capsys: Any, entries: list[str], problem: str
    ) -> None:
        for entry in entries:
            (tmp_path / "out" / entry).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / entry).touch()
        before = content(tmp_path / "out")
        error = self.refused(capsys, "quantize", model, "-o", tmp_path / "out", "--force")
        assert "is not a model folder" in error
        assert problem in error
        assert content(tmp_path / "out") == before

    def test_the_current_folder(
        self, model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here/below").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here/below")
        for out in (tmp_path / "here/below", tmp_path / "here", "../below"):
            assert "the current folder" in self.refused(capsys, "quantize", model, "-o", out, "--force")

    def test_a_folder_that_the_source_needs(self, model: Path, tmp_path: Path, capsys: Any) -> None:
        quantize(model, tmp_path / "out")
        (model / "LICENSE").symlink_to(tmp_path / "out/config.json")
        error = self.refused(capsys, "quantize", model, "-o", tmp_path / "out", "--force")
        assert "holds files of the source" in error

    def test_what_force_does_replace(self, model: Path, tmp_path: Path) -> None:
        quantize(model, tmp_path / "out", recipe="q8", report=tmp_path / "r.json")
        quantize(model, tmp_path / "out", force=True, report=tmp_path / "r.json")
        (tmp_path / "empty").mkdir()
        quantize(model, tmp_path / "empty", force=True)
        (tmp_path / "f.gguf").write_text("old")
        export_gguf(open_checkpoint(model), tmp_path / "f.gguf", "f16", force=True)
        export_gguf(open_checkpoint(model), model / "inside.gguf", "f16")
        assert names(tmp_path) == ["empty", "f.gguf", "model", "out", "r.html", "r.json"]

    def test_a_report_is_not_replaced_without_force(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "r.json").write_text("mine")
        with pytest.raises(UsageError, match="exists"):
            quantize(model, tmp_path / "out", report=tmp_path / "r.json")
        assert names(tmp_path) == ["model", "r.json"]

    def test_a_folder_that_appears_while_the_run_works(self, model: Path, tmp_path: Path) -> None:
        def appear(*_: object) -> None:
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out/mine").touch()

        for force, reason in ((False, "appeared"), (True, "not a model folder")):
            (tmp_path / "out/mine").unlink(missing_ok=True)
            (tmp_path / "out").rmdir() if (tmp_path / "out").exists() else None
            with pytest.raises(EdgeqError, match=rf"{reason}.*result is in .*out-[23]"):
                quantize(model, tmp_path / "out", force=force, progress=appear)
            assert names(tmp_path / "out") == ["mine"]
        for kept in ("out-2", "out-3"):
            verify(tmp_path / kept)
        assert names(tmp_path) == ["model", "out", "out-2", "out-3"]


class TestSignals:
    @pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
    def test_signals_leave_nothing(self, source: Path, tmp_path: Path, name: str, code: int) -> None:
        program = (
            "import os, signal, sys\n"
            "from edgeq.quant import quantizer, gguf_export\n"
            "from edgeq.cli import main\n"
            f"stop = lambda *_: os.kill(os.getpid(), signal.{name})\n"
            "quantizer._write_json = gguf_export._write_data = stop\n"
            "main(sys.argv[1:])\n"
        )
        for arguments in (("quantize", "-o", "out"), ("export", "-o", "out.gguf")):
            command, option, out = arguments
            done = run_python(program, command, str(source), option, str(tmp_path / out))
            assert done.returncode == code, done.stderr
            assert names(tmp_path) == []


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_files_are_written_in_pieces_of_a_large_page(
    tmp_path: Path, mode: Literal["wb", "ab"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 64)
    path, rng = tmp_path / "x", np.random.default_rng(0)
    expected = b"head" if mode == "ab" else b""
    path.write_bytes(expected)
    writes: list[tuple[int, int]] = []
    with closing(PieceWriter(path, mode)) as file:
        real = file._file

        class Spy:
            def write(self, data: memoryview) -> int:
                writes.append((real.tell(), len(data)))
                return real.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        monkeypatch.setattr(file, "_file", Spy())
        for size in (1, 63, 0, 64, 65, 1, 300, 128, 7, 500, 3):
            block = rng.integers(0, 256, size, dtype=np.uint8)
            expected += block.tobytes()
            file.write(block.data)
            assert file.tell() == len(expected)
        file.sync()
    assert path.read_bytes() == expected
    assert all(start % 64 == 0 for start, _ in writes[1:])
    assert all((start + size) % 64 == 0 for start, size in writes[:-1])
