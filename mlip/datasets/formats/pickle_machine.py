"""Take a pickle apart into inert pieces: what it would call is recorded, never looked up or called.

An own machine for the opcodes that writers of data use (protocols 2 to 5). It knows no class and
no function: a name in the pickle becomes an entry of the caller's table or an error, a call
becomes a :class:`Call` that holds its arguments. What the pieces mean is for pickles.py to say.

Work and memory stay in proportion to the bytes read: declared lengths are compared with the bytes
that are there, operations are counted, and nothing is hashed but strings and small integers.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from mlip.errors import DataError

MAX_OPERATIONS = 1_000_000
_KEY_BITS = 60  # integers up to here hash to themselves: no collisions to be had
_MARK = object()
_QUIT = ord(".")


class Name:
    """A class or function that a pickle names and the caller's table knows."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Call:
    """What a pickle asks to be called: the name, its arguments, and the state set afterwards."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: Any) -> None:
        self.name = name
        self.args = args
        self.state: Any = None


PERSISTENT = "persistent id"
Names = Mapping[tuple[str, str], Name]
Stack = list[Any]
# One opcode: (bytes, place after the opcode, stack, memo, names) -> place of the next opcode.
Operation = Callable[[bytes, int, Stack, list[Any], Names], int]


def run(data: bytes, start: int, names: Names) -> tuple[Any, int]:
    """Read one pickle.

    Args:
        data: bytes that hold it.
        start: where it begins.
        names: classes and functions that it may name.

    Returns:
        What it holds, made of None, bool, int, float, str, memoryview (for bytes), list, tuple,
        dict, set, Name and Call; and the place after its end.

    Raises:
        DataError: damaged, cut short, of another protocol, or it names or does what it must not.
    """
    stack: Stack = []
    memo: list[Any] = []
    end, view = len(data), memoryview(data)
    if end < start + 2 or data[start] != 0x80 or not 2 <= data[start + 1] <= 5:
        raise DataError("expected a pickle of protocol 2 to 5" if end > start else "it is empty")
    at = start + 2
    try:
        for _ in range(MAX_OPERATIONS):
            code = data[at]
            at += 1
            if code == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif code == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif code == 0x8C:  # SHORT_BINUNICODE
                begin = at + 1
                at = begin + data[at]
                text = data[begin:at].decode()
                stack.append(text)
                if data[at] == 0x94:
                    memo.append(text)
                    at += 1
            elif code == 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            elif code == 0x52:  # REDUCE
                args = stack.pop()
                stack[-1] = _call(stack[-1], args)
            elif code == 0x42:  # BINBYTES
                begin = at + 4
                at = begin + int.from_bytes(data[at:begin], "little")
                if at > end:
                    break
                stack.append(view[begin:at])
                tail = _TENSOR_TAIL(data, at)
                if tail is not None and _tensor(stack, memo, tail):
                    at = tail.end()
            elif code == 0x28:  # MARK
                stack.append(_MARK)
            elif code == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif code == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif code == 0x93:  # STACK_GLOBAL
                name = stack.pop()
                stack[-1] = _named(names, stack[-1], name)
            elif code == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif code == _QUIT:
                break
            else:
                operation = _OPERATIONS[code]
                if operation is None:
                    raise DataError(f"the pickle uses opcode {code:#04x}, which no data set needs")
                at = operation(data, at, stack, memo, names)
        else:
            raise DataError(f"the pickle has more than {MAX_OPERATIONS} operations")
    except (IndexError, struct.error):
        raise DataError("the pickle is cut short or damaged") from None
    except UnicodeDecodeError:
        raise DataError("the pickle holds text that is no UTF-8") from None
    if len(stack) != 1 or stack[0] is _MARK:
        raise DataError(f"the pickle is damaged or cut short: {len(stack)} values at its end")
    return stack[0], at


def _call(function: Any, args: Any) -> Call:
    if type(args) is tuple:
        if type(function) is Name:
            return Call(function.text, args)
        if type(function) is Call and not function.name.endswith("()"):
            return Call(f"{function.name}()", args)
    raise DataError("the pickle calls something that is no function")


# The usual end of a tensor after its bytes: call on them, offset 0, size, stride, False, an empty
# call, call on all that; each remembered. One match in place of twenty operations.
_INTEGERS = rb"((?:K.|M..|J....){1,3}[\x85-\x87])"
_TENSOR_TAIL = re.compile(
    rb"\x94\x85\x94R\x94K\x00"
    + _INTEGERS
    + rb"\x94"
    + _INTEGERS
    + rb"\x94\x89h(.)\)R\x94t\x94R\x94",
    re.DOTALL,
).match


def _tensor(stack: Stack, memo: list[Any], tail: re.Match[bytes]) -> bool:
    """Do what a matched end of a tensor says; False if the stack is not as usual."""
    size, stride = _integers(tail[1]), _integers(tail[2])
    if len(stack) < 4 or stack[-3] is not _MARK or size is None or stride is None:
        return False
    payload = stack[-1]
    args: tuple[Any, ...] = (payload,)
    storage = _call(stack[-2], args)
    hooks = _call(memo[tail[3][0]], ())
    full = (storage, 0, size, stride, False, hooks)
    del stack[-3:]
    stack[-1] = tensor = _call(stack[-1], full)
    memo += (payload, args, storage, size, stride, hooks, full, tensor)
    return True


@functools.lru_cache(maxsize=4096)
def _integers(text: bytes) -> tuple[int, ...] | None:
    """Read the operations of a tuple of one to three integers; None if there are more or less."""
    numbers, at = [], 0
    while at < len(text) - 1:
        width = {0x4B: 1, 0x4D: 2, 0x4A: 4}[text[at]]
        numbers.append(int.from_bytes(text[at + 1 : at + 1 + width], "little", signed=width == 4))
        at += 1 + width
    return tuple(numbers) if len(numbers) == text[-1] - 0x84 else None


def _named(names: Names, module: Any, name: Any) -> Name:
    if type(name) is not str or type(module) is not str:
        raise DataError("the pickle names a class by something that is no text")
    found = names.get((module, name))
    if found is None:
        text = f"{module}.{name}"
        raise DataError(
            f"refused: the pickle asks for {text[:100]!r}, which is not on the list of what data "
            "files may name (nothing was run)"
        )
    return found


def _global(data: bytes, at: int, stack: Stack, _m: list[Any], names: Names) -> int:
    head = data[at : at + 1000]
    module, _, rest = head.partition(b"\n")
    name, newline, _ = rest.partition(b"\n")
    if not newline:
        raise DataError("the pickle names a class without end")
    stack.append(_named(names, module.decode(), name.decode()))
    return at + len(module) + len(name) + 2


def _build(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    state, target = stack.pop(), stack[-1]
    if type(target) is not Call or target.state is not None:
        raise DataError("refused: the pickle changes the state of something that has none")
    target.state = state
    return at


def _persistent(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    stack[-1] = Call(PERSISTENT, stack[-1])
    return at


def _constant(value: Any) -> Operation:
    def push(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
        stack.append(value)
        return at

    return push


def _fresh(kind: Callable[[], Any]) -> Operation:
    def push(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
        stack.append(kind())
        return at

    return push


def _number(layout: str) -> Operation:
    form = struct.Struct(layout)

    def push(data: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
        stack.append(form.unpack_from(data, at)[0])
        return at + form.size

    return push


def _counted(width: int, read: Callable[[memoryview], Any]) -> Operation:
    """Make the operation that reads a length of ``width`` bytes and so many bytes of content."""

    def push(data: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
        begin = at + width
        end = begin + int.from_bytes(data[at:begin], "little")
        if end > len(data):
            raise DataError("the pickle is cut short, or declares a length beyond its end")
        stack.append(read(memoryview(data)[begin:end]))
        return end

    return push


def _skip(count: int) -> Operation:
    def skip(_d: bytes, at: int, _s: Stack, _m: list[Any], _n: Names) -> int:
        return at + count

    return skip


def _get(width: int) -> Operation:
    def get(data: bytes, at: int, stack: Stack, memo: list[Any], _n: Names) -> int:
        stack.append(memo[int.from_bytes(data[at : at + width], "little")])
        return at + width

    return get


def _put(width: int) -> Operation:
    def put(data: bytes, at: int, stack: Stack, memo: list[Any], _n: Names) -> int:
        place = int.from_bytes(data[at : at + width], "little")
        if place > len(memo):
            raise DataError("the pickle remembers values out of order")
        memo[place : place + 1] = [stack[-1]]
        return at + width

    return put


def _tuple3(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    last, middle = stack.pop(), stack.pop()
    stack[-1] = (stack[-1], middle, last)
    return at


def _tuple(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    items = _since_mark(stack)
    stack.append(tuple(items))
    return at


def _new_object(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    args = stack.pop()
    stack[-1] = _call(stack[-1], args)
    return at


def _set_item(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    value, key = stack.pop(), stack.pop()
    _fill(stack[-1], [key, value])
    return at


def _set_items(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    items = _since_mark(stack)
    _fill(stack[-1], items)
    return at


def _append(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    item = stack.pop()
    _container(stack[-1], list).append(item)
    return at


def _appends(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    items = _since_mark(stack)
    _container(stack[-1], list).extend(items)
    return at


def _add_items(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    items = _since_mark(stack)
    _container(stack[-1], set).update(map(_hashable, items))
    return at


def _frozen_set(_d: bytes, at: int, stack: Stack, _m: list[Any], _n: Names) -> int:
    items = _since_mark(stack)
    stack.append(set(map(_hashable, items)))
    return at


def _since_mark(stack: Stack) -> list[Any]:
    """Take what was put on the stack since the last mark."""
    place = len(stack) - 1
    while stack[place] is not _MARK:
        place -= 1
        if place < 0:
            raise DataError("the pickle is damaged: a mark is missing")
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _fill(target: Any, items: list[Any]) -> None:
    if type(target) is Call and target.state is None:
        target.state = {}
    mapping = _container(target.state if type(target) is Call else target, dict)
    if len(items) % 2:
        raise DataError("the pickle is damaged: a key has no value")
    for i in range(0, len(items), 2):
        mapping[_hashable(items[i])] = items[i + 1]


def _hashable(key: Any) -> str | int | None:
    """Give a key whose hash is cheap and not for the file to choose."""
    kind = type(key)
    if kind is str or key is None or (kind in {int, bool} and key.bit_length() <= _KEY_BITS):
        return key  # type: ignore[no-any-return]
    raise DataError("the pickle has keys that are neither text nor small integers")


def _container(target: Any, kind: type[Any]) -> Any:
    if type(target) is not kind:
        raise DataError(f"the pickle is damaged: it fills something that is no {kind.__name__}")
    return target


def _table() -> list[Operation | None]:
    operations: dict[int, Operation] = {
        ord("c"): _global, ord("b"): _build, ord("Q"): _persistent,
        0x81: _new_object, 0x87: _tuple3, ord("t"): _tuple, 0x95: _skip(8),
        ord("N"): _constant(None), 0x88: _constant(True), 0x89: _constant(False),
        ord("}"): _fresh(dict), ord("]"): _fresh(list), 0x8F: _fresh(set),
        ord("M"): _number("<H"), ord("J"): _number("<i"), ord("G"): _number(">d"),
        0x8A: _counted(1, _integer), ord("X"): _counted(4, _text), 0x8D: _counted(8, _text),
        ord("C"): _counted(1, _bytes), ord("B"): _counted(4, _bytes), 0x8E: _counted(8, _bytes),
        0x96: _counted(8, _bytes),
        ord("j"): _get(4), ord("q"): _put(1), ord("r"): _put(4),
        ord("s"): _set_item, ord("u"): _set_items, ord("a"): _append, ord("e"): _appends,
        0x90: _add_items, 0x91: _frozen_set,
    }  # fmt: skip
    return [operations.get(code) for code in range(256)]


def _integer(content: memoryview) -> int:
    return int.from_bytes(content, "little", signed=True)


def _text(content: memoryview) -> str:
    return str(content, "utf-8")


def _bytes(content: memoryview) -> memoryview:
    return content


_OPERATIONS = _table()
