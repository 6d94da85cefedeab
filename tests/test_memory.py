"""What a process takes: constant but for keys and values, and within the budgets on models of the real shapes.

Every measurement is a process of its own under RLIMIT_DATA, which counts what is private and writable (heap, stacks)
and not the mapped weights; the peak of the resident set counts both. The real shapes run where EDGEQ_REF_DIR names a
folder with their checkpoints, quantized with the default recipes: q4_0.8b, q4_2b, q8_2b, q4_4b, and 2b unquantized.
Their weights may be random.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image
from process import run_python

from edgeq.testing import config_values, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status and sets RLIMIT_DATA"),
]

MB = 1_000_000

# Runs a model over `steps` numbers of tokens in one sequence; prints, after each, the peak of the resident set and of
# its anonymous part, what the state's keys and values hold, and the length. `chunk` tokens are fed at a time.
RUN = """
import json, resource, sys
path, backend, limit, chunk, kv_bits, *steps = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from edgeq.session.context import Context
from edgeq.api import load
from edgeq.memory.plan import plan_memory
from edgeq.state import KVCache

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

model = load(path, backend=backend, kv_bits=kv_bits)
context, anonymous = Context(model.engine), 0
for end in steps:
    for start in range(context.position, end, chunk):
        context.feed([i * 7919 % model.vocab_size for i in range(start, min(end, start + chunk))])
    anonymous = max(anonymous, status("RssAnon"))
    kv = sum(layer.nbytes for layer in context.state.layers if isinstance(layer, KVCache))
    planned = plan_memory(model.checkpoint, model.ops, end).total
    print(json.dumps({
        "peak": status("VmHWM"), "anonymous": anonymous, "kv": kv, "length": context.position, "planned": planned,
    }))
"""


def run(
    path: Path, *steps: int, backend: str = "cpu", limit: int = 1 << 40, chunk: int = 4096, kv_bits: int | None = None
) -> list[dict[str, int]]:
    """The figures after each number of tokens."""
    request = json.dumps([str(path), backend, limit, chunk, kv_bits, *steps])
    done = run_python(RUN, request, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sequences may be long."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    write_checkpoint(folder, config_values(max_position_embeddings=1 << 18))
    return folder


class TestGrowth:
    """Peak memory after many tokens is that after 1,000 and the keys and values since, within 1 MB."""

    def check(self, after: list[dict[str, int]]) -> None:
        first, last = after
        assert first["length"] >= 1000
        assert last["length"] >= 20 * first["length"]
        grown, accounted = last["peak"] - first["peak"], last["kv"] - first["kv"]
        assert grown <= accounted + MB, f"{grown / MB:.2f} MB more, {accounted / MB:.2f} of them keys and values"

    def test_generating(self, small: Path) -> None:
        pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
        self.check(run(small, 1000, 20_000, chunk=1))

    def test_prompts(self, small: Path) -> None:
        pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
        self.check(run(small, 1024, 50_000))


# Peak in GB, text only, at 4,096 tokens; and the limit of private memory in MB, of which 200 are reserved by NumPy and
# the threads without being used.
BUDGETS = {
    "q4_0.8b": (0.68, 400), "q4_2b": (1.35, 400), "q8_2b": (2.2, 400), "2b": (4.0, 400), "q4_4b": (2.75, 600),
}  # fmt: skip


def reference(name: str) -> Path:
    """A checkpoint of a real shape, or the test is skipped."""
    pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
    folder = Path(os.environ.get("EDGEQ_REF_DIR", "")) / name
    if "EDGEQ_REF_DIR" not in os.environ or not folder.exists():
        pytest.skip(f"EDGEQ_REF_DIR names no folder with the checkpoint {name}")
    return folder


@pytest.mark.parametrize("bits", ["q4_", "q8_", ""])
@pytest.mark.parametrize("size", ["0.8b", "2b", "4b"])
def test_the_plan_predicts_the_peak(size: str, bits: str) -> None:
    """Within 3 % of what a prompt that fills the context takes."""
    (after,) = run(reference(bits + size), 4096)
    assert abs(after["planned"] / after["peak"] - 1) <= 0.03, (
        f"{after['planned'] / MB:.0f}, {after['peak'] / MB:.0f} MB"
    )


@pytest.mark.parametrize("name", BUDGETS)
def test_real_shapes(name: str) -> None:
    """A prompt that fills the context."""
    folder = reference(name)
    peak, limit = BUDGETS[name]
    (after,) = run(folder, 4096, limit=limit * MB)
    assert after["peak"] <= peak * 1e9, f"{after['peak'] / MB:.0f} MB, {after['anonymous'] / MB:.0f} of them private"


# Shows a model a picture or a video, and prints the peak of the resident set and the tokens that it took.
SEE = """
import json, sys
path, kind, source = json.loads(sys.argv[1])
from edgeq.api import load
from edgeq.session.visual_settings import CHAT_VISUALS
chat = load(path, backend="cpu").chat(
    max_tokens=4, temperature=0.0, draft="off", visual_settings=CHAT_VISUALS.replace(fps=2.0)
)
for _ in chat.send("What is this?", **{kind: [source]}):
    pass
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([peak, sum(visual.tokens for visual in chat.visuals)]))
"""
SEEING = {"q4_0.8b": 0.75, "q4_2b": 1.45, "q4_4b": 2.9}  # GB with a picture of 1,024 tokens: the whole process


def seen(path: Path, kind: str, source: Path) -> tuple[int, int]:
    """Peak of the resident set in bytes, and the tokens of a picture."""
    done = run_python(SEE, json.dumps([str(path), kind, str(source)]), timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, tokens = json.loads(done.stdout)
    return peak, tokens


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 1,024 tokens, a photo of 24 megapixels, and the frames of a ten-minute video at two a second."""
    folder = tmp_path_factory.mktemp("shown")
    noise = Image.effect_noise((1024, 1024), 60).convert("RGB")
    noise.save(folder / "picture.png")
    noise.resize((6000, 4000)).save(folder / "photo.jpg", quality=90)
    (folder / "video").mkdir()
    noise.resize((1920, 1080)).save(folder / "frame.jpg")
    for i in range(1200):
        (folder / "video" / f"{i:04}.jpg").symlink_to(folder / "frame.jpg")
    return folder


