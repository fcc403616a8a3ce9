"""What a person types on a terminal: lines with editing, completion and earlier questions; one letter of a choice.

prompt_toolkit reads both: it hears Ctrl-C at any moment, where Python's `input` can lose one that comes as it begins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from ldrt_edge.console import say

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer

COMMANDS = ("/image", "/reset", "/save", "/help", "/quit")
_WITH_PATHS = ("/image", "/save")


class Talk(Protocol):
    """unanswered: what stands in the next line to begin with."""

    unanswered: str


def typed(talk: Talk, asked: Sequence[str]) -> Iterator[str]:
    """Lines, until the end of input. asked: earlier questions, the oldest first; they are never written to a file."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output import create_output

    prompts: PromptSession[str] = PromptSession(
        history=InMemoryHistory(asked),
        completer=_completer(),
        complete_while_typing=False,
        output=create_output(always_prefer_tty=True),  # stdout may go to a file
    )
    while True:
        try:
            line = prompts.prompt("> ", default=talk.unanswered)
        except KeyboardInterrupt:
            if not prompts.default_buffer.text:
                say("Ctrl-D or /quit leaves")
            talk.unanswered = ""
            continue
        except EOFError:
            return
        yield line


def choice(letters: str, default: str) -> str:
    """One of the letters, asked for on stderr until it is typed; the default for Enter and Ctrl-D.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    prompts: PromptSession[str] = PromptSession(output=create_output(sys.stderr))
    while True:
        try:
            answer = prompts.prompt(f"[{'/'.join(letters)}]: ").strip().lower() or default
        except EOFError:
            return default
        if len(answer) == 1 and answer in letters:
            return answer


def _completer() -> Completer:
    """Completes commands, and paths behind those that take one."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            command, space, rest = document.text_before_cursor.partition(" ")
            if command in _WITH_PATHS and space:
                yield from paths.get_completions(Document(rest, len(rest)), complete_event)
            elif not space:
                yield from (Completion(c, -len(command)) for c in COMMANDS if command and c.startswith(command))

    return Commands()
