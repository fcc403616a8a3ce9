"""What schemathesis does with each request before it is sent: answers stay short, since the door is tested."""

from __future__ import annotations

from typing import Any

import schemathesis

LONGEST = 4  # tokens


@schemathesis.hook
def before_call(context: Any, case: schemathesis.Case, **kwargs: Any) -> None:
    """Cut `max_tokens`."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(case.body.get(name), (int, float)) and case.body[name] > LONGEST:
                case.body[name] = LONGEST
