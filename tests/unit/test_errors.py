import re

import pytest

from minserve import errors

LINE = re.compile(r"^    ([│ ├└─]*)(\w+) +(?:(\d{3}) (\w+))?(.*)$")


def drawn_tree() -> dict[str, tuple[str, int | None, str | None, str]]:
    """The tree in the module's docstring: class → parent, status, type name, remark."""
    tree: dict[str, tuple[str, int | None, str | None, str]] = {}
    path: list[str] = []
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        match = LINE.match(line)
        if match:
            indent, name, status, type_name, remark = match.groups()
            depth = len(indent) // 4
            path = [*path[:depth], name]
            tree[name] = (path[depth - 1] if depth else "Exception", int(status) if status else None, type_name, remark)
    return tree


CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.MinServeError)
}


def test_the_drawn_tree_names_every_class() -> None:
    assert drawn_tree().keys() == CLASSES.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_the_drawn_tree_is_the_tree(name: str) -> None:
    parent, status, type_name, _ = drawn_tree()[name]
    base = CLASSES[name].__base__
    assert base is not None
    assert base.__name__ == parent
    if status is not None:
        assert (CLASSES[name].status, CLASSES[name].type_name) == (status, type_name)


def test_only_what_may_succeed_a_little_later_is_retryable() -> None:
    retryable = {name for name, kind in CLASSES.items() if kind.retryable}
    assert retryable == {
        *("Unavailable", "QueueFull", "Draining"),
        *("WorkerFailed", "WorkerOutOfMemory", "ResponseTimeout", "RankProtocolError"),
    }
