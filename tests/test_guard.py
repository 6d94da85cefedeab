"""A model's file that is cut short while it is in use: one line that names it, exit code 4, nothing half-written."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from process import run_python
from tiny_tokenizer import build_tiny_tokenizer

from edgeq.backends import available
from edgeq.checkpoint import open_checkpoint
from edgeq.errors import MemoryBudgetError, ModelError
from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf
from edgeq.testing import config_values, write_checkpoint

NATIVE = any(backend.name == "cpu" and backend.ops is not None for backend in available())
needs_native = pytest.mark.skipif(not NATIVE, reason="the guard is native")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of a few pages, of the test's own."""
    folder = tmp_path / "model"
    write_checkpoint(folder, config_values(vocab_size=1088))
    build_tiny_tokenizer(folder)
    return folder


def cut(path: Path) -> None:
    os.truncate(path, 4096)


class TestChecks:
    def test_a_tensor_of_a_file_that_was_cut_short(self, tmp_path: Path) -> None:
        path = tmp_path / "f.safetensors"
        with SafetensorsWriter(path, {"a": ("F32", (4096,))}) as writer:
            writer.write("a", np.zeros(4096, np.float32))
        file = SafetensorsFile(path)
        file.array("a")
        cut(path)
        with pytest.raises(ModelError, match=r"f\.safetensors was cut short while it was in use: it has 4,096 bytes"):
            file.array("a")

    @pytest.mark.parametrize("when", ["at once", "between"])
    def test_quantize_and_export_leave_nothing(self, model: Path, tmp_path: Path, when: str) -> None:
        weights, kept = model / "model.safetensors", tmp_path / "kept"
        shutil.copy(weights, kept)

        def progress(done: int, total: int, _: str) -> None:
            if when == "at once" or done > total // 2:
                cut(weights)

        for run in (
            lambda: quantize(model, tmp_path / "out", threads=1, progress=progress),
            lambda: export_gguf(open_checkpoint(model), tmp_path / "out.gguf", "f16", progress=progress),
        ):
            with pytest.raises(ModelError, match="was cut short while it was in use"):
                run()
            assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model"]
            shutil.copyfile(kept, weights)

    def test_no_address_space_is_no_damaged_model(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(mmap, "mmap", refuse)
        with pytest.raises(MemoryBudgetError, match=r"does not fit: mapping it takes 0\.00 GB of address space"):
            open_checkpoint(model)

    def test_a_pipe_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(ModelError, match="expected a regular file"):
            SafetensorsFile(tmp_path / "pipe.safetensors")


CUT_AND_READ = """
import os, sys
from edgeq.guard import guard_mapped_files
from edgeq.formats.safetensors import SafetensorsFile
if sys.argv[2] == "guarded":
    assert guard_mapped_files()
file = SafetensorsFile(sys.argv[1])
if sys.argv[2] == "late":
    assert guard_mapped_files()
array = file.array(next(iter(file.tensors)))
os.truncate(sys.argv[1], 0)
print(array.sum())
"""


@needs_native
class TestSignal:
    @pytest.mark.parametrize("when", ["guarded", "late"])
    def test_a_program_that_asked_for_the_guard(self, model: Path, when: str) -> None:
        weights = model / "model.safetensors"
        done = run_python(CUT_AND_READ, str(weights), when)
        assert done.returncode == 4
        assert done.stdout == ""
        assert done.stderr.splitlines() == [
            f"error: {weights} was cut short, or could not be read, while it was in use",
            "hint: copy or download it again",
        ]

    def test_a_program_that_did_not(self, model: Path) -> None:
        assert run_python(CUT_AND_READ, str(model / "model.safetensors"), "unguarded").returncode == -7

    @pytest.mark.parametrize("handler", ["none", "faulthandler"])
    def test_any_other_bus_error_goes_where_it_went(self, tmp_path: Path, handler: str) -> None:
        (tmp_path / "file").write_bytes(bytes(8192))
        code = (
            "import faulthandler, mmap, os, sys\n"
            f"{'faulthandler.enable()' if handler == 'faulthandler' else ''}\n"
            "from edgeq.guard import guard_mapped_files\n"
            "assert guard_mapped_files()\n"
            "file = open(sys.argv[1], 'r+b')\n"
            "mapping = mmap.mmap(file.fileno(), 0)\n"
            "os.truncate(sys.argv[1], 0)\n"
            "mapping[5000]\n"
        )
        done = run_python(code, str(tmp_path / "file"))
        assert done.returncode == -7
        assert "was cut short" not in done.stderr
        assert ("Bus error" in done.stderr) == (handler == "faulthandler")

    @pytest.mark.parametrize("command", ["generate", "chat"])
    def test_the_command_line(self, model: Path, command: str) -> None:
        code = (
            "import os, sys\n"
            "from edgeq import api\n"
            "from edgeq.cli import main\n"
            "load = api.load\n"
            "def load_and_cut(*given, **options):\n"
            "    model = load(*given, **options)\n"
            "    os.truncate(sys.argv[1] + '/model.safetensors', 0)\n"
            "    return model\n"
            "api.load = load_and_cut\n"
            "main([sys.argv[2], sys.argv[1], '-p', 'hello', '--max-tokens', '4'])\n"
        )
        for backend in ("numpy", "cpu"):
            done = run_python(code, str(model), command, EDGEQ_BACKEND=backend)
            assert done.returncode == 4, done.stderr
            assert done.stderr.startswith(f"error: {model}/model.safetensors was cut short")
            write_checkpoint(model, config_values(vocab_size=1088))

    @pytest.mark.parametrize("command", ["quantize", "export"])
    def test_cut_between_the_check_and_the_reading(self, model: Path, tmp_path: Path, command: str) -> None:
        """Zeros are read instead, and found out: nothing is left, and the error is the library's."""
        code = (
            "import os, sys\n"
            "from edgeq.formats import mapped, safetensors\n"
            "from edgeq.cli import main\n"
            "check, calls = mapped.check_whole, []\n"
            "def check_then_cut(mapping, path):\n"
            "    check(mapping, path)\n"
            "    calls.append(path)\n"
            "    if len(calls) == int(sys.argv[1]):\n"
            "        os.truncate(path, 0)\n"
            "safetensors.check_whole = check_then_cut\n"
            "main(sys.argv[2:])\n"
        )
        for call in (5, 20, 40):
            done = run_python(code, str(call), command, str(model), "-o", str(tmp_path / "out.gguf"))
            assert done.returncode == 4, done.stderr
            assert "was cut short while it was in use" in done.stderr
            assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
            write_checkpoint(model, config_values(vocab_size=1088))
