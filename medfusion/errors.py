"""The one family of user errors: what is wrong, where (named facts, one a line), how to mend it."""

from collections.abc import Iterable


class MedfusionError(Exception):
    """A mistake that the user can mend; the command line prints it as one short block, never as a traceback.

    Parameters
    ----------
    what : one line that names the case or file and what is wrong with it.
    fix : one line that says what to do about it.
    facts : the measured values behind the complaint, each printed on its own line (``spacing=..., series=...``).

    Examples
    --------
    >>> print(MedfusionError("sub-07: image and mask differ", image="256 x 256 x 180", fix="resample the mask"))
    sub-07: image and mask differ
      image  256 x 256 x 180
      Fix    resample the mask
    """

    def __init__(self, what: str, *, fix: str = "", **facts: object) -> None:
        self.what, self.fix, self.facts = what, fix, facts
        super().__init__(what)

    def __str__(self) -> str:
        # a dotted name is a setting and is printed as the user has to type it
        rows = [(n if "." in n else n.replace("_", " "), str(value)) for n, value in self.facts.items()]
        rows += [("Fix", self.fix)] if self.fix else []
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([self.what, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def some(names: Iterable[object]) -> str:
    """The first ten of many names, for a fact."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
