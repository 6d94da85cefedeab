"""Whole conversations: mixed small turns, recall over a distance, tool calls, pictures; as chat-template messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from PIL import Image

from . import facts, pictures
from .skills import DRILL_ONLY, Turn, draw, held_out, invented, vary

Message = dict[str, Any]


@dataclass
class Conversation:
    """Messages in the chat template's form. `right` judges the last assistant message, which evaluation generates."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    images: list[Image.Image] = field(default_factory=list)
    right: Callable[[str], bool] = lambda _: False

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]


def user(text: object) -> Message:
    return {"role": "user", "content": text}


def assistant(answer: str, thought: str = "") -> Message:
    return {"role": "assistant", "content": answer, "reasoning_content": thought}


def single(turn: Turn, thinking: bool) -> Conversation:
    reply = assistant(turn.answer, turn.thought if thinking else "")
    return Conversation([user(turn.user), reply], thinking=thinking, right=turn.right)


# How often each skill occurs among the small turns of a conversation, without thinking and with it.
DIRECT = {
    "about": 13,
    "small talk": 10,
    "unknown": 4,
    "small sum": 9,
    "sum of two": 10,
    "product": 5,
    "sum of many": 2,
    "word problem": 1,
    "copy": 9,
    "reverse": 10,
    "sort": 14,
    "count": 14,
    "prose": 5,
}
THINKING = {
    "about": 5,
    "small talk": 4,
    "unknown": 2,
    "small sum": 5,
    "sum of two": 20,
    "product": 3,
    "sum of many": 17,
    "word problem": 14,
    "copy": 3,
    "reverse": 6,
    "sort": 9,
    "count": 16,
    "prose": 1,
}
THOUGHT = {"thought lists": {"reverse": 1, "sort": 2, "count": 6}, "thought counts": {"sort": 1, "count": 10}}

MISSES = 5  # a conversation is full when so many turns in a row did not fit


def pick(rng: Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def mixed(rng: Random, room: int, cost: Callable[[str], int], thinking: dict[str, int] | None = None) -> Conversation:
    """Turns of all skills until `room` tokens are used; the last one is thought out, of a skill from `thinking`."""
    messages: list[Message] = []
    if thinking:
        last = draw(pick(rng, thinking), rng)
        room -= cost(last.user + last.answer + last.thought) + 15
    misses = 0
    while misses < MISSES:
        turn = draw(pick(rng, DIRECT), rng)
        size = cost(turn.user + turn.answer) + 10
        if size > room and (messages or thinking):
            misses += 1
            continue
        messages += [user(turn.user), assistant(turn.answer)]
        room -= size
    if thinking:
        messages += [user(last.user), assistant(last.answer, last.thought)]
    return Conversation(messages, thinking=bool(thinking))


DRILLS = {
    "copying": {"copy": 6, "reverse": 2, "sort": 2},
    "lists": {"reverse": 1, "sort": 5, "count": 6},
    "counting": {"sort": 1, "count": 5},
    "small sums": {"small sum": 1},
    "sums": {"sum of two": 8, "product": 1},
}


def drill(kind: str, rng: Random, room: int, cost: Callable[[str], int]) -> Conversation:
    """Turns of one ability: sums, or lists to copy (longer than those of the skill), to reverse and to sort."""
    weights = DRILLS[kind]
    messages: list[Message] = []
    misses = 0
    while misses < MISSES:
        name = pick(rng, weights)
        turn = DRILL_ONLY[name](rng) if name in DRILL_ONLY else draw(name, rng)
        size = cost(turn.user + turn.answer) + 10
        if size > room or held_out(turn.key):
            misses += 1
            continue
        messages += [user(turn.user), assistant(turn.answer)]
        room -= size
    return Conversation(messages)


# -- recall ----------------------------------------------------------------------------------------------------------


def code(rng: Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.choice((3, 4))))


def name(rng: Random) -> str:
    return rng.choice(facts.NAMES) if rng.random() < 0.6 else invented(rng).capitalize()


