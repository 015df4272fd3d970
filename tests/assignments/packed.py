"""packed.py -- how does a module run whose text has to wait until an assignment is due?

Packed, it cannot be read by accident. This keeps honest people honest; it is no protection.
"""
import base64
import linecache
from pathlib import Path


def run(module, text):
    """Execute a module's packed text in its namespace.

    Tracebacks and `inspect` see the file of to_read/ in its place: line by line the same, without
    what an assignment asks for.
    """
    path = Path(module["__file__"])
    source = base64.b85decode("".join(text.split())).decode()
    show(path, source)
    exec(compile(source, str(path), "exec"), module)
    for value in list(module.values()):
        if hasattr(value, "rewrite"):       # a kernel, which Triton's interpreter has yet to read
            value.rewrite()
    show(path, (path.parent / "to_read" / path.name).read_text(encoding="utf-8"))


def show(path, text):
    # without a time, or it would be read from the file again
    linecache.cache[str(path)] = len(text), None, text.splitlines(keepends=True), str(path)
