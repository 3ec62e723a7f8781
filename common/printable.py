"""Text of others - file names, reasons of decoders - that goes to a terminal."""


def printable(text: str, limit: int = 4096) -> str:
    r"""``text`` with what a terminal would act on, or could not show, as its escape: ``\n``, ``\x1b``, ``\udce9``.

    Those are control characters, marks that change the direction of writing, and the bytes of a name that is not
    UTF-8, which print() refuses. Letters of any language stay. At most ``limit`` characters of ``text`` are shown.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown + "..." * (len(text) > limit)


def screen(text: str) -> str:
    """Several lines, each of them ``printable``."""
    return "\n".join(map(printable, text.split("\n")))
