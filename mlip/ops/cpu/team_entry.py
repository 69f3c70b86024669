"""What each thread of a team does first. Loaded through ``cache.py``."""

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic


@intrinsic
def thread_number(context, address):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Call the runtime's function at an address: which thread of the team this is."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


@intrinsic
def call_body(context, address):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Call the function at an address."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def enter(data):  # type: ignore[no-untyped-def]
    """Call the body on the first threads; others do not wait for the interpreter lock.

    data: how many threads; addresses of the runtime's function and of the body.
    """
    if thread_number(data[1]) < data[0]:
        call_body(data[2])
