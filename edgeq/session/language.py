"""A model's text beside its tokenizer: the template, the ids that end a text, thinking, recommended settings."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgeq.checkpoint import Checkpoint
from edgeq.engine import Engine
from edgeq.errors import ModelError
from edgeq.generate import THINKING_CUT, GenerationSettings, Sampler, ThinkTokens, check_draft, preset
from edgeq.memory.budget import Budget
from edgeq.session.cuts import Messages, no_messages
from edgeq.session.speculation import Speculation
from edgeq.text.messages import protected_kwargs
from edgeq.text.template_files import ANOTHER_TEMPLATE, DEFAULT
from edgeq.text.visuals import Spelling

if TYPE_CHECKING:
    from edgeq.text.grammar import Grammars, Matcher
    from edgeq.text.template import ChatTemplate
    from edgeq.text.tokenizer import Tokenizer
    from edgeq.text.tool_calls import ToolCallParser, ToolForm

__all__ = ["Language"]

GRAMMAR_NBYTES = 256
"""Bytes that the first grammar takes for each token of the vocabulary."""


class Language:
    """The text side of a checkpoint. `tokenizer` is None for one without; token ids still work.

    Every token that ends a text is in one set, `eos_ids`, which the tokenizer has, too: those of config.json, of
    generation_config.json and of the tokenizer, the family's, and what the chat template ends a turn with.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.budget: Budget | None = None
        """Asked before tables are built, if there is one."""
        self.vocab_size = checkpoint.config.text.vocab_size
        self._warned = set[str]()
        tokenizer, known = checkpoint.tokenizer(), checkpoint.eos_token_ids
        if tokenizer is not None and tokenizer.vocab_size > self.vocab_size:
            raise ModelError(
                f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {self.vocab_size}",
                hint="the tokenizer files belong to another model; copy those of this one",
            )
        known = tuple(i for i in known if i < self.vocab_size)
        if tokenizer is not None:
            tokenizer = tokenizer.ending_with((*known, *_turn_ends(checkpoint, tokenizer)))
        self.tokenizer: Tokenizer | None = tokenizer
        self.eos_ids = frozenset(tokenizer.eos_token_ids if tokenizer else known)

    @property
    def tokens(self) -> int:
        """Tokens that exist; the rows of the embedding behind them are padding."""
        return min(self.tokenizer.vocab_size, self.vocab_size) if self.tokenizer else self.vocab_size

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template; read when it is first wanted, because its library takes 25 ms and 8 MB."""
        return self.checkpoint.template(self.tokenizer)

    @cached_property
    def _template_with_tools(self) -> ChatTemplate | None:
        templates = self.checkpoint.templates
        if templates.pick(tools=True) is templates.found.get(DEFAULT):
            return self.template
        return self.checkpoint.template(self.tokenizer, tools=True)

    @cached_property
    def spelling(self) -> Spelling | None:
        """How places of pictures are written; None for a model that does not see."""
        c = self.checkpoint.config
        ids = (c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id)
        return Spelling.of(self.tokenizer, ids) if self.tokenizer else None

    def spelled(self, token: int) -> str:
        """The text of a token; empty without a tokenizer."""
        return self.tokenizer.token_bytes(token).decode(errors="replace") if self.tokenizer else ""

    @cached_property
    def messages(self) -> Messages:
        """How messages show among ids, as the family's templates write them."""
        begin = self.tokenizer.token_id("<|im_start|>") if self.tokenizer else None
        return no_messages if begin is None else Messages(begin, tuple(self.need_tokenizer().encode("user")))

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a ModelError that says what is missing."""
        if self.tokenizer is None:
            raise ModelError(
                f"{self.checkpoint.path} has no tokenizer.json, so it cannot process text",
                hint="copy the tokenizer files of the original checkpoint into it, or give token ids",
            )
        return self.tokenizer

    def need_template(self, *, tools: bool = False, kwargs: Mapping[str, Any] | None = None) -> ChatTemplate:
        """The chat template for conversations with or without tools, or a ModelError that says what to do without one.

        kwargs: variables for it, which are text as a user's is where they spell special tokens.
        """
        template = self._template_with_tools if tools else self.template
        if template is None:
            raise ModelError(f"{self.checkpoint.path} has no chat template", hint=ANOTHER_TEMPLATE)
        return template.bound(protected_kwargs(kwargs, self.need_tokenizer())) if kwargs else template

    def sampler(self, settings: GenerationSettings, *, drawn: int = 0) -> Sampler:
        """A sampler over the tokens that exist; the vocabulary's padding rows are never drawn. drawn: see Sampler."""
        return Sampler(settings, vocab_size=self.tokens, drawn=drawn)

    def constraint(self, settings: GenerationSettings, begun: str = "") -> Matcher | None:
        """What the answer is to fit, if anything, behind what it has `begun` with; UsageError for what cannot be."""
        return None if settings.shape is None else self._grammars.matcher(settings.shape, begun)

    @cached_property
    def _grammars(self) -> Grammars:
        """The vocabulary as grammars need it: 0.6 s and 60 MB for the family's, spent where one is asked for."""
        from edgeq.text.grammar import Grammars

        if self.budget is not None:
            self.budget.claim(GRAMMAR_NBYTES * self.tokens, "the tables of a grammar")
        return Grammars(self.need_tokenizer(), tokens=self.tokens, eos_ids=self.eos_ids)

    def tool_calls(self, tools: Sequence[Mapping[str, Any]] | None, prefix: str) -> ToolCallParser | None:
        """What takes the calls out of an answer where `tools` were offered, with ids that begin with `prefix`."""
        from edgeq.text.tool_calls import ToolCallParser

        return ToolCallParser(self._tool_form, tools, prefix) if tools else None

    @cached_property
    def _tool_form(self) -> ToolForm:
        from edgeq.text.tool_calls import tool_form

        return tool_form(self.need_template(tools=True))

    def speculation(self, engine: Engine[Any, Any], draft: str | int) -> Speculation | None:
        """Drafts for a new sequence; None for "off"."""
        draft = check_draft(draft)
        if draft == "off":
            return None
        control = self.tokenizer.control_ids if self.tokenizer else ()
        return Speculation(engine, draft, tokens=self.tokens, always={*self.eos_ids, *control})

    def think_tokens(self) -> ThinkTokens | None:
        """The ids around a thinking block and of its forced end, if the tokenizer has thinking."""
        tokenizer = self.need_tokenizer()
        opened, closed = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        if opened is None or closed is None:
            return None
        return ThinkTokens(opened, closed, tuple(tokenizer.encode(THINKING_CUT)), tuple(tokenizer.encode("\n\n")))

    def recommended(self, *, thinking: bool, vision: bool = False, chosen: Collection[str] = ()) -> GenerationSettings:
        """What is recommended for chats, with or without pictures in them: by the model card of its size, and over that
        by the checkpoint itself (its generation_config.json).

        chosen: settings for which something else holds. What the file says of the others and cannot be is a warning,
        once.
        """
        own = self.checkpoint.recommended
        if wrong := [problem for name, problem in own.left_out.items() if name not in {*chosen, *self._warned}]:
            self._warned.update(own.left_out)
            warnings.warn(f"{own.where}: {'; '.join(wrong)}: left out", stacklevel=2)
        large = len(self.checkpoint.config.text.layer_types) > _LAYERS_OF_2B
        return preset(thinking, vision, large=large).replace(**own.values)


_LAYERS_OF_2B = 24  # and of the 0.8B; the 4B, whose card recommends otherwise, has 32


def _turn_ends(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[int]:
    """What the chat template ends a turn with, if it is an added token: none where the tokenizer knows it.

    A template that writes the family's turns and no tokens but the family's is not rendered for it: that would cost
    those who want no conversation the template library's 25 ms and 8 MB. What is wrong with a template is told when it
    is wanted.
    """
    try:
        named = checkpoint.templates.pick()
        if named is None or ("<|im_end|>" in named.source and not tokenizer.strange_tokens(named.source)):
            return []
        template = checkpoint.template(tokenizer)
        close = tokenizer.encode(template.reply_close, control=True) if template else []
    except ModelError:
        return []
    return [i for i in close[:1] if tokenizer.is_added(i)]