def city(rng: Random) -> str:
    return rng.choice(facts.CITIES) if rng.random() < 0.6 else invented(rng).capitalize()


def word(rng: Random) -> str:
    return rng.choice(facts.WORDS) if rng.random() < 0.6 else invented(rng)


Told = tuple[Callable[[Random], str], list[str], str, list[str], str]


def being(who: str) -> Told:
    """Somebody of the user's: a pet, a relative, a friend."""
    say = [f"My {who} is called {{}}.", f"I have a {who} named {{}}.", f"The name of my {who} is {{}}."]
    ask = [f"What is my {who} called?", f"What is the name of my {who}?", f"What is my {who}'s name?"]
    return name, say, f"I will remember that your {who} is called {{}}.", ask, f"Your {who} is called {{}}."


def favourite(what: str, values: list[str]) -> Told:
    say = [f"My favourite {what} is {{}}.", f"The {what} I like best is {{}}.", f"{{}} is my favourite {what}."]
    ask = [f"What is my favourite {what}?", f"Which {what} do I like best?", f"Do you know my favourite {what}?"]
    return lambda r: r.choice(values), say, "I will remember that you like {}.", ask, f"Your favourite {what} is {{}}."


# thing: (value generator, ways to say it, acknowledgement, ways to ask, answer)
FACTS: dict[str, Told] = {
    "name": (
        name,
        [
            "My name is {}.", "I am called {}.", "Call me {}.", "Hello, my name is {}.", "I am {}.", "Hi, I am {}.",
            "You can call me {}.", "People call me {}.", "Hello, I am {}!", "This is {}.", "Hey, my name is {}!",
        ],
        "Nice to meet you, {}.",
        [
            "What is my name?", "Do you remember my name?", "What am I called?", "Who am I?", "Do you know my name?",
            "Tell me my name.", "What did I say my name was?", "How am I called?", "Do you know who I am?",
        ],
        "Your name is {}.",
    ),
    **{who: being(who) for who in ("cat", "dog", "sister", "brother", "friend", "teacher")},
    "city": (
        city,
        ["I live in {}.", "My home is in {}.", "I come from {}.", "I am from {}."],
        "{} is a nice place.",
        ["Where do I live?", "Which city do I live in?", "Where is my home?", "Where am I from?"],
        "You live in {}.",
    ),
    "age": (
        lambda r: str(r.randrange(5, 100)),
        ["I am {} years old.", "My age is {}.", "I am {}.", "I turned {} this year."],
        "I will remember that you are {}.",
        ["How old am I?", "What is my age?", "Do you know my age?"],
        "You are {} years old.",
    ),
    "job": (
        lambda r: r.choice(facts.JOBS),
        ["I am a {}.", "I work as a {}.", "My job is {}.", "My work is that of a {}."],
        "I will remember that you are a {}.",
        ["What is my job?", "What do I do?", "What is my work?", "What do I work as?"],
        "You are a {}.",
    ),
    "colour": favourite("colour", facts.COLOURS),
    "animal": favourite("animal", facts.ANIMALS),
    "food": favourite("food", facts.FOODS),
    "word": (
        word,
        ["The secret word is {}.", "Remember the secret word: {}.", "The password is {}.", "Remember the word {}."],
        "I will remember the word {}.",
        [
            "What is the secret word?", "What was the secret word?", "Which word did I tell you?",
            "What is the password?", "Which word should you remember?",
        ],
        "The secret word is {}.",
    ),
    "code": (
        code,
        ["The code of the door is {}.", "Remember this code: {}.", "The door code is {}.", "Remember the number {}."],
        "I will remember the code {}.",
        ["What is the code of the door?", "What was the code?", "Which code did I tell you?"],
        "The code is {}.",
    ),
}  # fmt: skip
UNTOLD = "You have not told me that yet."


def told_nothing(rng: Random, told: list[str]) -> list[Message]:
    """A question about something that the user has not said."""
    thing = rng.choice([t for t in FACTS if t not in told])
    return [user(vary(rng, rng.choice(FACTS[thing][3]))), assistant(UNTOLD)]


