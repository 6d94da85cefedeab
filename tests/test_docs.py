"""What the documents show is what the program does: commands, Python blocks, links, figures, lists of options."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import ROOT, Block, anchors, blocks, commands, links, pages
from process import run_python

from edgeq.cli import app
from edgeq.generate import GenerationSettings
from edgeq.hub import DEMO
from edgeq.machine.boards import board_facts
from edgeq.machine.facts import keep_facts

PAGES = pages()
RUN = [page for page in PAGES if (page.name == "README.md" and page.parent == ROOT) or page.parent.name == "guides"]
RUN += [ROOT / "docs" / "reference" / "python.md", ROOT / "docs" / "reference" / "configuration.md"]
BLOCKS = [block for page in PAGES for block in blocks(page)]
HUB_IDS = [f"Qwen/Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "2B-Base")]

demo = pytest.mark.skipif(not DEMO.exists(), reason="the demo model is not part of this checkout")


def place(item: Block | Path) -> str:
    page, line = (item.page, f":{item.line}") if isinstance(item, Block) else (item, "")
    return f"{page.relative_to(ROOT)}{line}"


def blocks_in(language: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == language], ids=place)


# --- generated parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["make_cli_docs.py", "make_readme_figures.py"])
def test_generated_parts_are_up_to_date(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / tool, "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_list_of_variables() -> None:
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    table = page[page.index("<!-- variables:") : page.index("`EDGEQ_BACKEND` also")]
    group: Any = typer.main.get_command(app)
    options = {p.envvar for command in group.commands.values() for p in command.params if p.envvar}
    assert set(re.findall(r"EDGEQ_\w+", table)) == options


def test_table_of_settings() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    table = page[page.index("<!-- settings:") :]
    shown = re.findall(r"^\| `(\w+)` \| (.+?) \|", table, flags=re.MULTILINE)
    assert shown[: len(fields(GenerationSettings))] == [
        (field.name, repr(field.default)) for field in fields(GenerationSettings)
    ]


def test_readme_begins_with_two_commands() -> None:
    """They are indented, so that they stand out; both are programs of the checkout."""
    first = re.findall(r"^    (\S+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert first == ["tools/start", "tools/test"]
    assert all(os.access(ROOT / command, os.X_OK) for command in first)


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{file} does not exist"
        assert not anchor or anchor in anchors(target), f"{file} has no heading #{anchor}"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / file).resolve() for file, _ in links(index)}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {index} <= listed


def test_files_that_are_named_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:edgeq|quant|backends|tests|tools|docs)/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{place(page)}: {name} does not exist"


# --- blocks ----------------------------------------------------------------------------------------------------------


@blocks_in("sh")
def test_shell_blocks_are_valid(block: Block) -> None:
    """Valid shell, and every edgeq command in it is one that edgeq understands."""
    checked = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, timeout=10)
    assert checked.returncode == 0, checked.stderr
    group: Any = typer.main.get_command(app)
    for _, *words in commands(block.code):
        while words and words[0].startswith("-"):
            words = words[1:]
        if words:
            name, *arguments = words
            group.commands[name].make_context(name, arguments)


@blocks_in("python")
def test_python_blocks_are_valid(block: Block) -> None:
    ast.parse(block.code)


def test_blocks_have_a_language() -> None:
    """Output and file names aside, a block says what it is."""
    for block in BLOCKS:
        if block.page in RUN:
            assert block.language in ("sh", "python", "toml"), place(block)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents take for granted: an `edgeq` to call, a log, and the models in the hub's cache,
    all of them the demo model."""
    folder = tmp_path_factory.mktemp("desk")
    for repo in HUB_IDS:
        cached = folder / "hub" / f"models--{repo.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / ("0" * 40)).symlink_to(DEMO)
    (folder / "bin").mkdir()
    edgeq = folder / "bin" / "edgeq"
    edgeq.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m edgeq "$@"\n')
    edgeq.chmod(0o755)
    _remember_the_machine(folder / "cache")
    return folder


def _remember_the_machine(cache: Path) -> None:
    """Keep the rates of a board as those of this machine, so that no page's commands measure it for ten seconds;
    tests/test_fit.py and tests/test_doctor.py are about that."""
    with suppress(ImportError), pytest.MonkeyPatch.context() as patch:
        from edgeq.backends.cpu import _native

        patch.setenv("XDG_CACHE_HOME", str(cache))
        now, threads = "2026-11-26T12:00:00", _native.thread_count()
        facts = board_facts("pi5")
        facts = replace(facts, isa=_native.isa(), measured=now, prompt_threads=threads, generation_threads=threads)
        assert keep_facts(facts)


def environment(desk: Path) -> dict[str, str]:
    return {
        "HF_HUB_CACHE": str(desk / "hub"), "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1",
        "XDG_CONFIG_HOME": str(desk), "XDG_STATE_HOME": str(desk), "XDG_CACHE_HOME": str(desk / "cache"),
    }  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, desk: Path) -> Path:
    """An empty folder but for the files that the documents name, and an environment such as tools/start makes."""
    (tmp_path / "build.log").write_text("error: no such file\n")
    (tmp_path / "prompt.txt").write_text("What is 7 * 8?\n")
    shutil.copy(DEMO / "picture.png", tmp_path / "photo.jpg")  # what is in it counts, not what it is called
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f'export PATH="{desk / "bin"}:$PATH"\n')
    return tmp_path


def with_commands() -> list[Any]:
    """The pages whose commands are run; all but README are for tools/test, since each command is a process."""
    found = [page for page in RUN if any(block.language == "sh" for block in blocks(page))]
    return [pytest.param(p, id=place(p), marks=[] if p.name == "README.md" else pytest.mark.slow) for p in found]


@demo
@pytest.mark.parametrize("page", with_commands())
def test_commands_run(page: Path, desk: Path, work: Path) -> None:
    """The shell blocks of a page, one after the other, as a reader types them; README activates for itself."""
    code = "\n".join(block.code for block in blocks(page) if block.language == "sh" and not block.reason)
    activate = "" if page.name == "README.md" else ". .venv/bin/activate\n"
    script = f"set -euo pipefail\n{activate}{typed(code)}"
    paths = os.pathsep.join([path for path in sys.path if path and Path(path) != ROOT] + [str(ROOT)])
    done = subprocess.run(
        ["bash", "-c", script], cwd=work, env={**os.environ, **environment(desk), "PYTHONPATH": paths},
        input="", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-1000:]}"
    assert "Traceback" not in done.stderr


def typed(code: str) -> str:
    """`code` with something to say where `edgeq chat` would wait for you, and short replies."""
    lines = []
    for line in code.splitlines():
        command = line.split("#")[0].rstrip()
        if command.startswith("edgeq chat") and " -p" not in command and " -f" not in command:
            command += " <<< 'Hello'"
        lines.append(command)
    return "export EDGEQ_MAX_TOKENS=8 EDGEQ_THINKING_BUDGET=8\n" + "\n".join(lines)


@demo
@pytest.mark.parametrize("page", [p for p in RUN if any(b.language == "python" for b in blocks(p))], ids=place)
def test_python_runs(page: Path, desk: Path, work: Path) -> None:
    """The Python blocks of a page as one program. README's loads a folder that its commands made before."""
    code = "\n".join(block.code for block in blocks(page) if block.language == "python" and not block.reason)
    if page.name == "README.md":
        shutil.copytree(DEMO, work / "q2b")
    done = run_python(f"import os\nos.chdir({str(work)!r})\n{code}", without=(), timeout=120, **environment(desk))
    assert done.returncode == 0, done.stderr[-2000:]
