"""Too little memory is one line and exit code 3, whenever it shows: while importing, mapping, loading or running."""

from __future__ import annotations

import errno
import sys

import pytest
from process import run_python

from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.shortage import exit_on_shortage, is_shortage, require

LIMITED = """
import resource, sys
kind = {"v": resource.RLIMIT_AS, "d": resource.RLIMIT_DATA}[sys.argv[1]]
resource.setrlimit(kind, (int(sys.argv[2]) * 1000_000,) * 2)
sys.argv[1:] = sys.argv[3:]
from edgeq.__main__ import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize(("kind", "megabytes"), [("v", 60), ("v", 100), ("v", 140), ("v", 170), ("d", 30), ("d", 60)])
def test_any_limit(kind: str, megabytes: int) -> None:
    arguments = ["generate", "demo", "-p", "hi", "--max-tokens", "2", "--threads", "1"]
    done = run_python(LIMITED, kind, str(megabytes), *arguments, without=("OPENBLAS",))
    assert done.returncode in (0, 3), done.stderr
    assert "Traceback" not in done.stderr
    if (megabytes < 150 and kind == "v") or megabytes < 40:
        assert done.returncode == 3
        first, second = done.stderr.splitlines()
        assert first.startswith("error: not enough memory for NumPy: it takes ")
        assert f"ulimit -{kind} allows {megabytes} MB in all" in first
        assert second.startswith("hint: ")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
        ImportError("libx.so: cannot allocate memory in static TLS block"),
        RuntimeError("can't start new thread"),
        MemoryBudgetError("too large"),
    ],
)
def test_its_many_names(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_shortage(error)
    with pytest.raises(SystemExit) as left, exit_on_shortage():
        raise error
    assert left.value.code == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    wrapped = ImportError("numpy cannot be imported")
    wrapped.__cause__ = error
    assert is_shortage(wrapped)


def test_what_is_none() -> None:
    for error in (
        ValueError("x"),
        OSError(errno.ENOSPC, "No space left"),
        ModelError("out of memory"),
        UsageError("x"),
    ):
        assert not is_shortage(error)
        with pytest.raises(type(error)), exit_on_shortage():
            raise error


def test_room_is_asked_for_with_numbers() -> None:
    require(1 << 20, "something")
    with pytest.raises(MemoryBudgetError, match="not enough memory for something: it takes 1,125,899,907 MB"):
        require(1 << 50, "something")


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_the_tokenizer_asks_before_rust_does() -> None:
    """Rust ends the process where it gets no memory."""
    code = (
        "import resource, sys\n"
        "from edgeq.errors import MemoryBudgetError\n"
        "from edgeq.text.bpe import LibraryBpe\n"
        "resource.setrlimit(resource.RLIMIT_AS, (600_000_000,) * 2)\n"
        "try:\n"
        "    LibraryBpe(' ' * 60_000_000)\n"
        "except MemoryBudgetError as error:\n"
        "    print(error)\n"
    )
    assert "not enough memory for the tokenizer: it takes 600 MB" in run_python(code).stdout
