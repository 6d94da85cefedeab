"""Prompts with pictures: ids and positions as transformers has them, features in their place, conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vision_cases import DATA, case

import edgeq
from edgeq import state_io
from edgeq.api import Model
from edgeq.engine import Feed
from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.model import text
from edgeq.session import sight
from edgeq.session.context import Context
from edgeq.session.parts import sources_of
from edgeq.session.places import Pads, find_places, positions
from edgeq.session.prompt import Prompt
from edgeq.session.visual_settings import VisualSettings
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.vision.visual import Visual

CASES = json.loads((Path(__file__).parent / "data" / "prompts.json").read_text())
ROUNDING = 1e-9  # float32 in another order: NumPy's products choose one by the shape of their input


def visual(kind: Any, grid: Sequence[int], timestamps: Sequence[float] = (), seed: int = 0) -> Visual:
    """A picture of some size; the patches tell it from others."""
    frames, rows, columns = grid

    pixels = np.random.default_rng(seed).uniform(-1, 1, (frames * rows * columns, 1536)).astype(np.float32)
    return Visual(kind, (frames, rows, columns), 2, pixels, f"{kind} {grid} {seed}".encode(), tuple(timestamps))


def image(rows: int = 3, columns: int = 3, seed: int = 0) -> Visual:
    """An image of rows x columns tokens."""
    return visual("image", (1, 2 * rows, 2 * columns), seed=seed)


@pytest.fixture(scope="module", params=["numpy", "cpu"])
def model(request: pytest.FixtureRequest) -> Model:
    if next(b for b in edgeq.backends.available() if b.name == request.param).ops is None:
        pytest.skip(f"the {request.param} backend does not run here")
    return edgeq.load("demo", backend=request.param)


@pytest.fixture(scope="module")
def demo() -> Model:
    return edgeq.load("demo", backend="numpy")


class TestAgainstTransformers:
    """The fixture has what tools/make_prompt_fixtures.py made of the same histories."""

    @pytest.mark.parametrize("name", CASES)
    def test_ids_and_positions(self, demo: Model, name: str) -> None:
        case = CASES[name]
        prompt = demo.prompt(
            self.with_pictures(case), case.get("thinking"), case.get("tools"),
            visual_settings=VisualSettings(outer_vision_tokens=not case["inner"]),
            add_vision_id=case.get("add_vision_id", False),
        )  # fmt: skip
        assert prompt.ids == case["ids"]
        assert prompt.positions.dtype == np.int32
        assert prompt.positions.tolist() == case["positions"]
        assert prompt.rope_delta == case["rope_delta"]
        state = demo.advance(prompt.ids, visuals=prompt.visuals)
        assert state.next_position == len(prompt.ids) + prompt.rope_delta == 1 + prompt.positions.max()

    @pytest.mark.parametrize("name", ["image", "two", "earlier turns"])
    def test_of_a_conversation_too(self, demo: Model, name: str) -> None:
        """A first turn is the prompt, and a later one its end."""
        messages = self.with_pictures(CASES[name])
        chat = demo.chat(thinking=CASES[name].get("thinking"), max_tokens=3, temperature=0.0)
        if messages[0]["role"] == "system":
            return
        chat.send(messages[0]["content"])
        assert list(chat.ids) == CASES[name]["ids"]

    @staticmethod
    def with_pictures(case: Any) -> list[dict[str, Any]]:
        grids = {kind: iter(grids) for kind, grids in case["grids"].items()}
        times = iter(case["timestamps"])

        def part(p: dict[str, Any]) -> dict[str, Any]:
            if p["type"] == "text":
                return p
            kind = p["type"]
            return {"type": kind, kind: visual(kind, next(grids[kind]), next(times) if kind == "video" else ())}

        return [
            {**m, "content": [part(p) for p in m["content"]] if isinstance(m["content"], list) else m["content"]}
            for m in case["messages"]
        ]


class TestAgainstGoldens:
    """Last logits and greedy tokens of tests/data/vision, from ids and pixels to tokens."""

    @pytest.mark.parametrize("name", ["image", "two", "smallest", "video", "mixed"])
    @pytest.mark.parametrize("shape", ["narrow", "wide", "table-up", "table-down", "untied"])
    def test_tiny_checkpoints(self, shape: str, name: str) -> None:
        model, c = edgeq.load(DATA / shape, backend="numpy"), case(DATA / shape / "golden.safetensors", name)
        ends = np.cumsum([0, *(np.prod(grid) for grid in c.grids)])
        visuals = [
            (["image", "video"][kind - 1], c.pixels[a:b], grid)
            for kind, a, b, grid in zip(c.kinds, ends, ends[1:], c.grids, strict=False)
        ]
        ids = c.ids.tolist()
        prompt = Prompt.of(ids, model.sight.places(ids, visuals))
        assert np.array_equal(prompt.positions, c.positions)
        assert prompt.rope_delta == c.rope_delta
        logits, _ = model.forward(ids, None, visuals=visuals)
        assert nmse(c.logits, logits) <= ROUNDING  # a GELU of the wrong kind costs 3e-7
        reply = model.generate(prompt, max_tokens=len(c.greedy), temperature=0.0, ignore_eos=True, loop_guard=False)
        for _ in reply:
            pass
        assert reply.ids == c.greedy


class TestPlaces:
    PADS = Pads(8, 9)

    def test_text_goes_on_after_the_largest_coordinate(self) -> None:
        a, b = image(2, 3), visual("video", (2, 4, 2))
        ids = [1, *[8] * 6, 1, 1, 9, 9, 1, 9, 9, 1]
        places = find_places(ids, [a, b], self.PADS, start=100, position=50)
        assert [(p.start, p.position, p.height, p.width, p.frame) for p in places] == [
            (101, 51, 2, 3, 0), (109, 56, 2, 1, 0), (112, 59, 2, 1, 1),
        ]  # fmt: skip
        found = positions(places, 100, len(ids), 50)
        assert found.tolist() == [
            [50, 51, 51, 51, 51, 51, 51, 54, 55, 56, 56, 58, 59, 59, 61],
            [50, 51, 51, 51, 52, 52, 52, 54, 55, 56, 57, 58, 59, 60, 61],
            [50, 51, 52, 53, 51, 52, 53, 54, 55, 56, 56, 58, 59, 59, 61],
        ]

    @given(st.data())
    def test_any_cut_gives_the_same_positions(self, data: Any) -> None:
        sizes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3)), max_size=4))
        ids = [i for h, w, words in sizes for i in [*[8] * (h * w), *[1] * words]] or [1]
        places = find_places(ids, [image(h, w) for h, w, _ in sizes], self.PADS)
        whole = positions(places, 0, len(ids), 0)
        cut, n = data.draw(st.integers(0, len(ids))), len(ids)
        after = int(whole[:, :cut].max(initial=-1)) + 1
        pieces = [
            positions([p for p in places if p.start < b and p.stop > a], a, b - a, after if a else 0)
            for a, b in ((0, cut), (cut, n))
        ]
        assert np.array_equal(np.concatenate(pieces, axis=1), whole)

    @pytest.mark.parametrize(
        ("ids", "visuals", "message"),
        [
            ([1, 8, 8], [image(1, 3)], "has 2 tokens for pictures, expected 3 for the 1 pictures"),
            ([1, 2], [image(1, 1)], "has 0 tokens for pictures"),
            ([8] * 4, [image(1, 1)], "has 4 tokens for pictures, expected 1"),
            ([8, 1, 8], [image(1, 2)], "the 2 tokens of a picture, from token 0 .* not all together"),
            ([8, 9], [image(1, 2)], "not all together"),
            ([9, 9], [image(1, 2)], "at token 0 .* another kind of picture than the image"),
            ([8], [visual("video", (1, 2, 2))], "another kind of picture than the video"),
        ],
    )
    def test_pictures_that_do_not_fit(self, ids: Any, visuals: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            find_places(ids, visuals, self.PADS)


class TestForward:
    """`Model.forward` with visuals against the layers run by hand on one array of vectors."""

    def prompt(self, model: Model, *sizes: tuple[int, int], words: int = 5) -> Prompt:
        parts: list[Any] = []
        for seed, (rows, columns) in enumerate(sizes):
            parts += [
                {"type": "text", "text": " ".join(["the number"] * words)},
                {"type": "image", "image": image(rows, columns, seed)},
            ]
        return model.prompt([{"role": "user", "content": parts}])

    def by_hand(self, model: Model, prompt: Prompt) -> Any:
        ops, engine = model.ops, model.engine
        x = np.array(ops.numpy(text.embed(ops, engine.weights.text, np.array(prompt.ids, np.int32))))
        x[np.array(prompt.ids) == model.config.image_token_id] = np.concatenate(
            [ops.numpy(engine.see(pixels, grid)) for _, pixels, grid in prompt.visuals]
        )
        hidden, _ = text.run_layers(
            ops, model.config.text, engine.weights.text, ops.array(x), prompt.positions, [len(x)], [engine.state()], [0]
        )
        return ops.numpy(text.logits(ops, engine.weights.text, hidden))

    def test_the_vectors_stand_where_they_should(self, model: Model) -> None:
        prompt = self.prompt(model, (3, 4), (2, 2), (1, 5))
        rows = model.logits(prompt.ids, visuals=prompt.visuals)
        assert nmse(self.by_hand(model, prompt), rows) <= ROUNDING
        last, state = model.forward(prompt.ids, visuals=[(kind, pixels, grid) for kind, pixels, grid in prompt.visuals])
        assert nmse(rows[-1], last) <= ROUNDING
        assert (state.length, state.next_position) == (len(prompt.ids), len(prompt.ids) + prompt.rope_delta)

    def test_going_on_in_the_middle_of_a_picture(self, model: Model) -> None:
        """A picture across a cut of the chunks: interrupted there, or not, the bits are the same."""
        chunk = model.engine.chunk
        prompt = self.prompt(model, (4, chunk // 8), (chunk // 16, 20), words=chunk // 8)
        assert any(p.start % chunk + p.height * p.width > chunk for p in model.sight.places(prompt.ids, prompt.visuals))
        places = model.sight.places(prompt.ids, prompt.visuals)
        cold = Context(model.engine, sight=model.sight)
        expected = cold.feed(prompt.ids, places=places)
        for cut in range(chunk, len(prompt.ids), chunk):
            warm = Context(model.engine, sight=model.sight)
            warm.feed(prompt.ids[:cut], rows=0, places=places)
            middle = warm.state
            assert np.array_equal(warm.feed(prompt.ids[cut:], places=places), expected)
            assert warm.state.next_position == cold.state.next_position
            again = Context(model.engine, middle, sight=model.sight)
            assert np.array_equal(again.feed(prompt.ids[cut:], places=places), expected)

    def test_cut_anywhere_the_result_is_the_same_up_to_rounding(self, model: Model) -> None:
        prompt = self.prompt(model, (5, 6), (2, 3))
        places = model.sight.places(prompt.ids, prompt.visuals)
        expected = Context(model.engine, sight=model.sight).feed(prompt.ids, places=places)
        for cut in range(1, len(prompt.ids), 7):
            context = Context(model.engine, sight=model.sight)
            context.feed(prompt.ids[:cut], rows=0, places=places)
            assert nmse(expected, context.feed(prompt.ids[cut:], places=places)) <= 1e-6  # see test_model.py

    def test_from_a_state_with_pictures_before(self, model: Model) -> None:
        first, second = self.prompt(model, (3, 3)), self.prompt(model, (2, 5))
        whole, _ = model.forward(first.ids + second.ids, visuals=[*first.visuals, *second.visuals])
        _, state = model.forward(first.ids, visuals=first.visuals)
        restored = state_io.state_from_arrays(model.ops, model.config.text, state_io.state_arrays(model.ops, state))
        assert restored.next_position == state.next_position < state.length
        for start in (state, restored):
            logits, end = model.forward(second.ids, start, visuals=second.visuals)
            assert nmse(whole, logits) <= 1e-6
            assert end.next_position == end.length + first.rope_delta + second.rope_delta

    def test_without_pictures_their_tokens_are_tokens(self, model: Model) -> None:
        pad = model.config.image_token_id
        assert pad is not None
        logits, state = model.forward([5, pad, 7])
        (output,) = model.engine.run([Feed(model.state(), np.array([5, pad, 7], np.int32))])
        assert np.array_equal(logits, output.logits[0])
        assert state.next_position == 3

    def test_a_place_without_its_picture(self, model: Model) -> None:
        prompt = self.prompt(model, (1, 1))
        for wrong in (lambda: model.forward(prompt.ids), lambda: model.generate(prompt.ids)):
            with pytest.raises(UsageError, match="has a place for a picture, but no picture"):
                wrong()
        with pytest.raises(UsageError, match="has 1 tokens for pictures, expected 2 for the 2 pictures"):
            model.forward(prompt.ids, visuals=prompt.visuals * 2)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (5, "a picture must be .kind, pixel_values, grid., got 5"),
            (("image", np.zeros((4, 1536), np.float32)), "a picture must be"),
            (("sound", np.zeros((4, 1536), np.float32), (1, 2, 2)), "a picture must be"),
            (("image", np.zeros((4, 1536)), (1, 2, 2)), "a picture must be"),
            (("image", np.zeros((4, 1536), np.float32), (1, 4, 1)), "a picture must be"),
            (("image", np.zeros((4, 1536), np.float32), (1, 2)), "a picture must be"),
            (("image", np.zeros((4, 1536), np.float32), (1.5, 2, 2)), "a picture must be"),
            (("image", np.zeros((4, 1536), np.float32), "122"), "a picture must be"),
            (("image", np.full((4, 1536), np.nan, np.float32), (1, 2, 2)), "patches that are NaN or infinite"),
            (("video", np.full((4, 1536), -np.inf, np.float32), (1, 2, 2)), "patches that are NaN or infinite"),
            (("image", np.zeros((4, 1536), np.float32), (1, 4, 2)), "has 4 patches, expected 1 x 4 x 2"),
            (("image", np.zeros((4, 5), np.float32), (1, 2, 2)), r"float32 \(4, 5\)"),
        ],
    )
    def test_what_is_no_picture(self, demo: Model, wrong: Any, message: str) -> None:
        ids = self.prompt(demo, (1, 1)).ids
        with pytest.raises(UsageError, match=message):
            demo.forward(ids, visuals=[wrong])

    @pytest.mark.parametrize("wrong", [5, 1.5, {1: 2}, iter(())])
    def test_what_is_no_list_of_pictures(self, demo: Model, wrong: Any) -> None:
        with pytest.raises(UsageError, match="visuals must be a list of pictures, got"):
            demo.forward([1, 2], visuals=wrong)

    def test_a_model_that_does_not_see(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values())
        blind = edgeq.load(tmp_path, backend="numpy")
        with pytest.raises(UsageError, match=f"{tmp_path} does not see: it has no vision tower"):
            blind.forward([1, 2], visuals=[image()])


class TestGenerate:
    def test_a_prompt_with_pictures(self, model: Model) -> None:
        prompt = model.prompt([{"role": "user", "content": [{"type": "image", "image": image(seed=3)}]}])
        reply = model.generate(prompt, max_tokens=6, temperature=0.0, ignore_eos=True)
        said = [piece.token for piece in reply if piece.token is not None]
        logits, state = model.forward(prompt.ids, visuals=prompt.visuals)
        for token in said:
            assert token == int(np.argmax(logits[: model.need_tokenizer().vocab_size]))
            logits, state = model.forward([token], state)

    def test_positions_of_ones_own_are_refused(self, demo: Model) -> None:
        prompt = demo.prompt("hello")
        with pytest.raises(UsageError, match="positions do not belong to its ids"):
            demo.generate(prompt._replace(positions=prompt.positions + 1))


class TestParts:
    """The same picture, however its part is written."""

    V = image()

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image", "image": V}, {"image": V}, {"type": "image_url", "image_url": {"url": V}},
            {"type": "image_url", "image_url": V}, {"type": "input_image", "image_url": V}, {"type": "image", "url": V},
            {"type": "image", "path": V}, {"type": "image_url", "image_url": {"url": V, "detail": "auto"}},
        ],
    )  # fmt: skip
    def test_images(self, part: Any) -> None:
        content, sources = sources_of([{"type": "input_text", "text": "a"}, part, {"text": "b"}])
        assert content == [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
        assert [(source.kind, source.what) for source in sources] == [("image", self.V)]

    def test_base64(self) -> None:
        _, (source,) = sources_of([{"type": "image", "base64": "aGVsbG8="}])
        assert source.what == b"hello"
        with pytest.raises(UsageError, match="base64 of a part of the message cannot be decoded"):
            sources_of([{"type": "image", "base64": "#"}])

    def test_videos_with_settings(self) -> None:
        content, (source,) = sources_of([{"type": "video", "video": ["a.png", "b.png"], "fps": 1.0, "max_frames": 4}])
        assert content == [{"type": "video"}]
        assert source == ("video", ["a.png", "b.png"], {"fps": 1.0, "max_frames": 4})

    def test_given_beside_the_text(self) -> None:
        assert sources_of("x", ["a"], ["b", "c"]) == (
            [{"type": "image"}, {"type": "video"}, {"type": "video"}, {"type": "text", "text": "x"}],
            [("image", "a", {}), ("video", "b", {}), ("video", "c", {})],
        )
        assert sources_of([{"type": "text", "text": "x"}, {"type": "image"}], ["a"])[1] == [("image", "a", {})]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([{"type": "input_audio", "input_audio": {}}], "of type 'input_audio'"),
            ([{"type": "image", "image": "a", "url": "b"}], "has both image and url"),
            ([{"type": "text", "text": "x", "image": "a"}], "text and picture at once"),
            ([{"type": "image_url", "image_url": {"url": "a", "detail": "low"}}], "has 'detail', which"),
            ([{"type": "image", "image": "a", "nframes": 3}], "has 'nframes', which .* image does not take"),
            ([{"type": "image"}], "has 1 parts without a picture of their own, got 0"),
            ([{"type": "text", "text": None}], "has the text None"),
            ([{"type": "text", "text": 5}], "has the text 5"),
            ([{}], "has the text None"),
            (5, "must be text or a list of parts"),
        ],
    )
    def test_what_is_not_understood(self, demo: Model, content: Any, message: str) -> None:
        chat = demo.chat()
        with pytest.raises(UsageError, match=message):
            chat.send(content)
        assert not chat.ids

    @pytest.mark.parametrize("one", ["photo.jpg", b"x", np.zeros((9, 9, 3), np.uint8), V])
    def test_one_picture_is_no_list(self, one: Any) -> None:
        with pytest.raises(UsageError, match="images must be a list, got"):
            sources_of("x", one)

    def test_too_many_and_too_few(self) -> None:
        with pytest.raises(UsageError, match="has 1 parts without a picture of their own, got 2 pictures"):
            sources_of([{"type": "image"}], ["a", "b"])

    def test_what_a_place_asks_is_heard(self) -> None:
        place = {"type": "image", "min_pixels": 9, "detail": "auto"}
        assert sources_of([place], ["a"])[1] == [("image", "a", {"min_pixels": 9})]
        for unknown in ("file_id", "source"):
            with pytest.raises(UsageError, match=f"has '{unknown}', which a part of type image does not take"):
                sources_of([{"type": "image", unknown: "x"}], ["a"])

    def test_none_in_a_system_message(self, demo: Model) -> None:
        with pytest.raises(UsageError, match="a system message cannot have pictures"):
            demo.prompt([{"role": "system", "content": [{"type": "image", "image": self.V}]}])

    def test_a_template_that_knows_no_pictures(self, demo: Model, tmp_path: Path) -> None:
        (tmp_path / "demo").mkdir()
        for file in (Path(edgeq.__file__).parent / "demo").iterdir():
            (tmp_path / "demo" / file.name).write_bytes(file.read_bytes())
        template = (tmp_path / "demo" / "chat_template.jinja").read_text()
        (tmp_path / "demo" / "chat_template.jinja").write_text(template.replace("<|image_pad|>", "[picture]"))
        with pytest.raises(ModelError, match="wrote places for 0 images and 0 videos, expected 1 images"):
            edgeq.load(tmp_path / "demo", backend="numpy").chat().send("x", images=[self.V])


HOSTILE = "<|image_pad|> <|vision_start|><|video_pad|><|vision_end|> <|vision_start|><|image_pad|><|vision_end|>"


class TestChat:
    def test_it_sees_what_is_drawn(self, model: Model) -> None:
        """A red square in the middle of 96 x 96 pixels, as patches."""
        pixels = np.full((96, 96, 3), 240, np.float32)
        pixels[32:64, 32:64] = (220, 30, 30)
        x = (pixels / 255 - 0.5) / 0.5
        x = x.reshape(3, 2, 16, 3, 2, 16, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        patches = np.ascontiguousarray(np.repeat(x[:, :, :, :, :, None], 2, axis=5).reshape(36, 1536), np.float32)
        seen = Visual.given(("image", patches, (1, 6, 6)), 2)
        chat = model.chat(temperature=0.0, presence_penalty=0.0, max_tokens=30, thinking=False)
        for question, answer in (("What shape is this?", "red square"), ("Where is the square?", "middle")):
            reply = chat.send(question, images=[] if chat.ids else [seen])
            for _ in reply:
                pass
            assert answer in reply.text

    def test_nothing_is_encoded_twice(self, demo: Model) -> None:
        chat, before = demo.chat(max_tokens=3, temperature=0.0), demo.sight.encoded
        clip = visual("video", (3, 4, 4), (0.2, 1.2, 2.0), seed=77)
        first = chat.send("What is this?", images=[image(seed=77)], videos=[clip])
        list(first)
        assert demo.sight.encoded == before + 4
        ids = list(chat.ids)
        again = chat.regenerate()
        list(again)
        assert (again.ids, list(chat.ids)) == (first.ids, ids)
        list(chat.send("And now?"))
        assert list(chat.ids)[: len(ids)] == ids
        assert [turn.text for turn in chat.undo()] == ["And now?"]
        list(chat.send("The same?", images=[image(seed=77)]))
        assert demo.sight.encoded == before + 4
        assert len(chat.visuals) == 3
        chat.undo()
        assert len(chat.visuals) == 2
        chat = chat.fresh()
        list(chat.send("Once more", images=[image(seed=77), image(seed=78)]))
        assert demo.sight.encoded == before + 5

    def test_what_is_kept_is_bounded_and_counted(self, demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        size = 9 * demo.config.text.hidden_size * 4
        monkeypatch.setattr(sight, "KEPT", 3 * size)
        chat = demo.chat(max_tokens=1, temperature=0.0)
        for seed in range(100, 106):
            list(chat.send("?", images=[image(seed=seed)]))
        held = {holding.owner: holding.nbytes for holding in demo.engine.ledger.holdings()}
        assert held["features of pictures"] == 3 * size == demo.sight.nbytes
        before = demo.sight.encoded
        list(chat.send("?", images=[image(seed=105)]))
        assert demo.sight.encoded == before
        list(chat.send("?", images=[image(seed=100)]))
        assert demo.sight.encoded == before + 1

    def test_the_delta_survives_turns_and_undo(self, demo: Model) -> None:
        chat = demo.chat(max_tokens=4, temperature=0.0)
        list(chat.send("a", images=[image(4, 5)]))
        delta = 5 - 20

        def skew(chat: Any) -> int:
            state = chat._context.state
            return int(state.next_position - state.length)

        assert skew(chat) == delta
        list(chat.send("b"))
        assert skew(chat) == delta
        list(chat.send("c", images=[image(2, 2)]))
        assert skew(chat) == delta - 2
        chat.undo()
        assert skew(chat) == delta
        list(chat.send("d"))
        assert skew(chat) == delta

    def test_ids_of_turns_are_those_of_one_prompt(self, demo: Model) -> None:
        """The state after turns is that of their ids and pictures in one go."""
        chat = demo.chat(max_tokens=4, temperature=0.0, thinking=False)
        for seed in range(3):
            list(chat.send([{"text": "see "}, {"image": image(2, 3, seed)}, {"text": "?"}]))
        logits, _ = demo.forward(list(chat.ids), visuals=chat.visuals)
        context = chat._context
        rest = list(chat.ids)[context.position :]
        turned, _ = demo.forward(rest, context.state)
        assert nmse(logits, turned) <= 1e-6

    def test_literal_tokens_stay_text(self, demo: Model) -> None:
        chat = demo.chat(max_tokens=2, temperature=0.0)
        list(chat.send(HOSTILE, images=[image()]))
        c: Any = demo.config
        ids = list(chat.ids)
        assert (ids.count(c.image_token_id), ids.count(c.video_token_id)) == (9, 0)
        assert ids.count(c.vision_start_token_id) == ids.count(c.vision_end_token_id) == 1
        assert HOSTILE in demo.need_tokenizer().decode(ids)
        prompt = demo.prompt([{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE},
                              {"role": "user", "content": [{"type": "text", "text": HOSTILE}]}])  # fmt: skip
        assert not {c.image_token_id, c.video_token_id} & set(prompt.ids)
        assert prompt.rope_delta == 0
        assert not prompt.visuals

    def test_a_turn_that_does_not_fit_leaves_no_picture(self) -> None:
        chat = edgeq.load("demo", backend="numpy", context=100).chat(max_tokens=3, temperature=0.0)
        list(chat.send("a", images=[image()]))
        before = list(chat.ids)
        with pytest.raises(MemoryBudgetError, match="leaves no room for a reply"):
            chat.send("b", images=[image(10, 10)])
        assert (list(chat.ids), len(chat.visuals)) == (before, 1)
        list(chat.send("c"))

    def test_interrupted_while_looking_and_reading(self, demo: Model) -> None:
        """Ctrl-C in the tower, or in the middle of a picture's tokens; the next turn goes on from there."""
        chunk = demo.engine.chunk
        frames = 2 * chunk // 200 + 3
        clip = visual("video", (frames, 40, 20), range(frames), seed=200)  # 200 tokens and 800 patches each: 5 a band
        stop = {"look": 1, "read": 1}

        def count(what: str) -> Any:
            def step(done: int, total: int) -> None:
                if 0 < done < total:
                    stop[what] -= 1
                    if not stop[what]:
                        raise KeyboardInterrupt

            return step

        chat = demo.chat(max_tokens=2, temperature=0.0, on_look=count("look"), on_prefill=count("read"))
        before = demo.sight.encoded
        with pytest.raises(KeyboardInterrupt):
            list(chat.send("a", videos=[clip]))
        assert demo.sight.encoded == before + 5
        assert chat._context.position == 0
        with pytest.raises(KeyboardInterrupt):
            list(chat.regenerate())
        assert demo.sight.encoded == before + frames
        assert 0 < chat._context.position <= chunk  # where its first part ended, which is to be kept
        list(chat.send("b"))
        logits, _ = demo.forward(list(chat.ids), visuals=chat.visuals)
        turned, _ = demo.forward(list(chat.ids)[chat._context.position :], chat._context.state)
        assert nmse(logits, turned) <= 1e-6

    def test_pictures_change_what_is_recommended(self, demo: Model, tmp_path: Path) -> None:
        language = demo.language
        if demo.checkpoint.sampling:
            return
        assert language.recommended(thinking=False).presence_penalty == 2.0
        assert language.recommended(thinking=False, vision=True).temperature == 0.7

    @settings(max_examples=10, deadline=None)
    @given(
        st.lists(
            st.tuples(st.text(max_size=9), st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=2)),
            min_size=1, max_size=3,
        ), st.integers(0, 9),
    )  # fmt: skip
    def test_ids_of_a_turn_are_a_prefix_of_the_next(self, demo: Model, turns: Any, seed: int) -> None:
        chat, before, shown = demo.chat(max_tokens=3, seed=seed, temperature=1.5), list[int](), 0
        for said, sizes in turns:
            list(chat.send(said, images=[image(*size) for size in sizes]))
            shown += sum(h * w for h, w in sizes)
            assert list(chat.ids)[: len(before)] == before
            before = list(chat.ids)
        assert sum(v.tokens for v in chat.visuals) == shown
