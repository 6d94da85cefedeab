"""edgeq beside llama.cpp: the same shapes, the same machine, taking turns in one run.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python==0.3.36
    python tools/bench_peers.py CHECKPOINT WORK               # e.g. Qwen/Qwen3.5-0.8B /tmp/peers/0.8b

CHECKPOINT is an unquantized checkpoint; random weights do. In the folder WORK its quantized forms are made where they
are missing: q4 and q8 (edgeq's default recipes), and by llama.cpp's own quantizer, from edgeq's F16 export,
Q4_0.gguf, Q4_K_M.gguf and Q8_0.gguf. Every engine and file is a process of its own that waits while another is
measured. The rounds go through all of them in turn (A B C A B C ...); figures are medians.

--figures writes the results to docs/figures.json, from which tools/make_readme_figures.py fills in README and docs.
--busy starts other processes that do nothing but compute, to see what is left of the speed then.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import figures
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15, "Q8_0": 7}  # llama_ftype
FORMS = {4: ("edgeq q4", "llama Q4_0", "llama Q4_K_M"), 8: ("edgeq q8", "llama Q8_0")}
CONDITIONS = (
    "random weights of the real shapes, default recipes; llama.cpp as llama-cpp-python 0.3.36 compiled for the "
    "machine, the better of Q4_0 and Q4_K_M against 4 bits, Q8_0 against 8; engines take turns, medians"
)
PROMPT = "The weather in the mountains was clear and cold today,"  # ten tokens or so
CONTEXT = 4096  # of the memory measurement: all of it is used
DEPTH = 4096  # of the deepest speed test


class Speed(NamedTuple):
    """A speed test: `prompt` tokens at once, or `generate` one at a time, behind `depth` tokens."""

    prompt: int
    generate: int
    depth: int

    @property
    def name(self) -> str:
        kind = f"prefill {self.prompt}" if self.prompt else f"decode {self.generate}"
        return f"{kind} at {self.depth}" if self.depth else kind


SPEEDS = (Speed(512, 0, 0), Speed(2048, 0, 0), Speed(0, 64, 0), Speed(0, 64, DEPTH))


def random_ids(count: int, vocab_size: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(0, vocab_size, count).tolist()
    return ids


# --- the engines: each in a process of its own -----------------------------------------------------------------------


class Edgeq:
    """A model in edgeq, with its default settings."""

    def __init__(self, path: str, threads: int) -> None:
        from edgeq.api import load

        self._model = load(path, threads=threads)
        self.vocab_size = self._model.vocab_size
        self._behind = {0: self._model.state()}

    def run(self, test: Speed) -> float:
        ids = random_ids(test.depth + test.prompt + test.generate, self.vocab_size)
        if test.depth not in self._behind:
            self._behind[test.depth] = self._model.forward(ids[: test.depth], self._model.state())[1]
        state, ids = self._behind[test.depth], ids[test.depth :]
        started = time.perf_counter()
        for chunk in [ids] if test.prompt else [[token] for token in ids]:
            _, state = self._model.forward(chunk, state)
        return time.perf_counter() - started

    def token_nbytes(self, depth: int) -> dict[str, float]:
        """What a token reads: weights, and the rest (states, keys and values), which is the same for all."""
        from edgeq.bench import model_size, token_nbytes

        return {"weights": model_size(self._model)[1], "all": token_nbytes(self._model, depth)}


class Llama:
    """A model in llama.cpp through its C interface. `small` gives up the repacked copy of the weights, and batches."""

    def __init__(self, path: str, threads: int, *, context: int = DEPTH + 2048 + 64, small: bool = False) -> None:
        import llama_cpp as L

        self._L = L
        self._behind: dict[int, Any] = {}
        L.llama_log_set(_silent(L), ctypes.c_void_p(0))
        L.llama_backend_init()
        model = L.llama_model_default_params()
        model.use_extra_bufts = not small
        self._model = L.llama_model_load_from_file(path.encode(), model)
        settings = L.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = context, threads, threads
        if small:
            settings.n_batch = settings.n_ubatch = 64
        self._batch = settings.n_batch
        self._context = L.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp does not load {path}")
        self._memory = L.llama_get_memory(self._context)
        self._vocab = L.llama_model_get_vocab(self._model)
        self.vocab_size = L.llama_vocab_n_tokens(self._vocab)

    def run(self, test: Speed) -> float:
        ids = random_ids(test.depth + test.prompt + test.generate, self.vocab_size)
        self._go_behind(ids[: test.depth])
        ids = ids[test.depth :]
        started = time.perf_counter()
        for chunk in [ids] if test.prompt else [[token] for token in ids]:
            self._decode(chunk)
        self._L.llama_synchronize(self._context)
        return time.perf_counter() - started

    def first_token(self, text: str) -> int:
        raw = text.encode()
        buffer = (self._L.llama_token * (len(raw) + 16))()
        count = self._L.llama_tokenize(self._vocab, raw, len(raw), buffer, len(buffer), False, False)
        self._decode(buffer[:count])
        logits = self._L.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def token_nbytes(self, _depth: int) -> dict[str, float]:
        return {"weights": self._L.llama_model_size(self._model)}

    def _go_behind(self, ids: Sequence[int]) -> None:
        """Make the context hold exactly `ids`; what they left is kept and put back the next time."""
        L = self._L
        L.llama_memory_clear(self._memory, True)
        if not ids:
            return
        if len(ids) in self._behind:
            saved = self._behind[len(ids)]
            assert L.llama_state_seq_set_data(self._context, saved, len(saved), 0) == len(saved)
            return
        self._decode(ids)
        size = L.llama_state_seq_get_size(self._context, 0)
        self._behind[len(ids)] = saved = (ctypes.c_uint8 * size)()
        assert L.llama_state_seq_get_data(self._context, saved, size, 0) == size

    def _decode(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), self._batch):
            chunk = ids[start : start + self._batch]
            tokens = (self._L.llama_token * len(chunk))(*chunk)
            assert self._L.llama_decode(self._context, self._L.llama_batch_get_one(tokens, len(chunk))) == 0


def _silent(L: Any) -> Any:
    _silent.callback = L.llama_log_callback(lambda *_: None)  # type: ignore[attr-defined]  # it must not be freed
    return _silent.callback  # type: ignore[attr-defined]


def serve(form: str, path: str, threads: int) -> None:
    """Answer requests, one JSON line each: {"test": [...]} with seconds, {"depth": n} with bytes per token."""
    engine = Edgeq(path, threads) if form.startswith("edgeq") else Llama(path, threads)
    for line in sys.stdin:
        request = json.loads(line)
        answer = engine.run(Speed(*request["test"])) if "test" in request else engine.token_nbytes(request["depth"])
        print(json.dumps(answer), flush=True)


def measure_memory(form: str, path: str, threads: int) -> None:
    """Fill a context of CONTEXT tokens; print the peak of the resident memory, and what it was before the engine."""
    if not form.startswith("edgeq"):
        import llama_cpp  # noqa: F401  # so that Python's share can be taken off
    before = peak_memory()
    ours = form.startswith("edgeq")
    engine = Edgeq(path, threads) if ours else Llama(path, threads, context=CONTEXT, small=form.endswith("small"))
    engine.run(Speed(CONTEXT, 0, 0))
    print(json.dumps({"peak": peak_memory(), "before": before}))


def measure_start(_form: str, path: str, threads: int) -> None:
    """Print the peer's seconds from loading to the first token; Python and its imports do not count."""
    import llama_cpp  # noqa: F401

    started = time.perf_counter()
    Llama(path, threads, context=CONTEXT).first_token(PROMPT)
    print(json.dumps(time.perf_counter() - started))


def peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- the rounds ------------------------------------------------------------------------------------------------------


class Engine:
    """A process that holds a model and runs tests when it is asked."""

    def __init__(self, form: str, path: Path, threads: int) -> None:
        self.form = form
        self._process = subprocess.Popen(
            command("serve", form, path, threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def command(what: str, form: str, path: Path, threads: int) -> list[str]:
    return [sys.executable, __file__, "--be", what, form, str(path), str(threads)]


def compare_speed(bits: int, paths: dict[str, Path], threads: int, rounds: int, tests: Sequence[Speed]) -> list[Any]:
    from edgeq.bench import read_rate

    engines = [Engine(form, paths[form], threads) for form in FORMS[bits]]
    rows = []
    try:
        for test in tests:
            seconds: dict[str, list[float]] = {engine.form: [] for engine in engines}
            rates: list[float] = []
            for turn in range(rounds + 1):  # the first is not counted
                rates.append(read_rate(threads))
                for engine in engines:
                    taken = engine.ask(test=test)
                    if turn:
                        seconds[engine.form].append(taken)
            nbytes = {engine.form: engine.ask(depth=test.depth + test.generate // 2) for engine in engines}
            rows.append(speed_row(bits, threads, test, seconds, nbytes, max(rates)))
            print_speed(rows[-1])
    finally:
        for engine in engines:
            engine.close()
    return rows


def speed_row(
    bits: int, threads: int, test: Speed, seconds: dict[str, list[float]], nbytes: dict[str, Any], read_rate: float
) -> dict[str, Any]:
    """Medians, edgeq's ratio to the best peer, and for generation the bytes read per second."""
    tokens = test.prompt + test.generate
    speeds = {form: tokens / median(samples) for form, samples in seconds.items()}
    ours, *peers = speeds
    row = {
        "bits": bits, "threads": threads, "test": test.name, "tok_per_s": speeds, "seconds": seconds,
        "ratio": speeds[ours] / max(speeds[peer] for peer in peers), "read_gb_per_s": read_rate,
    }  # fmt: skip
    if test.generate:
        besides = nbytes[ours]["all"] - nbytes[ours]["weights"]
        row["gb_per_s"] = {form: (nbytes[form]["weights"] + besides) * speeds[form] / 1e9 for form in speeds}
    return row


def print_speed(row: dict[str, Any]) -> None:
    speeds = "  ".join(f"{form} {speed:8.1f}" for form, speed in row["tok_per_s"].items())
    line = f"{row['bits']}-bit  {row['threads']} threads  {row['test']:20} {speeds}  tok/s  {row['ratio']:5.2f}x"
    if "gb_per_s" in row:
        rates = ", ".join(f"{rate:.1f}" for rate in row["gb_per_s"].values())
        line += f"  ({rates} GB/s; memory reads {row['read_gb_per_s']:.1f})"
    print(line, flush=True)


def run_alone(what: str, form: str, path: Path, threads: int) -> Any:
    """A measurement in a fresh process."""
    done = subprocess.run(command(what, form, path, threads), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def start_edgeq(path: Path, threads: int) -> float:
    """Seconds from the start of the command to the first text that it prints, everything included."""
    arguments = ["generate", str(path), "-p", PROMPT, "--max-tokens", "1", "--temp", "0", "--threads", str(threads)]
    code = "from edgeq.cli import main; main()"
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()  # else its last words would meet a closed pipe
    if process.returncode:
        raise SystemExit("edgeq generate failed")
    return seconds


def compare_memory(bits: int, paths: dict[str, Path], threads: int) -> dict[str, Any]:
    """Peaks at a full context. A peer is not charged for the Python that calls it; edgeq is charged for everything."""
    peaks = {}
    for form in FORMS[bits]:
        for variant in [form] if form.startswith("edgeq") else [form, f"{form} small"]:
            found = run_alone("memory", variant, paths[form], threads)
            peaks[variant] = found["peak"] - (0 if form.startswith("edgeq") else found["before"])
    ours, *peers = peaks
    default = min(peaks[peer] for peer in peers if not peer.endswith("small"))
    smallest = min(peaks[peer] for peer in peers if peer.endswith("small"))
    shown = "  ".join(f"{form} {peak / 1e6:,.0f} MB" for form, peak in peaks.items())
    print(f"{bits}-bit  peak memory, {CONTEXT} tokens:  {shown}")
    print(f"       {peaks[ours] / default:.2f}x of the peer's default, {peaks[ours] / smallest:.2f}x of its smallest")
    return {"bits": bits, "threads": threads, "context": CONTEXT, "peak_nbytes": peaks}


def compare_start(bits: int, paths: dict[str, Path], threads: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token with a warm page cache: of edgeq's whole command, of the peer from loading on."""
    seconds: dict[str, list[float]] = {form: [] for form in FORMS[bits]}
    for turn in range(rounds + 1):
        for form in FORMS[bits]:
            path = paths[form]
            taken = start_edgeq(path, threads) if form.startswith("edgeq") else run_alone("start", form, path, threads)
            if turn:
                seconds[form].append(taken)
    times = {form: median(samples) for form, samples in seconds.items()}
    ours, *peers = times
    ratio = times[ours] / min(times[peer] for peer in peers)
    shown = "  ".join(f"{form} {seconds:.2f} s" for form, seconds in times.items())
    print(f"{bits}-bit  start to first token:  {shown}  {ratio:.2f}x")
    return {"bits": bits, "threads": threads, "seconds": seconds, "ratio": ratio}


def measure_quantize(checkpoint: str, bits: int, work: Path) -> dict[str, Any]:
    """Time and peak memory of `edgeq quantize` with its default recipe, and what came out."""
    report, out = work / "report.json", work / "quantized"
    arguments = ["quantize", checkpoint, "-o", str(out), "--bits", str(bits), "--report", str(report), "--force"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", "from edgeq.cli import main; main()", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit("edgeq quantize failed")
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    text = json.loads(report.read_text())["parts"]["text"]
    print(f"{bits}-bit  quantize:  {seconds:.1f} s  {peak / 1e6:.0f} MB")
    return {
        "bits": bits, "threads": os.cpu_count() or 1, "seconds": seconds, "peak_nbytes": peak,
        "nbytes": text["nbytes"], "bits_per_weight": text["bits_per_weight"],
    }  # fmt: skip


# --- preparation -----------------------------------------------------------------------------------------------------


def prepare(checkpoint: str, work: Path, bits: Sequence[int]) -> dict[str, Path]:
    """The models by form, those made that are missing."""
    work.mkdir(parents=True, exist_ok=True)
    paths = {form: work / (form.split()[1] + ("" if form.startswith("edgeq") else ".gguf"))
             for b in bits for form in FORMS[b]}  # fmt: skip
    for form, path in paths.items():
        if path.exists():
            continue
        print(f"making {path}", file=sys.stderr)
        if form.startswith("edgeq"):
            from edgeq.quant import quantize

            quantize(checkpoint, path, recipe=path.name)
        else:
            quantize_gguf(f16_file(checkpoint, work), path)
    return paths


def f16_file(checkpoint: str, work: Path) -> Path:
    path = work / "f16.gguf"
    if not path.exists():
        from edgeq.checkpoint import open_checkpoint
        from edgeq.hub import find_model
        from edgeq.quant.gguf_export import export_gguf

        export_gguf(open_checkpoint(find_model(checkpoint)), path, "f16")
    return path


def quantize_gguf(source: Path, out: Path) -> None:
    import llama_cpp as L

    L.llama_log_set(_silent(L), ctypes.c_void_p(0))
    settings = L.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[out.stem]
    partial = out.with_suffix(".partial")
    if L.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {out.stem}")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("work", type=Path)
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("-t", "--threads", default="4")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "memory", "start", "quantize"))
    parser.add_argument("--tests", help="numbers of speed tests, from 0: " + ", ".join(test.name for test in SPEEDS))
    parser.add_argument("--busy", type=int, default=0, help="other programs that compute meanwhile")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--figures", metavar="RUN", help="write the results to docs/figures.json, as the run RUN")
    parser.add_argument("--model", default="0.8B", help="the model's name in docs/figures.json")
    parser.add_argument("--machine", help="the machine in docs/figures.json, such as '4 vCPUs of a Zen 4 server'")
    options = parser.parse_args()
    bits = [int(b) for b in options.bits.split(",")]
    threads = [int(t) for t in options.threads.split(",")]
    tests = [SPEEDS[int(i)] for i in options.tests.split(",")] if options.tests else SPEEDS
    paths = prepare(options.checkpoint, options.work, bits)
    report: dict[str, list[Any]] = {"speed": [], "memory": [], "start": [], "quantize": []}
    print(f"{options.checkpoint} on {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with busy(options.busy):
        for b in bits:
            if options.only in (None, "speed"):
                for count in threads:
                    report["speed"] += compare_speed(b, paths, count, options.rounds, tests)
            if options.only in (None, "memory"):
                report["memory"].append(compare_memory(b, paths, max(threads)))
            if options.only in (None, "start"):
                report["start"].append(compare_start(b, paths, max(threads), options.rounds))
            if options.only in (None, "quantize"):
                report["quantize"].append(measure_quantize(options.checkpoint, b, options.work))
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["speed"]:
        row["busy"] = options.busy
    if options.figures:
        figures.add(
            options.figures, options.machine or platform.machine(), CONDITIONS, figures.rows_of(report, options.model)
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--be"]:
        what, form, path, threads = sys.argv[2:]
        {"serve": serve, "memory": measure_memory, "start": measure_start}[what](form, path, int(threads))
    else:
        main()