@pytest.mark.parametrize("name", SEEING)
def test_pictures(name: str, shown: Path) -> None:
    """Within the budget, and whatever is larger in 100 MB more, at the sizes that a conversation begins with."""
    folder = reference(name)
    peak, tokens = seen(folder, "images", shown / "picture.png")
    assert tokens == 1024
    assert peak <= SEEING[name] * 1e9, f"{peak / MB:.0f} MB"
    for kind, source, most in (("images", "photo.jpg", 1024), ("videos", "video", 2048)):
        larger, tokens = seen(folder, kind, shown / source)
        assert 0.8 * most <= tokens <= most
        assert larger <= peak + 100 * MB, f"{source}: {larger / MB:.0f} MB, {peak / MB:.0f} MB for a picture"


# Sees a picture of 1,024 tokens and runs a prompt with it; prints the peak.
FORWARD = """
import sys
import numpy as np
from edgeq.api import load

model, grid = load(sys.argv[1], backend="cpu"), (1, 64, 64)
c = model.config
pixels = np.zeros((64 * 64, c.vision.patch_values), np.float32)
ids = [c.vision_start_token_id, *[c.image_token_id] * 1024, c.vision_end_token_id, *range(100)]
model.forward(ids, visuals=[("image", pixels, grid)])
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(("name", "budget"), [("q4_0.8b", 0.75), ("q4_2b", 1.45), ("q4_4b", 2.9)])
def test_real_shapes_that_see(name: str, budget: float) -> None:
    """The tower's pages are let go before the prompt: a picture of 1,024 tokens takes little more than its text."""
    done = run_python(FORWARD, str(reference(name)), timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout)
    assert peak <= budget * 1e9, f"{peak / MB:.0f} MB"


