"""edgeq beside llama.cpp and its relatives: the same weights, the same machine, taking turns in one run.

    python tools/bench_peers.py CHECKPOINT WORK --peer llama.cpp=/opt/llama/llama-bench \\
        --peer 'ik_llama.cpp=/opt/ik/llama-bench -rtr 1'

CHECKPOINT is an unquantized checkpoint; random weights do. A peer is a name and its `llama-bench`, with options if it
wants any. In the folder WORK the quantized forms are made where they are missing: q4 and q8 (edgeq's default recipes),
and from edgeq's F16 export Q4_0.gguf, Q4_K_M.gguf and Q8_0.gguf, by the `llama-quantize` beside the first peer. edgeq
runs its own form, and with --same-file the peers' too; a peer's figure is that of its better file.

The rounds go through all of them in turn (A B C A B C ...), one process at a time; figures are medians. How fast the
memory is read is measured in every round, so that a share of it is that of the same minute.

--figures writes the results to docs/figures.json, from which tools/make_readme_figures.py fills in README and docs.
--busy starts other processes that do nothing but compute, to see what is left of the speed then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol, TypeVar

import figures
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

T = TypeVar("T")

OURS = "edgeq"
FORMS: dict[int, tuple[str, ...]] = {4: ("q4", "Q4_0", "Q4_K_M"), 8: ("q8", "Q8_0")}  # edgeq's own first
CONDITIONS = (
    "random weights of the real shapes, default recipes; peers compiled for the machine, the better of Q4_0 and Q4_K_M "
    "against 4 bits, Q8_0 against 8; engines take turns, medians"
)
PROMPT = "The weather in the mountains was clear and cold today,"  # ten tokens or so
CONTEXT = 4096  # of the memory measurement: all of it is used


class Speed(NamedTuple):
    """A speed test: `prompt` tokens at once, or `generate` one at a time behind `depth` tokens."""

    prompt: int
    generate: int
    depth: int

    @property
    def name(self) -> str:
        kind = f"prefill {self.prompt}" if self.prompt else f"decode {self.generate}"
        return f"{kind} at {self.depth}" if self.depth else kind


class Peer(NamedTuple):
    """A name, and the command of its llama-bench."""

    name: str
    command: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Peer:
        """From NAME=BINARY OPTIONS..."""
        name, _, command = text.partition("=")
        if not name or not command.strip():
            raise argparse.ArgumentTypeError(f"a peer is NAME=BINARY OPTIONS..., not {text!r}")
        binary, *options = shlex.split(command)
        if (path := shutil.which(binary)) is None:
            raise argparse.ArgumentTypeError(f"{binary} is no program")
        return cls(name, (path, *options))


# --- the engines -----------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """One engine with one file."""

    @property
    def name(self) -> str:
        """The engine and the file's form."""

    def warm_up(self, test: Speed) -> None:
        """What goes before the first run that counts."""

    def run(self, test: Speed) -> float:
        """Seconds of the test."""

    def close(self) -> None: ...


class Edgeq:
    """A process that holds a model in edgeq with its default settings, and runs tests when it is asked."""

    def __init__(self, form: str, path: Path, threads: int) -> None:
        self.name = f"{OURS} {form}"
        command = [sys.executable, __file__, "--serve", str(path), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def warm_up(self, test: Speed) -> None:
        self.run(test)

    def run(self, test: Speed) -> float:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(test) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} stopped; what it said is above")
        return float(answer)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def serve(path: str, threads: int) -> None:
    """Answer tests, one line of JSON each, with seconds."""
    from edgeq.api import load

    model = load(path, threads=threads)
    behind = {0: model.state()}
    for line in sys.stdin:
        test = Speed(*json.loads(line))
        ids = np.random.default_rng(0).integers(0, model.vocab_size, test.depth + test.prompt + test.generate).tolist()
        if test.depth not in behind:
            behind[test.depth] = model.advance(ids[: test.depth], model.state())
        state, ids = behind[test.depth], ids[test.depth :]
        started = time.perf_counter()
        for chunk in [ids] if test.prompt else [[token] for token in ids]:
            _, state = model.forward(chunk, state)
        print(time.perf_counter() - started, flush=True)


