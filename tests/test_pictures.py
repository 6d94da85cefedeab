"""Pictures from files to answers: the Python API and the command line, with the demo model."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Run, leave_home, runner
from PIL import Image, ImageDraw
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

import edgeq
import edgeq.vision
from edgeq import VisualSettings
from edgeq.api import Model
from edgeq.cli.repl import Repl
from edgeq.errors import EdgeqError, UsageError
from edgeq.hub import DEMO
from edgeq.session.parts import Source

PICTURE = DEMO / "picture.png"
GREEDY = ("--temp", "0", "--presence-penalty", "0", "--no-think", "--max-tokens", "20", "--backend", "numpy")
COUNT, ANSWER = "How many figures are there?", "There are three figures."
WHERE = "What is in the top left corner?"


@pytest.fixture(autouse=True)
def quiet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(tmp_path, monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(capsys, monkeypatch)


@pytest.fixture(scope="module")
def demo() -> Model:
    return edgeq.load("demo", backend="numpy")


def say(chat: Any, *args: Any, **kwargs: Any) -> str:
    reply = chat.send(*args, **kwargs)
    for _ in reply:
        pass
    text: str = reply.text
    return text


def greedy(model: Model, **settings: Any) -> Any:
    return model.chat(temperature=0.0, presence_penalty=0.0, thinking=False, max_tokens=20, **settings)


def square(colour: str) -> Image.Image:
    image = Image.new("RGB", (96, 96), (245, 245, 245))
    ImageDraw.Draw(image).rectangle((32, 32, 64, 64), fill=colour)
    return image


class TestFromPython:
    @pytest.mark.parametrize("backend", ["numpy", "cpu"])
    def test_the_picture_that_ships(self, backend: str) -> None:
        if next(b for b in edgeq.backends.available() if b.name == backend).ops is None:
            pytest.skip(f"the {backend} backend does not run here")
        chat = greedy(edgeq.load("demo", backend=backend))
        assert say(chat, COUNT, images=[PICTURE]) == ANSWER
        assert "red circle" in say(chat, WHERE)
        assert "blue square" in say(chat, "What is in the bottom right corner?")

    def test_every_kind_of_source_is_the_same_picture(self, demo: Model) -> None:
        data = PICTURE.read_bytes()
        sources: list[Any] = [
            PICTURE, str(PICTURE), data, Image.open(PICTURE), np.asarray(Image.open(PICTURE).convert("RGB")),
            "data:image/png;base64," + base64.b64encode(data).decode(),
        ]  # fmt: skip
        parts: list[Any] = [{"type": "image", "image": source} for source in sources]
        parts += [
            {"type": "image_url", "image_url": {"url": sources[-1], "detail": "auto"}},
            {"type": "image", "base64": base64.b64encode(data).decode()},
        ]
        before = demo.sight.encoded
        chat = demo.chat(max_tokens=1, temperature=0.0)
        say(chat, [*parts, {"type": "text", "text": "All the same?"}])
        assert demo.sight.encoded <= before + 1
        assert len(chat.visuals) == len(parts)
        assert len({visual.digest for visual in chat.visuals}) == 1

    def test_frames_as_a_video(self, demo: Model, tmp_path: Path) -> None:
        """A figure that changes its colour; each picture twice, so that a temporal patch is one of them."""
        frames = [np.asarray(square(colour)) for colour in ("red", "red", "blue", "blue")]
        assert "is now blue" in say(greedy(demo), "What changed?", videos=[frames])  # it was never taught video
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / f"{i}.png")
        chat = greedy(demo)
        assert "is now blue" in say(chat, "What changed?", videos=[tmp_path])
        (clip,) = chat.visuals
        assert (clip.kind, clip.grid, clip.taken) == ("video", (2, 6, 6), 4)

    def test_frames_in_a_second(self, tmp_path: Path) -> None:
        """Of a list, `fps` says how many there are, of which the checkpoint's two a second are taken."""
        shutil.copytree(DEMO, tmp_path / "demo")
        (tmp_path / "demo" / "video_preprocessor_config.json").unlink()
        demo = edgeq.load(tmp_path / "demo", backend="numpy")
        frames = [np.zeros((96, 96, 3), np.uint8)] * 24
        for parts, times in (
            ({"fps": 2.0}, tuple(i + 0.25 for i in range(12))),
            ({"fps": 8.0}, (0.3125, 1.4375, 2.5625)),
            ({}, (0.166667, 0.791667)), ({"fps": 8.0, "max_frames": 4}, (0.5, 2.375)),
        ):  # fmt: skip
            (clip,) = demo.prompt([{"role": "user", "content": [{"type": "video", "video": frames, **parts}]}]).visuals
            assert clip.timestamps == pytest.approx(times, abs=1e-3)

    def test_settings_reach_the_pixels(self, demo: Model) -> None:
        large = np.zeros((640, 960, 3), np.uint8)

        def tokens(source: Source, **settings: Any) -> int:
            return demo.sight.open(source, VisualSettings(**settings)).tokens

        image = Source("image", large)
        assert tokens(image) == 6  # the demo's own limits: as many pixels as 96 x 96
        assert tokens(image, image_tokens=4) in (2, 4)
        assert tokens(image, max_pixels=640 * 960) == 600
        assert tokens(image, max_pixels=640 * 960, image_tokens=4) == 600
        assert tokens(image, min_pixels=10**6, max_pixels=10**7) > 900
        assert tokens(image._replace(settings={"max_pixels": 10**5})) < 100
        with pytest.raises(UsageError, match="image_tokens must be a whole number"):
            VisualSettings(image_tokens=0)

    def test_a_chat_never_takes_thousands_of_tokens_by_surprise(self, demo: Model) -> None:
        chat = demo.chat()
        assert chat.visual_settings.image_tokens == 1024
        for size in ((3000, 4000), (4000, 3000), (1080, 1920), (9000, 9000), (300, 9000)):
            height, width = edgeq.vision.image_size(*size, image_tokens=chat.visual_settings.image_tokens)
            assert 800 * 32 * 32 <= height * width <= 1024 * 32 * 32

    def test_what_cannot_be_opened_changes_nothing(self, demo: Model, tmp_path: Path) -> None:
        (tmp_path / "broken.png").write_bytes(PICTURE.read_bytes()[:200])
        (tmp_path / "text.png").write_text("hello")
        chat = greedy(demo)
        for wrong in (
            tmp_path / "broken.png",
            tmp_path / "text.png",
            tmp_path / "missing.png",
            b"",
            5,
            "http://x/y.png",
        ):
            with pytest.raises(EdgeqError) as caught:
                chat.send("What is this?", images=[wrong])
            assert "\n" not in caught.value.message
        assert not chat.ids
        assert not chat.visuals

    def test_prompts_have_the_checkpoints_own_limits(self, demo: Model) -> None:
        prompt = demo.prompt([{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"text": WHERE}]}])
        (kind, pixels, grid), chat = prompt.visuals[0], demo.chat(thinking=False)
        chat.send(WHERE, images=[PICTURE])
        assert (kind, pixels.shape, grid) == ("image", (36, 1536), (1, 6, 6))
        assert prompt.ids == list(chat.ids)
        expected, expected_grid = edgeq.vision.preprocess(PICTURE, demo.config)
        assert np.array_equal(pixels, expected)
        assert grid == expected_grid