# Turns, branches and taken-back turns under a ceiling, with prompts up to `longest` tokens; prints the peak, the tokens
# of the longest sequence that ran and how many prompts were refused.
TALK = """
import json, sys
path, memory, kv_bits, context, lengths = json.loads(sys.argv[1])
from edgeq.api import load
from edgeq.errors import MemoryBudgetError
from edgeq.memory.resident import peak_resident
from edgeq.session.context import Context
model = load(path, backend="cpu", memory=memory, kv_bits=kv_bits, context=context)
states, refused, longest = [], 0, 0
for length in lengths:
    for branch in (False, True):
        sequence = Context(model.engine, states[0] if branch and states else None, prefixes=model.prefixes)
        try:
            tokens = min(length, 300) if branch else length
            sequence.feed([(i * 7919 + branch) % model.vocab_size for i in range(tokens)])
            for token in range(3):
                sequence.feed([token])
        except MemoryBudgetError:
            refused += 1
            continue
        longest = max(longest, sequence.position)
        states = [*states, sequence.state][-2:]
print(json.dumps([peak_resident(), longest, refused]))
"""


@pytest.mark.parametrize("name", BUDGETS)
def test_a_ceiling_is_kept(name: str) -> None:
    """With prompts of 10 to 3,000 tokens (30,000 where EDGEQ_LONG is set), branches, and two states kept."""
    ceiling = BUDGETS[name][0]
    lengths = [10, 700, 3000, *([30_000] if "EDGEQ_LONG" in os.environ else [])]
    done = run_python(TALK, json.dumps([str(reference(name)), f"{ceiling}G", None, None, lengths]), timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, longest, _ = json.loads(done.stdout)
    assert peak <= ceiling * 1e9, f"{peak / MB:.0f} MB"
    assert longest >= 3000


@pytest.mark.parametrize("name", ["q4_0.8b", "q4_2b", "q4_4b"])
def test_six_tenths_of_the_weights(name: str) -> None:
    """Whatever of the weights does not stay is read again in every pass."""
    folder = reference(name)
    (whole,) = run(folder, 16)
    memory = int(0.6 * (whole["peak"] - 60 * MB))
    done = run_python(TALK, json.dumps([str(folder), memory, None, None, [10, 600]]), timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, longest, refused = json.loads(done.stdout)
    assert peak <= memory, f"{peak / MB:.0f} of {memory / MB:.0f} MB"
    assert longest >= 600
    assert not refused


# A state that holds 260,144 tokens of made-up keys and values; then 2,000 tokens, the last 8 one by one.
FULL = """
import json, sys, time
path, memory, total, real = json.loads(sys.argv[1])
import numpy as np
from edgeq.api import load
from edgeq.memory.resident import peak_resident
from edgeq.session.context import Context
from edgeq.state import KVCache
model = load(path, backend="cpu", memory=memory, kv_bits=4, context=total)
c, state, filled = model.config.text, model.state(), total - real
draws = np.random.default_rng(0)
page = [draws.standard_normal((256, c.num_key_value_heads, c.head_dim), np.float32) for _ in range(2)]
layers = []
for layer in state.layers:
    while isinstance(layer, KVCache) and layer.length < filled:
        layer = layer.appended(*(x[: filled - layer.length] for x in page))
    layers.append(layer)
context = Context(model.engine, state._replace(layers=tuple(layers), length=filled, next_position=filled))
started = time.perf_counter()
context.feed([i * 7919 % model.vocab_size for i in range(real - 8)])
prompt = time.perf_counter()
for i in range(8):
    logits = context.feed([i])
kv = sum(layer.nbytes for layer in context.state.layers if isinstance(layer, KVCache))
print(json.dumps({
    "peak": peak_resident(), "length": context.position, "kv": kv, "finite": bool(np.isfinite(logits).all()),
    "prompt": (real - 8) / (prompt - started), "generated": 8 / (time.perf_counter() - prompt),
}))
"""


def test_a_quarter_of_a_million_tokens() -> None:
    """262,144 tokens of the 2B in 4 GB, keys and values in 4 bits: filled by state, the last 2,000 run for real."""
    request = json.dumps([str(reference("q4_2b")), "4G", 1 << 18, 2000])
    done = run_python(FULL, request, timeout=7200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["peak"] <= 4000 * MB, f"{found['peak'] / MB:.0f} MB"
    assert found["length"] == 1 << 18
    assert found["finite"]
