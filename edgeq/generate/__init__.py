"""Generation: sampling, stop rules, the loop guard and the decode loop. Knows token ids, neither models nor text."""

from edgeq.generate.constraint import Constraint
from edgeq.generate.decode import THINKING_CUT, Decoding, Finish, ThinkTokens, Token
from edgeq.generate.logprobs import Logprobs
from edgeq.generate.loop_guard import LoopGuard
from edgeq.generate.sampling import Sampler
from edgeq.generate.settings import GenerationSettings, preset
from edgeq.generate.speculate import DRAFT_HINT, MOST_DRAFTS, Tally, check_draft, look_up
from edgeq.generate.stop import StopReason, StopStrings

__all__ = [
    "DRAFT_HINT",
    "MOST_DRAFTS",
    "THINKING_CUT",
    "Constraint",
    "Decoding",
    "Finish",
    "GenerationSettings",
    "Logprobs",
    "LoopGuard",
    "Sampler",
    "StopReason",
    "StopStrings",
    "Tally",
    "ThinkTokens",
    "Token",
    "check_draft",
    "look_up",
    "preset",
]