class LlamaBench:
    """A peer's llama-bench, started anew for every test."""

    def __init__(self, peer: Peer, form: str, path: Path, threads: int) -> None:
        self.name = f"{peer.name} {form}"
        self._command = [*peer.command, "-m", str(path), "-t", str(threads), "-ngl", "0", "-r", "1", "-o", "json"]

    def warm_up(self, test: Speed) -> None:
        """llama-bench has a run of its own that does not count."""

    def run(self, test: Speed) -> float:
        return seconds_of(self._run(test_options(test, self._help)))

    def close(self) -> None: ...

    def launch(self, prompt: int) -> tuple[float, int]:
        """A process that loads the model and runs a prompt once: its seconds and its peak memory in bytes."""
        once = ["--no-warmup"] if "--no-warmup" in self._help else ["-w", "0"]
        return launch([*self._command, *test_options(Speed(prompt, 0, 0), self._help), *once])

    @cached_property
    def _help(self) -> str:
        return subprocess.run([self._command[0], "--help"], capture_output=True, text=True, check=False).stdout

    def _run(self, options: Sequence[str]) -> str:
        done = subprocess.run([*self._command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{shlex.join(done.args)} failed:\n{done.stderr[-2000:]}")
        return done.stdout


def test_options(test: Speed, help_text: str) -> list[str]:
    """llama-bench's options for a test. Where it has no depth, `-gp` generates behind a prompt that is not timed."""
    if test.depth and "--n-depth" not in help_text:
        if test.prompt:
            raise SystemExit("this llama-bench runs no prompt behind a depth")
        return ["-p", "0", "-n", "0", "-gp", f"{test.depth},{test.generate}"]
    return ["-p", str(test.prompt), "-n", str(test.generate), *(["-d", str(test.depth)] if test.depth else [])]


def seconds_of(output: str) -> float:
    """The median of the samples in llama-bench's JSON, which other lines may stand before or after."""
    try:
        (result,) = json.loads(output[output.index("[") : output.rindex("]") + 1])
        return float(median(result["samples_ns"])) / 1e9
    except (ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"this is no output of llama-bench -o json with one test:\n{output[:2000]}") from e


def launch(command: Sequence[str]) -> tuple[float, int]:
    """Seconds that a command takes, and its peak memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{shlex.join(command)} failed")
    return seconds, usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


def edgeq_command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from edgeq.cli import main; main()", *arguments]


# --- speed -----------------------------------------------------------------------------------------------------------


def compare_speed(
    bits: int, paths: dict[str, Path], peers: Sequence[Peer], threads: int, rounds: int, tests: Sequence[Speed],
    *, same_file: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every test in rounds that go through all engines."""
    from edgeq.bench import read_rate

    own, *others = FORMS[bits]
    nbytes = {form: token_parts(paths[form]) for form in FORMS[bits]}
    engines: list[Engine] = [Edgeq(form, paths[form], threads) for form in (FORMS[bits] if same_file else [own])]
    engines += [LlamaBench(peer, form, paths[form], threads) for peer in peers for form in others]
    rows = []
    try:
        for test in tests:
            seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
            rates: list[float] = []
            for engine in engines:
                engine.warm_up(test)
            for _ in range(rounds):
                rates.append(read_rate(threads))
                for engine in engines:
                    seconds[engine.name].append(engine.run(test))
            read = {engine.name: token_nbytes(nbytes[form_of(engine.name)], test) for engine in engines}
            rows.append(speed_row(bits, threads, test, seconds, read, rates))
            print_speed(rows[-1])
    finally:
        for engine in engines:
            engine.close()
    return rows


class TokenParts(NamedTuple):
    """What generating a token reads and writes: a constant part, and one per token before it."""

    constant: float
    per_position: float


def token_parts(path: Path) -> TokenParts:
    """As edgeq counts it, for a file of whatever engine; keys and values are in 16 bits with all."""
    from edgeq.api import load
    from edgeq.bench import token_nbytes

    model = load(path)
    constant = token_nbytes(model, 0)
    return TokenParts(constant, (token_nbytes(model, 4096) - constant) / 4096)


def token_nbytes(parts: TokenParts, test: Speed) -> float:
    """Bytes of the middle token of those generated."""
    return parts.constant + parts.per_position * (test.depth + test.generate / 2)


def speed_row(
    bits: int, threads: int, test: Speed, seconds: dict[str, list[float]], nbytes: dict[str, float],
    rates: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    """Medians, edgeq's ratio to the better file of every peer, and for generation what was read of the memory's rate.

    `share` is the median over rounds of the bytes read per second over the memory's rate in the same round.
    """
    tokens = test.prompt + test.generate
    speeds = {name: tokens / median(samples) for name, samples in seconds.items()}
    ours = next(speed for name, speed in speeds.items() if engine_of(name) == OURS)
    best = {engine: speed for engine, speed in figures.best_of(speeds, max).items() if engine != OURS}
    row = {
        "bits": bits, "threads": threads, "test": test.name, "tok_per_s": speeds, "seconds": seconds,
        "ratio": {engine: ours / speed for engine, speed in best.items()},
        "read_gb_per_s": median(rates), "read_rates": list(rates),
    }  # fmt: skip
    if test.generate:
        row["gb_per_s"] = {name: nbytes[name] * speed / 1e9 for name, speed in speeds.items()}
        row["share"] = {
            name: median(tokens * nbytes[name] / 1e9 / s / rate for s, rate in zip(samples, rates, strict=True))
            for name, samples in seconds.items()
        }
    return row


def engine_of(name: str) -> str:
    return name.rpartition(" ")[0]


def form_of(name: str) -> str:
    return name.rpartition(" ")[2]


def print_speed(row: dict[str, Any]) -> None:
    threads = f"{row['threads']} thread" + ("s" if row["threads"] > 1 else "")
    ratios = ", ".join(f"{ratio:.2f}x {engine}" for engine, ratio in row["ratio"].items())
    print(f"{row['bits']} bits, {threads}, {row['test']}: {ratios}; memory reads {row['read_gb_per_s']:.1f} GB/s")
    for name, speed in row["tok_per_s"].items():
        line = f"    {name:24} {speed:8.1f} tokens/s"
        if "share" in row:
            line += f"  {row['gb_per_s'][name]:6.1f} GB/s  {100 * row['share'][name]:4.0f} % of the memory's rate"
        print(line)
    sys.stdout.flush()


# --- memory and start ------------------------------------------------------------------------------------------------


def compare_memory(bits: int, paths: dict[str, Path], peers: Sequence[Peer], threads: int) -> dict[str, Any]:
    """Peaks of whole processes at a full context."""
    own, *others = FORMS[bits]
    ids = ["-p", str(CONTEXT), "-n", "0", "-r", "1", "--threads", str(threads)]
    peaks = {f"{OURS} {own}": launch(edgeq_command("bench", str(paths[own]), *ids))[1]}
    for peer in peers:
        for form in others:
            bench = LlamaBench(peer, form, paths[form], threads)
            peaks[bench.name] = bench.launch(CONTEXT)[1]
    shown = "  ".join(f"{name} {peak / 1e6:,.0f} MB" for name, peak in peaks.items())
    print(f"{bits} bits, peak memory, {CONTEXT} tokens:  {shown}", flush=True)
    return {"bits": bits, "threads": threads, "context": CONTEXT, "peak_nbytes": peaks}


def compare_start(
    bits: int, paths: dict[str, Path], peers: Sequence[Peer], threads: int, rounds: int
) -> dict[str, Any]:
    """Seconds from launch to the first token with a warm page cache, of a peer until its process ends after it."""
    own, *others = FORMS[bits]
    benches = [LlamaBench(peer, form, paths[form], threads) for peer in peers for form in others]
    seconds: dict[str, list[float]] = {f"{OURS} {own}": [], **{bench.name: [] for bench in benches}}
    for turn in range(rounds + 1):  # the first is not counted
        taken = {f"{OURS} {own}": start_edgeq(paths[own], threads)}
        taken |= {bench.name: bench.launch(len(PROMPT.split()))[0] for bench in benches}
        for name in taken if turn else ():
            seconds[name].append(taken[name])
    shown = "  ".join(f"{name} {median(samples):.2f} s" for name, samples in seconds.items())
    print(f"{bits} bits, launch to first token:  {shown}", flush=True)
    return {"bits": bits, "threads": threads, "seconds": seconds}


def start_edgeq(path: Path, threads: int) -> float:
    """Seconds from the start of the command to the first text that it prints, everything included."""
    arguments = ["generate", str(path), "-p", PROMPT, "--max-tokens", "1", "--temp", "0", "--threads", str(threads)]
    started = time.perf_counter()
    with subprocess.Popen(
        edgeq_command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()  # else its last words would meet a closed pipe
    if process.returncode:
        raise SystemExit("edgeq generate failed")
    return seconds


def measure_quantize(checkpoint: str, bits: int, work: Path) -> dict[str, Any]:
    """Time and peak memory of `edgeq quantize` with its default recipe, and what came out."""
    report, out = work / "report.json", work / "quantized"
    options = ["-o", str(out), "--bits", str(bits), "--report", str(report), "--force"]
    seconds, peak = launch(edgeq_command("quantize", checkpoint, *options))
    text = json.loads(report.read_text())["parts"]["text"]
    print(f"{bits} bits, quantize:  {seconds:.1f} s  {peak / 1e6:.0f} MB", flush=True)
    return {
        "bits": bits, "threads": os.cpu_count() or 1, "seconds": seconds, "peak_nbytes": peak,
        "nbytes": text["nbytes"], "bits_per_weight": text["bits_per_weight"],
    }  # fmt: skip


# --- preparation -----------------------------------------------------------------------------------------------------


def prepare(checkpoint: str, work: Path, bits: Sequence[int], peers: Sequence[Peer]) -> dict[str, Path]:
    """The models by form, those made that are missing."""
    work.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for own, *others in (FORMS[b] for b in bits):
        paths |= {own: work / own} | {form: work / f"{form}.gguf" for form in others}
    for form, path in paths.items():
        if path.exists():
            continue
        print(f"making {path}", file=sys.stderr)
        if path.suffix == ".gguf":
            quantize_gguf(Path(peers[0].command[0]).with_name("llama-quantize"), f16_file(checkpoint, work), path)
        else:
            from edgeq.quant import quantize

            quantize(checkpoint, path, recipe=form)
    return paths


def f16_file(checkpoint: str, work: Path) -> Path:
    path = work / "f16.gguf"
    if not path.exists():
        from edgeq.checkpoint import open_checkpoint
        from edgeq.hub import find_model
        from edgeq.quant.gguf_export import export_gguf

        export_gguf(open_checkpoint(find_model(checkpoint)), path, "f16")
    return path


def quantize_gguf(quantizer: Path, source: Path, out: Path) -> None:
    partial = out.with_suffix(".partial")
    launch([str(quantizer), str(source), str(partial), out.stem])
    partial.replace(out)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Other programs that compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def conditions(peers: Sequence[Peer]) -> str:
    """What a reader of the figures has to know."""
    options = [f"{peer.name} with {shlex.join(peer.command[1:])}" for peer in peers if peer.command[1:]]
    return "; ".join([CONDITIONS, *options])


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def among(choices: Iterable[T]) -> Callable[[str], list[T]]:
    """Some of the choices, from a list with commas."""
    by_name = {str(choice): choice for choice in choices}

    def some(text: str) -> list[T]:
        if unknown := [name for name in text.split(",") if name not in by_name]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(by_name)}")
        return [by_name[name] for name in text.split(",")]

    return some


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer", dest="peers", type=Peer.parse, action="append", metavar="NAME=BINARY", default=[])
    parser.add_argument("--bits", type=among(FORMS), default=list(FORMS))
    parser.add_argument("-t", "--threads", type=numbers, default=sorted({1, cores}, reverse=True))
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=numbers, default=[512, 2048], help="lengths, in tokens")
    parser.add_argument("--depths", type=numbers, default=[0, 1024, 4096], help="context before the generated tokens")
    parser.add_argument("--generate", type=int, default=64, help="tokens generated at each depth")
    forms = [form for _, *others in FORMS.values() for form in others]
    parser.add_argument("--forms", type=among(forms), default=forms, help="of the peers, such as Q4_0,Q8_0")
    parser.add_argument("--same-file", action="store_true", help="edgeq runs the peers' files, too")
    parser.add_argument("--only", choices=("speed", "memory", "start", "quantize"))
    parser.add_argument("--busy", type=int, default=0, help="other programs that compute meanwhile")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--figures", metavar="RUN", help="write the results to docs/figures.json, as the run RUN")
    parser.add_argument("--model", default="0.8B", help="the model's name in docs/figures.json")
    parser.add_argument("--machine", help="the machine in docs/figures.json, such as '4 vCPUs of a Zen 4 server'")
    options = parser.parse_args(arguments)
    if not options.peers and options.only != "quantize":
        parser.error("name at least one peer: --peer NAME=BINARY, its llama-bench")
    for b in options.bits:
        if not set(FORMS[b]) & set(options.forms):
            parser.error(f"--forms names no file of {b} bits")
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return options


def main() -> None:
    options = parse()
    for b, (own, *others) in FORMS.items():
        FORMS[b] = (own, *(form for form in others if form in options.forms))
    tests = [Speed(n, 0, 0) for n in options.prompts] + [Speed(0, options.generate, d) for d in options.depths]
    paths = prepare(options.checkpoint, options.work, options.bits, options.peers)
    report: dict[str, list[Any]] = {"speed": [], "memory": [], "start": [], "quantize": []}
    wanted = (options.only,) if options.only else tuple(report)
    print(f"{options.checkpoint} on {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with busy(options.busy):
        for b in options.bits:
            most = max(options.threads)
            for count in options.threads if "speed" in wanted else ():
                report["speed"] += compare_speed(
                    b, paths, options.peers, count, options.rounds, tests, same_file=options.same_file
                )
            if "memory" in wanted:
                report["memory"].append(compare_memory(b, paths, options.peers, most))
            if "start" in wanted:
                report["start"].append(compare_start(b, paths, options.peers, most, options.rounds))
            if "quantize" in wanted:
                report["quantize"].append(measure_quantize(options.checkpoint, b, options.work))
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    for row in report["speed"]:
        row["busy"] = options.busy
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.figures:
        machine, rows = options.machine or platform.machine(), figures.rows_of(report, options.model)
        figures.add(options.figures, machine, conditions(options.peers), rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