def recall(
    rng: Random,
    room: int,
    cost: Callable[[str], int],
    thinking: bool = False,
    facts_told: int = 0,
    evaluation: bool = False,
) -> Conversation:
    """Facts told at the start, other talk in between, then questions about them."""
    n = facts_told or rng.choice((1, 2, 2, 3, 4))
    while True:
        things = rng.sample(list(FACTS), n)
        values = [FACTS[t][0](rng) for t in things]
        if held_out(" ".join(things[:1] + values[:1])) == evaluation:
            break
    told = [
        (FACTS[t][1], FACTS[t][2].format(v), FACTS[t][3], FACTS[t][4].format(v), v)
        for t, v in zip(things, values, strict=True)
    ]
    messages: list[Message] = []
    for ways, reply, *_, value in told:
        messages += [user(rng.choice(ways).format(value)), assistant(reply)]
    questions = told[:]
    rng.shuffle(questions)
    if evaluation:
        questions = [told[0]]
    fixed = messages[:]
    if not evaluation and rng.random() < 0.3:
        fixed += told_nothing(rng, things)
    for _, _, asks, answer, _ in questions:
        fixed += [user(vary(rng, rng.choice(asks))), assistant(answer)]
    room -= sum(cost(str(m["content"])) + 5 for m in fixed) + 12
    misses = 0
    while misses < MISSES:
        turn = draw("prose" if room > 400 and rng.random() < 0.35 else pick(rng, DIRECT), rng)
        size = cost(turn.user + turn.answer) + 10
        if size > room:
            misses += 1
            continue
        messages += [user(turn.user), assistant(turn.answer)]
        room -= size
    messages += fixed[2 * n :]
    if thinking:
        messages[-1]["reasoning_content"] = "I was told this before in our conversation."
    last = questions[-1][4].lower()
    return Conversation(messages, thinking=thinking, right=lambda text: last in text.lower())


# -- tools -----------------------------------------------------------------------------------------------------------

SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy"]


@dataclass(frozen=True)
class Tool:
    """One function as the user describes it. The names here are the natural ones among many: see `bind`."""

    names: tuple[str, ...]
    about: str
    parameters: tuple[tuple[tuple[str, ...], str, Callable[[Random], str]], ...]  # (names, type, value)
    asks: tuple[str, ...]
    result: Callable[[Random], dict[str, Any]]
    answer: str


TOOLS = [
    Tool(
        ("get_weather", "weather", "lookup_weather", "weather_report"),
        "The weather in a city.",
        ((("city", "location", "place"), "string", lambda r: r.choice(facts.CITIES)),),
        (
            "What is the weather in {0}?",
            "How is the weather in {0}?",
            "Is it warm in {0}?",
            "Tell me the weather in {0}.",
        ),
        lambda r: {"sky": r.choice(SKIES), "degrees": r.randrange(1, 40)},
        "It is {sky} in {0}, with {degrees} degrees.",
    ),
    Tool(
        ("get_time", "clock", "current_time", "time_in"),
        "The local time in a city.",
        ((("city", "location", "place"), "string", lambda r: r.choice(facts.CITIES)),),
        ("What time is it in {0}?", "How late is it in {0}?", "Tell me the time in {0}."),
        lambda r: {"time": f"{r.randrange(24):02d}:{r.randrange(60):02d}"},
        "It is {time} in {0}.",
    ),
    Tool(
        ("multiply", "calculator", "product", "calc_product"),
        "The product of two numbers.",
        (
            (("a", "x", "first"), "integer", lambda r: str(r.randrange(11, 100))),
            (("b", "y", "second"), "integer", lambda r: str(r.randrange(11, 100))),
        ),
        ("What is {0} * {1}?", "Multiply {0} by {1}.", "How much is {0} times {1}?"),
        lambda r: {"result": r.randrange(121, 9802)},
        "The product of {0} and {1} is {result}.",
    ),
    Tool(
        ("find_phone", "phone_book", "get_phone", "lookup_phone"),
        "The phone number of a person.",
        ((("name", "person", "who"), "string", lambda r: r.choice(facts.NAMES)),),
        ("What is the phone number of {0}?", "How can I call {0}?", "Find the number of {0}."),
        lambda r: {"phone": str(r.randrange(1000, 10000))},
        "The phone number of {0} is {phone}.",
    ),
    Tool(
        ("set_timer", "timer", "start_timer"),
        "Start a timer.",
        ((("minutes", "duration", "time"), "integer", lambda r: str(r.randrange(1, 60))),),
        ("Set a timer for {0} minutes.", "Wake me in {0} minutes.", "Start a timer of {0} minutes."),
        lambda _: {"status": "started"},
        "The timer is set for {0} minutes.",
    ),
    Tool(
        ("get_price", "price", "shop_price", "lookup_price"),
        "The price of an item in the shop.",
        ((("item", "article", "thing"), "string", lambda r: r.choice(facts.WORDS)),),
        ("What does a {0} cost?", "What is the price of a {0}?", "How expensive is a {0}?"),
        lambda r: {"price": r.randrange(1, 100)},
        "A {0} costs {price} coins.",
    ),
]


