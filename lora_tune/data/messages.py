"""Message and Conversation: what was said by whom, and the rules that make it trainable."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """`system`, `user` or `assistant`."""

    content: str
    """The words."""

    def as_dict(self) -> dict[str, str]:
        """The message as chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """One row: messages in order, and where the completion begins."""

    messages: tuple[Message, ...]
    """All turns, prompt first."""

    completion_start: int
    """Index of the first message of the completion; what stands before it is the prompt."""

    where: str
    """`file:line` of the row."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What stands before the completion."""
        return self.messages[: self.completion_start]

    @property
    def final_answer(self) -> str:
        """The words of the last assistant message."""
        return self.messages[-1].content

    def trained_messages(self, train_on: str) -> list[int]:
        """Return the indices of the assistant messages that are trained.

        Args:
            train_on: `assistant` for all of them, `completion` for those in the completion.
        """
        first = self.completion_start if train_on == "completion" else 0
        return [i for i, message in enumerate(self.messages) if i >= first and message.role == "assistant"]


def objection(messages: Sequence[Message]) -> str | None:
    """Return why these messages cannot be trained on, or None."""
    if not messages:
        return "there are no messages"
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            return f"message {number} has role {message.role!r}; known roles: {', '.join(ROLES)}"
        if not message.content.strip() and message.role != "system":
            return f"message {number} ({message.role}) is empty"
    return _order_objection([message.role for message in messages])


def _order_objection(roles: Sequence[str]) -> str | None:
    """A system message may come first; then user and assistant take turns, and the assistant speaks last."""
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return f"message {len(roles) - len(turns) + turns.index('system') + 1} is a system message; only the first may be one"
    if not turns or turns[0] != "user":
        return "the first turn must be the user's"
    for number, (before, after) in enumerate(pairwise(turns), start=2):
        if before == after:
            return f"turn {number} is a second {after} turn in a row"
    return (
        None if turns[-1] == "assistant" else "the last message must be the assistant's: there is no answer to train on"
    )
