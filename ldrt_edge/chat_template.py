"""Chat templates: programs that come with a model, read as what they are for and nothing else.

A template writes a conversation down: it walks over messages and their parts, chooses, and joins texts. Jinja2 can do
more, and a hostile template needs no more than a doubling text or a loop in a loop to fill the memory or the day. So
its tree is looked at before it is compiled: only what such a template needs passes, and then it runs in a sandbox.

Source: https://jinja.palletsprojects.com/en/stable/sandbox/ (what the sandbox does not defend against).
"""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ldrt_edge.errors import ArtifactError

_LENGTH_LIMIT = 64 << 10
_NODES_LIMIT = 5_000
_LOOPS_LIMIT = 2  # messages, and the parts of one
_DEPTH_LIMIT = 60  # of expressions: Jinja's compiler walks them by recursion
_ALLOWED = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.Break, nodes.Continue,
    nodes.Name, nodes.NSRef, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword,
    nodes.CondExpr, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Call, nodes.Compare,
    nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Concat, nodes.Add, nodes.Sub, nodes.Mod, nodes.Neg,
    nodes.Scope,
)  # fmt: skip
_WALKED = (nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Filter)
_FILTERS = {
    "trim", "upper", "lower", "capitalize", "title", "length", "count", "first", "last", "list", "string", "int",
    "default", "d", "join", "selectattr", "rejectattr", "select", "reject", "map", "tojson", "safe", "items", "replace",
}  # fmt: skip
_FUNCTIONS = {"raise_exception", "namespace"}
_METHODS = {
    "upper", "lower", "capitalize", "title", "strip", "lstrip", "rstrip", "startswith", "endswith", "split", "get",
    "items", "keys", "values", "replace",
}  # fmt: skip
_GROWING = {"join", "replace", "tojson", "map"}


def compile_template(source: str) -> Template:
    """A template that may run.

    Raises:
        ArtifactError: it cannot be read, or holds more than a chat template needs.
    """
    environment = _environment()
    check_template(source)
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise ArtifactError(f"the model's chat template cannot be read: {error}") from error


def check_template(source: str) -> None:
    """Refuse a template that holds more than a chat template needs.

    Raises:
        ArtifactError: says what, and in which line.
    """
    if len(source) > _LENGTH_LIMIT:
        raise ArtifactError(f"the model's chat template has {len(source)} characters, the limit is {_LENGTH_LIMIT}")
    try:
        tree = _environment().parse(source)
        problem = _problem(tree)
    except (TemplateError, RecursionError, ValueError, OverflowError, MemoryError) as error:
        raise ArtifactError(f"the model's chat template cannot be read: {error}") from error
    if problem:
        raise ArtifactError(f"the model's chat template holds what a chat template does not need: {problem}: refused")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _problem(tree: nodes.Template) -> str | None:
    targets = [assignment.target for assignment in tree.find_all(nodes.Assign)]
    assigned = {part.name for target in targets for part in [target, *target.find_all(nodes.Name)]
                if isinstance(part, nodes.Name)}  # fmt: skip
    for count, (node, loops, depth) in enumerate(_walk(tree)):
        at = f"line {getattr(node, 'lineno', 0)}"
        if count >= _NODES_LIMIT or depth > _DEPTH_LIMIT:
            return f"too much of it ({at})"
        if not isinstance(node, _ALLOWED):
            return f"{type(node).__name__.lower()} ({at})"
        if loops > _LOOPS_LIMIT or (isinstance(node, nodes.For) and node.recursive):
            return f"loops within loops ({at})"
        if isinstance(node, nodes.For) and not isinstance(node.iter, _WALKED):
            return f"a loop over something made up ({at})"
        if isinstance(node, (nodes.Getattr, nodes.NSRef)) and node.attr.startswith("_"):
            return f"{node.attr!r} ({at})"
        if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
            return f"the filter {node.name!r} ({at})"
        if isinstance(node, nodes.Call) and not _may_call(node.node):
            return f"a call ({at})"
        if isinstance(node, nodes.Assign) and _grows(node.node, assigned):
            return f"a text that grows by itself ({at})"
    return None


def _walk(node: nodes.Node, loops: int = 0, depth: int = 0) -> Iterator[tuple[nodes.Node, int, int]]:
    """Every node, with how many loops and how many nodes it stands in."""
    waiting = [(node, loops, depth)]
    while waiting:
        node, loops, depth = waiting.pop()
        loops += isinstance(node, nodes.For)
        yield node, loops, depth
        waiting.extend((child, loops, depth + 1) for child in node.iter_child_nodes())


def _may_call(function: nodes.Expr) -> bool:
    if isinstance(function, nodes.Name):
        return function.name in _FUNCTIONS
    return isinstance(function, nodes.Getattr) and function.attr in _METHODS


def _grows(value: nodes.Node, assigned: set[str]) -> bool:
    """Whether what is assigned is made of two texts that were assigned, or of one that is replaced or joined.

    Either could double with every line or message; one that is appended to cannot.
    """
    parts = [value, *value.find_all(nodes.Node)]
    own = sum(isinstance(part, nodes.Name) and part.name in assigned for part in parts)
    joined = any(isinstance(part, (nodes.Concat, nodes.Add)) for part in parts)
    made = any(
        (isinstance(part, nodes.Filter) and part.name in _GROWING)
        or (isinstance(part, nodes.Call) and isinstance(part.node, nodes.Getattr) and part.node.attr in _GROWING)
        for part in parts
    )
    return (own > 1 and joined) or (own > 0 and made)


class _Generation(Extension):
    """transformers' `{% generation %}` block, which marks what the assistant said; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
