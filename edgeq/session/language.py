"""A model's text beside its tokenizer: the template, the ids that end a text, thinking, recommended settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgeq.checkpoint import Checkpoint
from edgeq.engine import Engine
from edgeq.errors import ModelError
from edgeq.generate import THINKING_CUT, GenerationSettings, Sampler, ThinkTokens, check_draft, preset
from edgeq.session.speculation import Speculation
from edgeq.text.visuals import Spelling

if TYPE_CHECKING:
    from edgeq.text.grammar import Grammars, Matcher
    from edgeq.text.template import ChatTemplate
    from edgeq.text.tokenizer import Tokenizer
    from edgeq.text.tool_calls import ToolCallParser, ToolForm

__all__ = ["Language"]


class Language:
    """The text side of a checkpoint. `tokenizer` is None for one without; token ids still work."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.vocab_size = checkpoint.config.text.vocab_size
        self.tokenizer: Tokenizer | None = checkpoint.tokenizer()
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.vocab_size:
            raise ModelError(
                f"{checkpoint.path}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.vocab_size}",
                hint="the tokenizer files belong to another model; copy those of this one",
            )

    @property
    def tokens(self) -> int:
        """Tokens that exist; the rows of the embedding behind them are padding."""
        return min(self.tokenizer.vocab_size, self.vocab_size) if self.tokenizer else self.vocab_size

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template; read when it is first wanted, because its library takes 25 ms and 8 MB."""
        return self.checkpoint.template()

    @cached_property
    def spelling(self) -> Spelling | None:
        """How places of pictures are written; None for a model that does not see."""
        c = self.checkpoint.config
        ids = (c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id)
        return Spelling.of(self.tokenizer, ids) if self.tokenizer else None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a text: of the configuration files and the tokenizer together."""
        ids = self.checkpoint.eos_token_ids + (self.tokenizer.eos_token_ids if self.tokenizer else ())
        return frozenset(i for i in ids if i < self.vocab_size)

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a ModelError that says what is missing."""
        if self.tokenizer is None:
            raise ModelError(
                f"{self.checkpoint.path} has no tokenizer.json, so it cannot process text",
                hint="copy the tokenizer files of the original checkpoint into it, or give token ids",
            )
        return self.tokenizer

    def need_template(self) -> ChatTemplate:
        """The chat template, or a ModelError that says what to do without one."""
        if self.template is None:
            raise ModelError(
                f"{self.checkpoint.path} has no chat template",
                hint="`edgeq generate` continues plain text without one",
            )
        return self.template

    def sampler(self, settings: GenerationSettings) -> Sampler:
        """A sampler over the tokens that exist; the vocabulary's padding rows are never drawn."""
        return Sampler(settings, vocab_size=self.tokens)

    def constraint(self, settings: GenerationSettings) -> Matcher | None:
        """What the answer is to fit, if anything; UsageError for what cannot be done."""
        return None if settings.shape is None else self._grammars.matcher(settings.shape)

    @cached_property
    def _grammars(self) -> Grammars:
        """The vocabulary as grammars need it: 0.6 s and 60 MB for the family's, spent where one is asked for."""
        from edgeq.text.grammar import Grammars

        return Grammars(self.need_tokenizer(), tokens=self.tokens, eos_ids=self.eos_ids)

    def tool_calls(self, tools: Sequence[Mapping[str, Any]] | None, prefix: str) -> ToolCallParser | None:
        """What takes the calls out of an answer where `tools` were offered, with ids that begin with `prefix`."""
        from edgeq.text.tool_calls import ToolCallParser

        return ToolCallParser(self._tool_form, tools, prefix) if tools else None

    @cached_property
    def _tool_form(self) -> ToolForm:
        from edgeq.text.tool_calls import tool_form

        return tool_form(self.need_template())

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

    def recommended(self, *, thinking: bool, vision: bool = False) -> GenerationSettings:
        """What the checkpoint (its generation_config.json) or else the model card of its size recommends for chats,
        with or without pictures in them."""
        own = self.checkpoint.sampling
        if own:
            return GenerationSettings().replace(**own)
        return preset(thinking, vision, large=len(self.checkpoint.config.text.layer_types) > _LAYERS_OF_2B)


_LAYERS_OF_2B = 24  # and of the 0.8B; the 4B, whose card recommends otherwise, has 32