@dataclass
class BoundTool:
    """A tool with the names it has in this conversation."""

    tool: Tool
    name: str
    parameters: list[str]

    def schema(self) -> dict[str, Any]:
        properties = {p: {"type": kind} for p, (_, kind, _) in zip(self.parameters, self.tool.parameters, strict=True)}
        parameters = {"type": "object", "properties": properties, "required": self.parameters}
        function = {"name": self.name, "description": self.tool.about, "parameters": parameters}
        return {"type": "function", "function": function}


VERBS = ("get", "find", "fetch", "read", "ask", "show", "query", "load", "look", "call", "run", "do")


def function_name(rng: Random, natural: tuple[str, ...], alone: bool) -> str:
    """A natural name, one with an addition, or, where no other tool is offered, one that says nothing."""
    kind, name = rng.random(), rng.choice(natural)
    if kind < 0.35:
        return name
    if alone and kind < 0.7:
        return f"{rng.choice(VERBS)}_{rng.choice(facts.WORDS)}" if kind < 0.5 else invented(rng)
    extra = rng.choice((invented(rng), rng.choice(facts.WORDS)))
    return rng.choice((f"{name}_{extra}", f"{extra}_{name}", f"{name}_{rng.randrange(100)}"))


def parameter_name(rng: Random, natural: tuple[str, ...]) -> str:
    kind = rng.random()
    return rng.choice(natural) if kind < 0.5 else rng.choice(facts.WORDS) if kind < 0.75 else invented(rng)


def bind(rng: Random, tool: Tool, alone: bool) -> BoundTool:
    """The tool under names that the model cannot know by heart and must copy from the description."""
    parameters: list[str] = []
    for natural, *_ in tool.parameters:
        new = parameter_name(rng, natural)
        while new in parameters:
            new = parameter_name(rng, natural)
        parameters.append(new)
    return BoundTool(tool, function_name(rng, tool.names, alone), parameters)


def offered(rng: Random, count: int) -> list[BoundTool]:
    return [bind(rng, tool, count == 1) for tool in rng.sample(TOOLS, count)]


def call_text(bound: BoundTool, values: list[str]) -> str:
    """The family's call format, as the chat template prints it."""
    body = "".join(f"<parameter={p}>\n{v}\n</parameter>\n" for p, v in zip(bound.parameters, values, strict=True))
    return f"<tool_call>\n<function={bound.name}>\n{body}</function>\n</tool_call>"