class TestCommandLine:
    def test_one_answer_and_what_it_costs(self, run: Run, tmp_path: Path) -> None:
        result = run("chat", "demo", "--image", "demo", "-p", COUNT, *GREEDY)
        assert result.code == 0
        assert result.out == f"{ANSWER}\n"
        cost, *_ = result.err.splitlines()
        assert re.fullmatch(r"picture\.png 384 x 384 -> 9 tokens, less than 1 s", cost)
        shown = run("chat", "demo", "--image", PICTURE, "-p", COUNT, *GREEDY)
        assert shown.out == result.out

    def test_several_pictures_and_json(self, run: Run, tmp_path: Path) -> None:
        for colour in ("red", "blue"):
            square(colour).save(tmp_path / f"{colour}.png")
        names = (tmp_path / "red.png", tmp_path / "blue.png")
        result = run("chat", "demo", "--image", names[0], "--image", names[1], "-p", "What changed?", "--json", *GREEDY)
        assert json.loads(result.out)["text"] == "The square is now blue."
        assert [line.split()[0] for line in result.err.splitlines()] == ["red.png", "blue.png"]

    def test_from_stdin(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        class Piped(io.StringIO):
            buffer = io.BytesIO(PICTURE.read_bytes())

        plain = run("chat", "demo", "--image", "demo", "-p", COUNT, *GREEDY)
        monkeypatch.setattr(sys, "stdin", Piped())
        piped = run("chat", "demo", "--image", "-", "-p", COUNT, *GREEDY, stdin=None)
        assert piped.out == plain.out

    def test_generate_takes_them_too(self, run: Run) -> None:
        assert run("generate", "demo", "--image", "demo", "-p", " Look:", "-n", "4", "--backend", "numpy").code == 0

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--image", "missing.png"], 4, "missing.png"),
            (["--image", "https://example.com/a.png"], 2, "https://example.com/a.png"),
            (["--image", "demo", "--image-tokens", "0"], 2, "image-tokens"),
            (["--image", "demo", "--fps", "0"], 2, "fps must be from 1e-06 to 1000"),
            (
                ["--image", "demo", "--min-pixels", "100000"],
                2,
                "min_pixels is 100000, expected at most the maximum of 9216",
            ),
            (["--image", "demo", "--draw-boxes", "out.txt"], 2, "out.txt does not end in .png"),
            (["--draw-boxes", "out.png"], 2, "--draw-boxes draws on one image, got 0"),
            (["--image", "demo", "--draw-boxes", "out.png"], 1, "has no boxes or points that can be drawn: out.png"),
        ],
    )
    def test_what_is_refused(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = run("chat", "demo", "-p", "x", *arguments, *GREEDY)
        assert (result.code, "Traceback" in result.err) == (code, False)
        assert message in result.err
        assert not (tmp_path / "out.png").exists()

    def test_boxes_are_drawn(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = '[{"bbox_2d": [100, 100, 400, 400], "label": "circle"}, {"bbox_2d": [1, 2, 3]}]'
        monkeypatch.setattr(
            "edgeq.session.reply.Reply.text", property(lambda _: answer, lambda *_: None), raising=False
        )
        out = tmp_path / "out.png"
        result = run("chat", "demo", "--image", "demo", "--draw-boxes", out, "-p", "x", *GREEDY)
        assert result.code == 0
        assert "warning: [[1, 2, 3]] is neither a box nor a point" in result.err
        assert "1 boxes and 0 points drawn" in result.err
        drawn = Image.open(out)
        assert drawn.size == (384, 384)
        assert drawn.getpixel((38, 100)) == (0xE6, 0x19, 0x4B)

    def test_info(self, run: Run) -> None:
        facts = json.loads(run("info", "demo", "--json").out)
        assert facts["vision tower"] == "yes"
        assert re.fullmatch(r"0\.\d M parameters in \d\.\d MB, most of them BF16", facts["sees with"])
        assert facts["tokens of a photo"] == "6 of 4000 x 3000 pixels, 6 in a chat"


class TestAtThePrompt:
    @pytest.fixture
    def keyboard(self) -> Iterator[PipeInput]:
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            yield keyboard

    def talk(
        self, demo: Model, keyboard: PipeInput, capsys: pytest.CaptureFixture[str], *lines: str, attached: Any = ()
    ) -> tuple[str, str]:
        chat = greedy(demo)
        keyboard.send_text("".join(f"{line}\r" for line in (*lines, "/exit")))
        Repl(chat, "demo", attached=chat.open("", images=attached)).run()
        captured = capsys.readouterr()
        return captured.out, captured.err

    def test_slash_image(self, demo: Model, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
        out, err = self.talk(demo, keyboard, capsys, f"/image {PICTURE}", COUNT, WHERE, "/regen")
        assert out.count(ANSWER) == 1
        assert out.count("red circle") == 2
        assert err.count("picture.png 384 x 384 -> 9 tokens") == 1

    def test_attached_from_the_start_and_taken_back(
        self, demo: Model, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, _ = self.talk(demo, keyboard, capsys, COUNT, attached=[PICTURE])
        assert ANSWER in out
        out, err = self.talk(demo, keyboard, capsys, "/image", "/stats", attached=[PICTURE])
        assert "no picture is attached" in err

    @pytest.mark.parametrize("line", [f"'{PICTURE}' {COUNT}", f"{COUNT} {PICTURE}"])
    def test_a_dropped_path_is_offered(
        self, demo: Model, keyboard: PipeInput, capsys: pytest.CaptureFixture[str], line: str
    ) -> None:
        out, err = self.talk(demo, keyboard, capsys, line, "")
        assert ANSWER in out
        assert "picture.png 384 x 384 -> 9 tokens" in err
        out, err = self.talk(demo, keyboard, capsys, line, "n")
        assert "-> 9 tokens" not in err
        out, err = self.talk(demo, keyboard, capsys, str(PICTURE), "y", COUNT)
        assert ANSWER in out

    def test_what_cannot_be_opened_does_not_end_the_conversation(
        self, demo: Model, keyboard: PipeInput, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "a.png").write_text("no picture")
        out, err = self.talk(demo, keyboard, capsys, f"/image {tmp_path / 'a.png'}", "/video nothing.mp4", "hello")
        assert err.count("error: ") == 2
        assert out.strip()


def test_what_edgeq_vision_reads_can_be_sent() -> None:
    """There is one kind of picture, whoever reads it."""
    model, file = edgeq.load("demo", backend="numpy"), DEMO / "picture.png"
    read = edgeq.vision.read_image(file, model.config, image_tokens=1024)
    assert isinstance(read, edgeq.Visual)
    said = [
        model.prompt([{"role": "user", "content": [{"type": "image", "image": what}, {"type": "text", "text": "?"}]}])
        for what in (read, file)
    ]
    assert said[0].ids == said[1].ids
    assert said[0].visuals[0].digest == said[1].visuals[0].digest