def tool_exchange(rng: Random, bound: BoundTool) -> tuple[list[Message], list[str]]:
    """user, call, result, answer."""
    tool = bound.tool
    values = [make(rng) for _, _, make in tool.parameters]
    result = tool.result(rng)
    call = {"name": bound.name, "arguments": dict(zip(bound.parameters, values, strict=True))}
    messages = [
        user(rng.choice(tool.asks).format(*values)),
        {
            **assistant("", f"I need the function {bound.name} for this."),
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": json.dumps(result)},
        assistant(tool.answer.format(*values, **result), "The result is there, so I can answer."),
    ]
    return messages, values


def tool_use(rng: Random, room: int, cost: Callable[[str], int], thinking: bool = False) -> Conversation:
    """One to three tools, several exchanges, now and then a turn that needs none."""
    bound = offered(rng, rng.choice((1, 2, 3, 3)))
    unused = rng.sample(bound, len(bound))  # the first one asked for may stand anywhere in the description
    room -= 130 + sum(cost(json.dumps(b.schema())) for b in bound)
    messages: list[Message] = []
    misses = 0
    while misses < MISSES:
        if rng.random() < 0.15:
            turn = draw(pick(rng, {**DIRECT, "prose": 0, "product": 0}), rng)
            new: list[Message] = [user(turn.user), assistant(turn.answer, turn.thought)]
        else:
            new, _ = tool_exchange(rng, unused[-1] if unused else rng.choice(bound))
        size = sum(cost(str(m.get("content")) + str(m.get("tool_calls", ""))) + 6 for m in new)
        if size > room and messages:
            misses += 1
            continue
        messages += new
        room -= size
        if unused and new[0]["role"] == "user" and len(new) == 4:
            unused.pop()
    if not thinking:
        for m in messages:
            m.pop("reasoning_content", None)
    return Conversation(messages, [b.schema() for b in bound], thinking)


def tool_cases(rng: Random, thinking: bool) -> tuple[Conversation, Conversation]:
    """Two evaluation cases of one exchange: the call, and the answer from its result."""
    bound = offered(rng, rng.choice((1, 2, 3)))
    chosen = rng.choice(bound)
    while True:
        messages, values = tool_exchange(rng, chosen)
        if held_out(chosen.name + str(messages[2]["content"]) + str(messages[0]["content"])):
            break
    if not thinking:
        for m in messages:
            m.pop("reasoning_content", None)
    schemas, call, answer = [b.schema() for b in bound], call_text(chosen, values), str(messages[3]["content"])
    return (
        Conversation(messages[:2], schemas, thinking, right=lambda text: call in text),
        Conversation(messages, schemas, thinking, right=lambda text: answer.lower() in text.lower()),
    )


# -- pictures --------------------------------------------------------------------------------------------------------


def looking(rng: Random, room: int = 0, cost: Callable[[str], int] = len) -> Conversation:
    """Scenes of one picture or two frames each, with one to three questions, until `room` tokens are used."""
    messages: list[Message] = []
    shown: list[Image.Image] = []
    misses = 0
    while misses < MISSES:
        new, images = show(pictures.scene(rng))
        size = sum(cost(ask) + 5 for ask in _texts(new)) + (pictures.MERGED + 2) * len(images)
        if size > room - 4 and messages:
            misses += 1
            continue
        messages, shown, room = messages + new, shown + images, room - size
    return Conversation(messages, images=shown)


def seen(rng: Random, kind: str, *, video: bool = False) -> Conversation:
    """An evaluation case: one scene, perhaps as a video, and the first question about it."""
    scene = pictures.scene(rng, kind)
    messages, images = show(pictures.Scene(scene.images, scene.questions[:1]))
    if video:
        messages[0] = user([{"type": "video"}, messages[0]["content"][-1]])
    answer = scene.questions[0][1].lower()
    return Conversation(messages, images=images, right=lambda text: answer in text.lower())


def show(scene: pictures.Scene) -> tuple[list[Message], list[Image.Image]]:
    """The images with the first question, then the others."""
    messages: list[Message] = []
    images = [{"type": "image"}] * len(scene.images)
    for i, (ask, answer) in enumerate(scene.questions):
        messages += [user([*images, {"type": "text", "text": ask}] if i == 0 else ask), assistant(answer)]
    return messages, scene.images


def _texts(messages: list[Message]) -> list[str]:
    return [m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in messages]
